"""One device, one recipe: FSDP2 wrapping on and off, compile on and off, beside the estimate.

    python benchmarks/one_device.py train_configs/gpt_oss_656m_1gpu.toml --steps 20 \
        --out benchmarks/results/one_device.json
    python benchmarks/one_device.py train_configs/debug.toml --steps 3      # tiny, on a CPU

Each variant is a process of its own, so that none inherits another's memory or compiled code. The
step is the Trainer's, on random tokens; a step ends when the device is done with it. Wrapping a
model for one rank is not what a run does by itself (autocast brings the compute dtype): it is
forced here, to show what the wrapper costs and what bf16 copies of the weights weigh.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

VARIANTS = {
    "plain": ["--compile.no-enable"],
    "compile": ["--compile.enable"],
    "fsdp2": ["wrap", "--compile.no-enable"],
    "fsdp2 + compile": ["wrap", "--compile.enable"],
}


def run_variant(toml: str, options: list[str], steps: int, wrap: bool) -> dict[str, object]:
    """Median seconds of a step, tokens a second, MFU, peak memory."""
    import torch
    from common import one_rank_wrapped, our_trainer, seconds_of, stepping, summary

    argv = [f"--job.config_file={toml}", *options]
    cuda = torch.cuda.is_available()
    with one_rank_wrapped() if wrap else contextlib.nullcontext(), our_trainer(argv) as trainer:
        step = stepping(trainer)
        seconds = [seconds_of(step) for _ in range(2)]  # compiles and warms up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds += [seconds_of(step) for _ in range(steps)]
        ceiling = trainer.metrics_processor.gpu_peak_flops
        step_s = summary(seconds[2:])
        result = {
            "first_step_s": seconds[0],
            "step_s": step_s,
            "tokens_per_s": trainer.step_tokens / step_s["median"],
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "loss": trainer.step_result[0].item(),
        }
        flops = trainer.metrics_processor.num_flops_per_token * result["tokens_per_s"]
    return result | {"flops_per_s": flops, "mfu": flops / ceiling}


def table(rows: dict[str, dict[str, object]]) -> str:
    """A line a variant."""
    lines = [f"{'':16} {'tokens/s':>10} {'MFU':>6} {'peak GiB':>9} {'first step s':>13}"]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name:16} {row['failed']}")
            continue
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        speed = f"{row['tokens_per_s']:10,.0f} {row['mfu']:6.1%}"
        lines.append(f"{name:16} {speed} {peak:>9} {row['first_step_s']:13.1f}")
    return "\n".join(lines)


def estimated(toml: str) -> dict[str, object]:
    """What `microtron estimate` says of the recipe on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "estimate.json"
        command = [sys.executable, "-m", "microtron.cli", "estimate", toml, "--ngpu", "1"]
        import torch

        device = [] if torch.cuda.is_available() else ["--device", "cpu"]
        subprocess.run([*command, *device, "--json", str(out)], check=True, capture_output=True)
        return json.loads(out.read_text())


def main() -> None:
    """Runs every variant, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("toml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help="run only this, print its JSON")
    given, options = parser.parse_known_args()
    if given.variant:
        flags = VARIANTS[given.variant]
        extra = [f for f in flags if f != "wrap"]
        result = run_variant(given.toml, [*options, *extra], given.steps, "wrap" in flags)
        print(json.dumps(result))
        return
    from common import facts, told_by, write_json

    rows = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, given.toml, "--steps", str(given.steps), *options]
        done = subprocess.run([*command, "--variant", variant], capture_output=True, text=True)
        rows[variant] = told_by(done)
        print(f"{variant}: {rows[variant].get('failed', 'done')}", flush=True)
    results = {**facts(), "toml": given.toml, "options": options, "variants": rows}
    results["estimate"] = estimated(given.toml)
    print(table(rows))
    if given.out:
        write_json(given.out, results)


if __name__ == "__main__":
    main()
