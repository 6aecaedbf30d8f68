"""`microtron certify`: every layout against one process.

    microtron certify                     all layouts on this machine's CPU (up to 8 ranks)
    microtron certify --world-size 2      those that take at most 2 ranks
    microtron certify --only tp2 pp2      those whose names begin so

One process trains a small model for three steps and keeps its seed checkpoint. Then the same run is
spread over every layout, in fp32 on gloo ranks, from that checkpoint: loss, gradient norm, every
parameter's gradient at every step and every weight after the last are compared. The exit code is 0
only when every layout agrees.
"""

import json
import math
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtron.certificate.layouts import Case, all_cases
from microtron.certificate.processes import Row, run_all
from microtron.certificate.verdict import TOLERANCE
from microtron.errors import UserError

COLUMNS = ("loss", "norm", "grads", "weights")


def certify(
    world_size: Annotated[int, tyro.conf.arg(help="Ranks that a layout may take at most.")] = 8,
    only: Annotated[
        tuple[str, ...], tyro.conf.arg(help="Beginnings of names; none: all layouts.")
    ] = (),
    out: Annotated[Path | None, tyro.conf.arg(help="File for the same table as JSON.")] = None,
    list_: Annotated[bool, tyro.conf.arg(name="list", help="Show the layouts and stop.")] = False,
) -> int:
    """Trains a small model in one process, then on every parallel layout, and compares.

    Each layout runs the real Trainer for three steps in fp32, on as many processes of this machine
    as it has ranks (gloo, one thread each). What is shown are the largest relative errors of the
    loss, of the gradient norm, and of any parameter's gradient and weight. All layouts take some
    minutes. The exit code is 0 only when every one agrees.

    Raises:
        UserError: no layout is left to certify, or ``out`` cannot be written.
    """
    cases, late = _chosen(world_size, only)
    width = max(len(c.name) for c in cases)
    if list_:
        print("\n".join(f"{c.name:<{width}}  {c.ranks}" for c in cases))
        return 0
    if out is not None:
        _claim(out)
    start = time.perf_counter()
    print(f"{'layout':<{width}}  ranks  " + "".join(f"{c:>8}  " for c in COLUMNS) + "seconds")
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        numbers = "".join(f"{row[k]:8.1e}  " for k in COLUMNS)
        print(
            f"{row['layout']:<{width}}  {row['ranks']:5}  {numbers}{row['seconds']:7.1f}  "
            f"{row['verdict']}",
            flush=True,
        )

    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        run_all(cases, Path(folder), report)
    for row in rows:
        if row["traceback"]:
            print(f"\n--- {row['layout']} ---\n{row['traceback']}", file=sys.stderr)
    agree = sum(row["verdict"] == "agrees" for row in rows)
    seconds = time.perf_counter() - start
    tolerances = ", ".join(f"{kind} {most:g}" for kind, most in TOLERANCE.items())
    print(
        f"{agree} of {len(cases)} layouts agree with one process ({seconds:.0f} s; tolerance "
        f"relative to the norm: {tolerances})"
    )
    if late:
        print(f"left out, with schedules that this torch cannot run: {', '.join(late)}")
    if out is not None:
        _write(out, rows, seconds)
    return 0 if agree == len(cases) else 1


def runnable() -> list[Case]:
    """The layouts that the torch which is installed can run."""
    version = tuple(int(part) for part in metadata.version("torch").split(".")[:2])
    return [c for c in all_cases() if c.needs_torch <= version]


def _chosen(world_size: int, only: tuple[str, ...]) -> tuple[list[Case], list[str]]:
    """The cases that are asked for, and the names of those that this torch cannot run."""
    every, remedy = all_cases(), "`microtron certify --list` shows them all"
    for name in only:
        if not any(c.name.startswith(name) for c in every):
            raise UserError(f"--only {name!r}: no layout's name begins so; {remedy}")
    named = [c for c in every if not only or c.name.startswith(only)]
    asked = [c for c in named if c.ranks <= world_size]
    if not asked:
        least = min(c.ranks for c in named)
        raise UserError(
            f"--world-size {world_size} leaves no layout: give {least} or more; {remedy}"
        )
    able = runnable()
    cases, late = [c for c in asked if c in able], [c.name for c in asked if c not in able]
    if not cases:
        version = metadata.version("torch")
        raise UserError(f"torch {version} cannot run {', '.join(late)}: install a newer one")
    return cases, late


def _claim(path: Path) -> None:
    """Finds out now, not minutes later, that a file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be written ({error.strerror}): choose another file"
        ) from None


def _write(path: Path, rows: list[Row], seconds: float) -> None:
    import platform

    from microtron.accelerator import cpu_name

    import torch

    from microtron import __version__

    kept = ("layout", "ranks", *COLUMNS, "worst", "missing", "seconds", "verdict")
    told = {
        "what": "largest relative error against one process, fp32, gloo, 3 steps",
        "tolerance": TOLERANCE,
        "machine": {
            "device": cpu_name(),
            "microtron": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seconds": round(seconds, 1),
        "layouts": [{k: _plain(row[k]) for k in kept} for row in rows],
    }
    path.write_text(json.dumps(told, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
