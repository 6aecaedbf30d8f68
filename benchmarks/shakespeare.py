"""Seconds of training to validation loss 1.92 on tiny Shakespeare, characters, the whole 10% split.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt --out
    benchmarks/results/shakespeare.json

Ours is `train_configs/shakespeare.toml` run as a person would; the peer is nanoGPT's CPU recipe
(`nanogpt_baseline.py`). Same text, same split by position, same threads, one after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nanogpt_baseline  # noqa: E402
from common import facts, write_json  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def ours(text: Path) -> dict[str, object]:
    """Runs the recipe in a new folder and reads its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "microtron.train",
            f"--job.config_file={ROOT / 'train_configs' / 'shakespeare.toml'}",
            f"--job.dump_folder={folder}/run",
            f"--data.dirs={folder}/data",
            f"--data.source=text:{text}",
            "--sample.freq=0",
        ]
        subprocess.run(command, check=True, cwd=folder)
        lines = [
            json.loads(x) for x in Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        ]
        identity = json.loads(
            next(Path(folder, "run", "checkpoint").glob("*/microtron.json")).read_text()
        )
    from microtron.model.accounting import count_parameters
    from microtron.model.args import ModelArgs

    counted = count_parameters(ModelArgs(**identity["model_args"]))
    steps = {x["step"]: x for x in lines if "loss" in x}
    curve = [
        {"step": x["step"], "time_s": steps[x["step"]]["time_s"], "val_loss": x["val_loss"]}
        for x in lines
        if "val_loss" in x
    ]
    last = steps[curve[-1]["step"]]
    return {
        "end": curve[-1],
        "tokens": last["tokens"],
        "val_tokens": next(x["val_tokens"] for x in lines if "val_tokens" in x),
        "parameters": counted.total,
        "parameters_active": counted.active,
        "curve": curve,
    }


def main() -> None:
    """Runs both, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--target", type=float, default=1.92)
    parser.add_argument("--repeats", type=int, default=1, help="runs of ours")
    parser.add_argument("--only", choices=["ours", "baseline"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, object] = {"target": asked.target}
    text = asked.text.resolve()
    if asked.only != "baseline":
        result["ours"] = [ours(text) for _ in range(asked.repeats)]
        for run in result["ours"]:
            print(f"ours: {run['end']}, {run['tokens']:,} tokens, {run['parameters']:,} parameters")
    if asked.only != "ours":
        result["baseline"] = nanogpt_baseline.train(text.read_text(), asked.target)
        print(f"baseline: reached {result['baseline']['reached']}, end {result['baseline']['end']}")
    if asked.out:
        write_json(asked.out, {**result, **facts()})


if __name__ == "__main__":
    main()
