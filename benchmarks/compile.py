"""What torch.compile buys a recipe, and costs: eager, per block, whole model, and its modes.

    python benchmarks/compile.py train_configs/gpt_oss_656m_1gpu.toml \
        --out benchmarks/results/compile.json
    python benchmarks/compile.py train_configs/debug.toml --steps 5 --repeats 1

Options of a run may follow, as for run_train.sh. A row is the Trainer's step on random tokens, of
one micro-batch unless an option says otherwise, in a process of its own; rows take turns, --repeats
times over, and compile from nothing each time (inductor's caches are off). Compile seconds are
those of the first step less the median of the later ones. Peak memory is that of the later ones,
and does not see what CUDA graphs keep between steps. A graph break is a place where the compiler
gives the program back to Python; blocks must have none (fullgraph refuses them), the whole model's
are listed with their reasons, as are recompilations, and what kept CUDA graphs from being used
(mode reduce-overhead).

What a run does under `compile.enable` is "blocks"; what it does without is "eager", in which the
bodies of [kernels] and FlexAttention may still be compiled by themselves. The other rows exist here
alone.

CUDA graphs need shapes that stay: without expert parallel a batch has N k rows of experts however
they are routed, and counts stay on the device, so blocks qualify. Expert parallel does not: the
host must know how many rows travel. What a graph gives, gradients too, lasts until the next one is
begun: hence one micro-batch a step.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")
# name -> (what is compiled, mode of torch.compile)
VARIANTS: dict[str, tuple[str, str] | None] = {"eager": None}
VARIANTS |= {
    scope if mode == "default" else f"{scope}, {mode}": (scope, mode)
    for scope in ("blocks", "model")
    for mode in MODES
}
WARM_UP = 2  # steps that compile, allocate and record


def compiler_of(variant: str):
    """What takes the place of `parallel/apply.py`'s _compile: (model, dims, job) -> None."""
    scope, mode = VARIANTS[variant]

    def compile_parts(model, dims, job) -> None:
        options = {"backend": job.compile.backend}
        if job.compile.backend == "inductor":
            options["mode"] = mode
        if scope == "model":
            model.compile(**options)
            return
        for block in model.layers.values():
            block.compile(fullgraph=True, **options)

    return compile_parts


