"""Seconds of training to validation loss 1.92 on tiny Shakespeare, characters, the whole 10% split.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt --seeds 3 \
        --out benchmarks/results/shakespeare.json

Ours is `train_configs/shakespeare.toml` run as a person would; the peer is nanoGPT's CPU recipe
(`nanogpt_baseline.py`). Same text, same split by position, same threads, the same number of steps
between validations; each seed runs both, one after the other, so that a slow minute hits both. A
run ends at the first validation at or below the target. Seconds are those of training: validation
is left out on both sides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nanogpt_baseline  # noqa: E402
from common import facts, summary, write_json  # noqa: E402

RECIPE = Path(__file__).resolve().parent.parent / "train_configs" / "shakespeare.toml"
SEED = 1337  # and those that follow


def ours(text: Path, seed: int, target: float, options: list[str]) -> dict[str, object]:
    """Runs the recipe in a new folder and reads its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "microtron.train",
            f"--job.config_file={RECIPE}",
            f"--job.dump_folder={folder}/run",
            f"--data.dirs={folder}/data",
            f"--data.source=text:{text}",
            f"--debug.seed={seed}",
            f"--validation.val_target={target}",
            "--sample.freq=0",
            *options,
        ]
        subprocess.run(command, check=True, cwd=folder)
        return {"seed": seed, **told_by(Path(folder, "run"), target)}


def told_by(run: Path, target: float) -> dict[str, object]:
    """What a run's folder says: the curve, its end, tokens, parameters."""
    from microtron.model.accounting import count_parameters
    from microtron.model.args import ModelArgs

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    identity = json.loads(next((run / "checkpoint").glob("*/microtron.json")).read_text())
    counted = count_parameters(ModelArgs(**identity["model_args"]))
    steps = {line["step"]: line for line in lines if "loss" in line}
    curve = [
        {"step": x["step"], "time_s": steps[x["step"]]["time_s"], "val_loss": x["val_loss"]}
        for x in lines
        if "val_loss" in x
    ]
    end = curve[-1]
    return {
        "reached": end if end["val_loss"] <= target else None,
        "end": end,
        "tokens": steps[end["step"]]["tokens"],
        "val_tokens": next(x["val_tokens"] for x in lines if "val_tokens" in x),
        "ms_per_step": 1e3 * end["time_s"] / end["step"],
        "parameters": counted.total,
        "parameters_active": counted.active,
        "curve": curve,
    }


def compare(runs: dict[str, list[dict[str, object]]]) -> dict[str, object]:
    """Seconds to the target over the seeds, and the ratio of the medians (ours to the baseline's).

    None where a run never reached it: a median of the others would flatter.
    """
    seconds = {}
    for side, rows in runs.items():
        reached = [row["reached"]["time_s"] for row in rows if row["reached"]]
        seconds[side] = summary(reached) if len(reached) == len(rows) else None
    sides = [seconds.get(side) for side in ("ours", "baseline")]
    ratio = sides[0]["median"] / sides[1]["median"] if all(sides) else None
    return {
        "seconds": seconds,
        "ms_per_step": {s: summary([r["ms_per_step"] for r in rows]) for s, rows in runs.items()},
        "ratio": ratio,
    }


def table(result: dict[str, object]) -> str:
    """A line a run, then the medians."""
    lines = []
    for side in ("ours", "baseline"):
        for row in result.get(side, []):
            end = row["end"]
            lines.append(
                f"{side:9} seed {row['seed']}: {end['val_loss']:.4f} at step {end['step']}, "
                f"{end['time_s']:6.1f} s, {row['tokens']:9,} tokens, {row['ms_per_step']:5.1f} "
                f"ms a step{'' if row['reached'] else ', target not reached'}"
            )
    for side, seconds in result["seconds"].items():
        if seconds:
            low, middle, high = (seconds[name] for name in ("min", "median", "max"))
            lines.append(f"{side:9} median {middle:.1f} s [{low:.1f} .. {high:.1f}]")
    if result["ratio"] is not None:
        lines.append(f"ours takes {result['ratio']:.2f} of the baseline's time (goal: 0.33)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs both for every seed, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--target", type=float, default=1.92)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "baseline"])
    parser.add_argument("--steps", type=int, help="cut both runs: to see that it works")
    parser.add_argument("--out", type=Path)
    asked, options = parser.parse_known_args(argv)
    text = asked.text.resolve()
    every = tomllib.loads(RECIPE.read_text())["validation"]["freq"]
    cut = {"steps": asked.steps} if asked.steps else {}
    options += [f"--training.steps={asked.steps}"] if asked.steps else []
    sides = {
        "ours": lambda seed: ours(text, seed, asked.target, options),
        "baseline": lambda seed: nanogpt_baseline.train(
            text.read_text(), asked.target, every, seed, **cut
        ),
    }
    runs: dict[str, list] = {side: [] for side in sides if asked.only in (None, side)}
    for seed in range(SEED, SEED + asked.seeds):
        for side, rows in runs.items():
            rows.append(sides[side](seed))
    result = {"target": asked.target, "validated_every": every, **runs, **compare(runs)}
    print(table(result))
    if asked.out:
        write_json(asked.out, {**result, **facts()})


if __name__ == "__main__":
    main()
