"""What a newcomer waits for: ./run_train.sh once more in a new folder, installed, timed from
outside.

    python benchmarks/first_run.py --out benchmarks/results/first_run.json

Seconds from the command to the first step's line and to the end, the bits-per-byte it ends with,
and the share of the time that loading data took. The corpus is prepared anew, as on the first call.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from common import facts, write_json

ROOT = Path(__file__).resolve().parent.parent


def one_run(folder: Path, options: list[str]) -> dict[str, float]:
    """Starts the run, reads its console, then its metrics."""
    command = [
        str(ROOT / "run_train.sh"),
        f"--job.dump_folder={folder / 'run'}",
        f"--data.dirs={folder / 'data'}",
        *options,
    ]
    began, first = time.perf_counter(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        for line in process.stdout:
            if first is None and line.startswith("step"):
                first = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the run ended with code {process.returncode}")
    lines = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    validated = [x for x in lines if "val_bpb" in x]
    return {
        "first_step_s": first,
        "total_s": time.perf_counter() - began,
        "training_s": steps[-1]["time_s"],
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "loss_first": steps[0]["loss"],
        "val_bpb": validated[-1]["val_bpb"],
        "tokens_per_s": steps[-1]["tokens"] / steps[-1]["time_s"],
        "data_percent_max": max(x["data_percent"] for x in steps[1:]),
    }


def main() -> None:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("options", nargs="*", help="options for run_train.sh, after --")
    asked = parser.parse_args()
    rows = []
    for _ in range(asked.repeats):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one_run(Path(folder), asked.options))
        print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    if asked.out:
        write_json(asked.out, {"rows": rows, **facts()})


if __name__ == "__main__":
    main()