def seen_by_the_compiler() -> dict[str, object]:
    """Graphs, breaks and recompilations of this process so far, with their reasons."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    reasons = [m.recompile_reason for m in get_compilation_metrics() if m.recompile_reason]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": {in_a_line(why): n for why, n in counters["graph_break"].items()},
        "recompiles": [in_a_line(why) for why in reasons],
        "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
    }


def in_a_line(text: object) -> str:
    """An error or a reason, without its stack, its later parts, and where this machine keeps code:
    the compiler cuts long paths off in front.
    """
    told = " ".join(str(text).partition("User stack trace")[0].split())
    return re.sub(r"[^\s\"']*/(?=(microtron|torch|torchtitan|transformers)/)", "", told)[:300]


def run_variant(variant: str, argv: list[str], steps: int) -> dict[str, object]:
    """Seconds of each step, tokens a step, peak memory, and what the compiler did."""
    from common import our_trainer, peak_bytes, reset_peak, seconds_of, stepping

    enable = "--compile.no-enable" if VARIANTS[variant] is None else "--compile.enable"
    given = [argv[0], "--training.global_batch_size=-1", *argv[1:], enable]
    with our_trainer(given) as trainer:
        import torch

        step, seconds, at_first = stepping(trainer), [], None
        for number in range(1, WARM_UP + steps + 1):
            torch.compiler.cudagraph_mark_step_begin()
            seconds.append(seconds_of(step))
            if number == 1:
                at_first = seen_by_the_compiler()
            if number == WARM_UP:
                reset_peak()
        at_end = seen_by_the_compiler()
        return {
            "seconds": seconds,
            "tokens": trainer.step_tokens,
            "loss": trainer.step_result[0].item(),
            "peak_bytes": peak_bytes(),
            **at_end,
            "late_recompiles": len(at_end["recompiles"]) - len(at_first["recompiles"]),
        }


def measured(variant: str, argv: list[str], steps: int) -> dict[str, object]:
    """`run_variant`, or why it failed."""
    import microtron.accelerator  # noqa: F401  (before torchtitan)

    import microtron.parallel.apply as apply

    compile_parts = None if VARIANTS[variant] is None else compiler_of(variant)
    with mock.patch.object(apply, "_compile", compile_parts):
        try:
            return run_variant(variant, argv, steps)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {in_a_line(error)}"}


def in_its_own_process(variant: str, given: argparse.Namespace, argv: list[str]) -> dict:
    """Runs this script for one variant; its row."""
    from common import told_by

    command = [sys.executable, __file__, given.toml, "--steps", str(given.steps), *argv[1:]]
    done = subprocess.run(
        [*command, "--variant", variant],
        capture_output=True,
        text=True,
        env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    return told_by(done)


def summed_up(rounds: list[dict[str, object]]) -> dict[str, object]:
    """One row of a variant's repeats: median over all later steps, and the spread."""
    from common import summary

    failed = [r for r in rounds if "failed" in r]
    if failed:
        return failed[0]
    medians = [statistics.median(r["seconds"][WARM_UP:]) for r in rounds]
    later = [s for r in rounds for s in r["seconds"][WARM_UP:]]
    first = [r["seconds"][0] - m for r, m in zip(rounds, medians, strict=True)]
    peaks = [r["peak_bytes"] for r in rounds if r["peak_bytes"] is not None]
    last = {k: v for k, v in rounds[-1].items() if k not in ("seconds", "peak_bytes")}
    return {
        "step_s": summary(later),
        "step_s_of_repeats": medians,
        "tokens_per_s": last["tokens"] / statistics.median(later),
        "compile_s": summary(first),
        "peak_bytes": summary(peaks) if peaks else None,
        **last,
    }


def table(rows: dict[str, dict[str, object]]) -> str:
    """What is printed last."""
    heads = ("", "tokens/s", "to eager", "first step +s", "peak GiB", "graphs", "breaks")
    lines = [[*heads, "recompiles (late)"]]
    base = rows.get("eager", {}).get("tokens_per_s")
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, f"failed: {row['failed']}"])
            continue
        peak = row["peak_bytes"]
        lines.append(
            [
                name,
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / base:.2f}" if base else "-",
                f"{row['compile_s']['median']:.1f}",
                f"{peak['median'] / 2**30:.2f}" if peak else "-",
                str(row["graphs"]),
                str(sum(row["graph_breaks"].values())),
                f"{len(row['recompiles'])} ({row['late_recompiles']})",
            ]
        )
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(lines[0]))]
    out = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)) for line in lines]
    for name, row in rows.items():
        for why, count in row.get("graph_breaks", {}).items():
            out.append(f"break in {name} ({count}): {why}")
        if row.get("cuda_graphs_skipped"):
            out.append(f"CUDA graphs skipped in {name}: {row['cuda_graphs_skipped']}")
    return "\n".join(line.rstrip() for line in out)


def main() -> None:
    """Measures every variant, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("toml")
    parser.add_argument("--steps", type=int, default=20, help="measured, after the warm-up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    argv = [f"--job.config_file={given.toml}", *options]
    if given.variant:
        print(json.dumps(measured(given.variant, argv, given.steps)))
        return
    rounds: dict[str, list] = {name: [] for name in given.only}
    for repeat in range(given.repeats):
        for name in given.only:
            row = in_its_own_process(name, given, argv)
            rounds[name].append(row)
            told = row.get("failed") or f"{len(row['seconds'])} steps"
            print(f"{repeat + 1}/{given.repeats} {name}: {told}", flush=True)
    rows = {name: summed_up(of) for name, of in rounds.items()}
    from common import facts, write_json

    if given.out:
        results = {**facts(), "toml": given.toml, "options": options, "steps": given.steps}
        write_json(given.out, {**results, "repeats": given.repeats, "variants": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
