"""An experiment: linear layers in float8 by TorchTitan's converter, the loss curves side by side.

    pip install torchao==0.16.0 matplotlib
    python benchmarks/float8.py train_configs/gpt_oss_656m_1gpu.toml --steps 500 \
        --lr_scheduler.warmup_steps=50 --out benchmarks/results/float8.json \
        --png benchmarks/results/float8.png
    python benchmarks/float8.py train_configs/debug.toml --steps 3 --emulate     # tiny, on a CPU

Two runs, one after the other, each in a process of its own, with the same weights and the same data
(the recipe's; its folders must be prepared): one as it is, one with every nn.Linear of the blocks
but the router converted by TorchTitan's ``quantize.linear.float8`` (torchao; compute capability 8.9
or newer; --emulate computes with rounded numbers instead, anywhere, uncompiled, slowly). That is
attention's projections, and a dense model's feed-forward. The experts stay in bf16: float8 grouped
products want each expert's rows padded to multiples of 16, which a routing without padding does not
have. The curves are what this is for: a speed is of one run, the median over its steps. No option
of a run asks for float8: `check.py` refuses ``model.converters``.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

WARM_UP = 3  # steps that compile and allocate; they count in the curve, not in the speed


def lacking(emulate: bool) -> str | None:
    """Why float8 cannot run here, in a line; None: it can."""
    import torch

    if importlib.util.find_spec("torchao") is None:
        return "float8 needs torchao: pip install torchao==0.16.0"
    if emulate:
        return None
    if not torch.cuda.is_available():
        return "float8 needs a GPU of compute capability 8.9 or newer: there is none; use --emulate"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return f"float8 needs compute capability 8.9 or newer, not {major}.{minor}; use --emulate"
    return None


def converting(recipe: str | None, emulate: bool):
    """A patch that has TorchTitan's Trainer convert the model to float8."""
    import microtron.accelerator  # noqa: F401  (before torchtitan)

    import torchtitan.components.quantization.float8  # noqa: F401  (registers the converter)
    import torchtitan.train as titan
    from torchtitan.protocols.model_converter import build_model_converters

    def build(job, dims):
        job.model.converters = ["quantize.linear.float8"]
        float8 = job.quantize.linear.float8
        float8.filter_fqns = ["output", "router"]  # the head is no plain nn.Linear; routing is fp32
        float8.recipe_name, float8.emulate = recipe, emulate
        return build_model_converters(job, dims)

    return mock.patch.object(titan, "build_model_converters", build)


def run(float8: bool, argv: list[str], steps: int, recipe: str | None, emulate: bool) -> dict:
    """Loss and seconds of every step, and how many layers were converted."""
    import contextlib

    from common import our_trainer, seconds_of, stepping

    patch = converting(recipe, emulate) if float8 else contextlib.nullcontext()
    with patch, our_trainer(argv) as trainer:
        modules = [m for part in trainer.model_parts for m in part.modules()]
        converted = sum(type(m).__name__ == "Float8Linear" for m in modules)
        step, losses, seconds = stepping(trainer), [], []
        for _ in range(steps):
            seconds.append(seconds_of(step))
            losses.append(trainer.step_result[0].item())
        later = statistics.median(seconds[WARM_UP:] or seconds)
        return {
            "loss": losses,
            "seconds": seconds,
            "tokens_per_s": trainer.step_tokens / later,
            "converted_layers": converted,
        }


def compared(rows: dict[str, dict]) -> dict[str, float]:
    """How far apart the curves are: over all steps, and over the last tenth."""
    apart = [b - a for a, b in zip(rows["bf16"]["loss"], rows["float8"]["loss"], strict=True)]
    last = apart[-max(1, len(apart) // 10) :]
    return {
        "speed_to_bf16": rows["float8"]["tokens_per_s"] / rows["bf16"]["tokens_per_s"],
        "largest_difference": max(apart, key=abs),
        "difference_at_the_end": statistics.mean(last),
    }


def plot(path: Path, rows: dict[str, dict]) -> None:
    """Both curves, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6))
    for name, row in rows.items():
        top.plot(range(1, len(row["loss"]) + 1), row["loss"], label=name, linewidth=1)
    apart = [b - a for a, b in zip(rows["bf16"]["loss"], rows["float8"]["loss"], strict=True)]
    bottom.plot(range(1, len(apart) + 1), apart, linewidth=1)
    top.set_ylabel("training loss")
    top.legend()
    bottom.set_ylabel("float8 less bf16")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def in_its_own_process(name: str, given: argparse.Namespace, options: list[str]) -> dict:
    """One of the two runs; ends the script in a line where it fails."""
    command = [sys.executable, __file__, given.toml, "--steps", str(given.steps), "--only", name]
    command += ["--emulate"] * given.emulate
    command += ["--recipe", given.recipe] if given.recipe else []
    from common import told_by

    done = subprocess.run([*command, *options], capture_output=True, text=True)
    row = told_by(done)
    if "failed" in row:
        sys.exit(f"error: the {name} run failed: {row['failed']}")
    return row


def main() -> None:
    """Both runs, the plot, the JSON, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("toml")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--recipe", choices=["tensorwise", "rowwise", "rowwise_with_gw_hp"])
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--only", choices=["bf16", "float8"], help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    why = lacking(given.emulate)
    if why:
        sys.exit(f"error: {why}")
    argv = [f"--job.config_file={given.toml}", "--data.no-mock", *options]
    if given.only:
        float8 = given.only == "float8"
        print(json.dumps(run(float8, argv, given.steps, given.recipe, given.emulate)))
        return
    rows = {name: in_its_own_process(name, given, options) for name in ("bf16", "float8")}
    from common import facts, write_json

    apart = compared(rows)
    if given.png:
        plot(given.png, rows)
    if given.out:
        asked = {"toml": given.toml, "options": options, "recipe": given.recipe}
        results = {**facts(), **asked, "emulated": given.emulate, **apart, "runs": rows}
        results["versions"]["torchao"] = importlib.metadata.version("torchao")
        write_json(given.out, results)
    print(f"{'':8} {'tokens/s':>10} {'last loss':>10} {'layers in float8':>17}")
    for name, row in rows.items():
        speed, loss = row["tokens_per_s"], row["loss"][-1]
        print(f"{name:8} {speed:10,.0f} {loss:10.4f} {row['converted_layers']:17}")
    print("  ".join(f"{name} {value:+.4f}" for name, value in apart.items()))


if __name__ == "__main__":
    main()
