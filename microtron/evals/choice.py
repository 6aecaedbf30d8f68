"""Multiple choice by log-likelihood: HellaSwag, as lm-evaluation-harness asks it.

Each ending is scored as the continuation of its context; the likeliest is the answer. ``acc``
compares the log-likelihoods as they are, ``acc_norm`` divides each by the characters of its ending,
so that short ones are not favoured. Texts are prepared as that harness's task ``hellaswag`` does
(github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks/hellaswag; the data: arXiv:1905.07830,
rowanzellers.com/hellaswag, and Rowan/hellaswag on the hub), so the figures compare.

    examples = read(Path("hellaswag_val.jsonl"))
    questions = [question(e, tokenizer.encode, [tokenizer.eot_id]) for e in examples]
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from microtron.errors import UserError

_FIELDS = {"ctx_a": str, "ctx_b": str, "activity_label": str, "endings": list}
Pair = tuple[list[int], list[int]]  # ids of a context, ids of what may follow it


@dataclass(frozen=True)
class Example:
    """A context, its possible endings, and the index of the true one."""

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, from 0 to 1, among ``examples``."""

    acc: float
    acc_norm: float
    examples: int

    def stderr(self, share: float) -> float:
        """Standard error of one of the shares (sample deviation over the root of the count)."""
        return math.sqrt(share * (1 - share) / max(self.examples - 1, 1))


def read(path: Path, limit: int = -1) -> list[Example]:
    """The first ``limit`` examples of a HellaSwag jsonl, the hub's or the original; -1: all.

    Raises:
        UserError: no such file, or a line of it is no labelled example.
    """
    examples = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(examples) == limit:
                    break
                if line.strip():
                    examples.append(_example(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read the HellaSwag file {str(path)!r} ({told}): name its validation jsonl, "
            "hellaswag_val.jsonl of github.com/rowanz/hellaswag"
        ) from None
    if not examples:
        raise UserError(f"{path} holds no HellaSwag example: name its validation jsonl")
    return examples


def _example(line: str, place: str) -> Example:
    remedy = "the validation jsonl of HellaSwag has ctx_a, ctx_b, activity_label, endings, label"
    try:
        fields = json.loads(line)
        wrong = [k for k, kind in _FIELDS.items() if not isinstance(fields.get(k), kind)]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{place} is no JSON object ({error}): {remedy}") from None
    if wrong:
        raise UserError(f"{place} lacks {', '.join(wrong)}: {remedy}")
    label, endings = str(fields.get("label", "")), fields["endings"]
    if not all(isinstance(ending, str) for ending in endings):
        raise UserError(f"{place}: one of its endings is no text: {remedy}")
    if not label.isdecimal() or int(label) >= len(endings):
        raise UserError(
            f"{place}: label {label!r} names none of its {len(endings)} endings (the test split "
            f"has no labels): {remedy}"
        )
    context = f"{fields['ctx_a']} {fields['ctx_b'].capitalize()}"
    return Example(
        cleaned(f"{fields['activity_label']}: {context}"), tuple(map(cleaned, endings)), int(label)
    )


def cleaned(text: str) -> str:
    """Without the marks that WikiHow's pages left in some of the examples."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def pair(
    context: str, continuation: str, encode: Callable[[str], Sequence[int]], prefix_ids: list[int]
) -> Pair:
    """Ids of both, cut where the context's own ids end; the prefix stands before the context.

    Blanks at the end of the context go over to the continuation, since tokens hold the blank
    before a word.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, start = encode(bare + continuation), encode(bare)
    return [*prefix_ids, *start], list(whole[len(start) :])


def shortened(pair: Pair, longest: int) -> Pair:
    """Cut on the left to what a model sees at once; the last token is a target alone."""
    context, continuation = pair
    whole = (context + continuation)[-longest - 1 :]
    start = len(whole) - min(len(continuation), longest)
    return whole[:start], whole[start:]


def question(
    example: Example, encode: Callable[[str], Sequence[int]], prefix_ids: list[int]
) -> list[Pair]:
    """One pair for each ending of an example."""
    return [pair(example.context, f" {e}", encode, prefix_ids) for e in example.endings]


def accuracy(examples: list[Example], scores: Sequence[float]) -> Accuracy:
    """From the log-likelihood of each ending of each example, in order."""
    right = right_norm = start = 0
    for example in examples:
        told = list(scores[start : start + len(example.endings)])
        start += len(told)
        normed = [
            s / len(e) if e else -math.inf for s, e in zip(told, example.endings, strict=True)
        ]
        right += told.index(max(told)) == example.answer
        right_norm += normed.index(max(normed)) == example.answer
    count = len(examples)
    return Accuracy(right / count, right_norm / count, count)
