"""What every benchmark shares: the facts of the machine, interleaved timing, and the JSON file."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def facts() -> dict[str, object]:
    """Device, threads and versions, for the JSON."""
    from microtron.accelerator import DEVICE_TYPE, cpu_name

    import torch

    from microtron import __version__

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    device = torch.cuda.get_device_name() if DEVICE_TYPE == "cuda" else cpu_name()
    versions = {"microtron": __version__, "python": platform.python_version()}
    for name in ("torch", "torchtitan", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": commit,
    }


def interleave(
    candidates: dict[str, Callable[[], None]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, candidates taking turns so that a slow minute hits them all."""
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(path: Path, results: dict[str, object]) -> None:
    """Writes one benchmark's results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
