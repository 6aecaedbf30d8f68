"""Scores as a person reads them: every figure, and GPT-2's beside ours.

GPT-2's are measurements of github.com/karpathy/nanochat (its discussion of the CORE metric): CORE
as defined by DataComp-LM, arXiv:2406.11794; HellaSwag without examples and LAMBADA in percent.
"""

from collections.abc import Sequence
from typing import Any

# model -> CORE, HellaSwag 0-shot, LAMBADA
REFERENCE: dict[str, tuple[float, float, float]] = {
    "GPT-2 124M": (0.1139, 30.9, 32.3),
    "GPT-2 355M": (0.1849, 39.0, 42.6),
    "GPT-2 774M": (0.2146, 44.0, 48.8),
    "GPT-2 1558M": (0.2565, 50.2, 52.3),
}
# Column -> its format, and which of our scores it holds: (task, metric), the first that is there.
COLUMNS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "CORE": (".4f", ()),
    "HellaSwag %": (".1f", (("hellaswag", "acc_norm"), ("hellaswag file", "acc_norm"))),
    "LAMBADA %": (".1f", (("lambada_openai", "acc"),)),
}

NOTE = "- was not measured; CORE, a mean over 22 tasks (arXiv:2406.11794), is not computed here."


def text(name: str, scores: Sequence[dict[str, Any]], limit: int | None = None) -> str:
    """Both tables, as Markdown.

    Args:
        name: what our row is called.
        scores: each with ``task, metric, value``; ``stderr, examples, tokens`` where known.
        limit: examples that were asked of each task, told beside our figures; None: all.
    """
    rows = [
        [s["task"], s["metric"], _figure(s["value"]), _figure(s.get("stderr")), _count(s)]
        for s in scores
    ]
    all_scores = _aligned([["task", "metric", "value", "+-", "of"], *rows])
    beside = [["model", *COLUMNS]]
    kinds = [kind for kind, _ in COLUMNS.values()]
    for model, values in REFERENCE.items():
        beside.append([model, *map(format, values, kinds)])
    beside.append([name, *(_ours(column, scores, limit) for column in COLUMNS)])
    return f"{all_scores}\n\n{_aligned(beside)}"


def _ours(column: str, scores: Sequence[dict[str, Any]], limit: int | None) -> str:
    kind, wanted = COLUMNS[column]
    for task, metric in wanted:
        for score in scores:
            if (score["task"], score["metric"]) == (task, metric) and not score.get("shots"):
                told = f" (first {limit})" if limit else ""
                return format(100 * score["value"], kind) + told
    return "-"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(score: dict[str, Any]) -> str:
    for unit in ("examples", "tokens"):
        if score.get(unit):
            return f"{score[unit]:,} {unit}"
    return "-"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
