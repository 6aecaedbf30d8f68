"""`microtron certify`: every layout against one process.

    microtron certify                     all layouts on this machine's CPU (up to 8 ranks)
    microtron certify --world-size 2      those that take at most 2 ranks
    microtron certify --only tp2 pp2      those whose names begin so

One process trains a small model for three steps and keeps its seed checkpoint. Then the same run is
spread over every layout, in fp32 on gloo ranks, from that checkpoint: loss, gradient norm, every
parameter's gradient at every step and every weight after the last are compared. Ranks start once
for each world size. The exit code is 0 only when every layout agrees.
"""

import json
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtron.certificate.layouts import CASES, Case
from microtron.errors import UserError

# Relative to the norm of what one process got, parameter by parameter.
TOLERANCE = {"loss": 1e-6, "norm": 1e-5, "grads": 1e-4, "weights": 1e-4}
PRELOAD = ["microtron.certificate.ranks", "torch.distributed.checkpoint", "tomli_w"]
PATIENCE_S = 600
DEBUG = bool(os.environ.get("CERT_DEBUG"))


def certify(
    world_size: Annotated[int, tyro.conf.arg(help="Ranks at most.")] = 8,
    only: Annotated[
        tuple[str, ...], tyro.conf.arg(help="Layouts whose names begin with one of these.")
    ] = (),
    out: Annotated[
        Path | None, tyro.conf.arg(help="Where to write the table as JSON.")
    ] = None,
) -> int:
    """Compares every parallel layout with one process: loss, gradients, weights.

    Raises:
        UserError: no layout is left to certify.
    """
    cases = [c for c in CASES if c.ranks <= world_size and (not only or c.name.startswith(only))]
    if not cases:
        raise UserError(
            f"--world-size {world_size} and --only {' '.join(only) or '(all)'} leave no layout: "
            f"choose from {', '.join(c.name for c in CASES)}"
        )
    start = time.perf_counter()
    width = max(len(c.name) for c in cases)
    print(f"{'layout':<{width}}  ranks      loss     grads   weights  seconds")
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        numbers = "  ".join(f"{row[k]:8.1e}" for k in ("loss", "grads", "weights"))
        print(
            f"{row['layout']:<{width}}  {row['ranks']:5}  {numbers}  {row['seconds']:7.1f}  "
            f"{row['verdict']}",
            flush=True,
        )

    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        run_all(cases, Path(folder), report)
    bad = [row for row in rows if row["verdict"] != "agrees"]
    seconds = time.perf_counter() - start
    print(
        f"{len(rows) - len(bad)} of {len(cases)} layouts agree with one process "
        f"({seconds:.0f} s; tolerances relative to the norm: loss {TOLERANCE['loss']:g}, gradients "
        f"{TOLERANCE['grads']:g}, weights {TOLERANCE['weights']:g})"
    )
    if out is not None:
        _write(out, rows, seconds)
    return 0 if not bad and len(rows) == len(cases) else 1


def verdict(result: dict[str, Any]) -> str:
    """``agrees``, or where and by how much it does not."""
    wrong = [
        f"{kind} off by {result[kind]:.1e} ({result['worst'][kind]})"
        for kind, most in TOLERANCE.items()
        if not result[kind] <= most
    ]
    if result["missing"]:
        wrong.append(f"never compared: {', '.join(result['missing'][:3])}")
    return "; ".join(wrong) or "agrees"


def run_all(
    cases: list[Case],
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    sabotage: Callable[[], Any] | None = None,
) -> None:
    """Truths first, in one process; then the cases, one group of processes for each world size.

    Args:
        report: called with a row (layout, ranks, loss, norm, grads, weights, worst, seconds,
            verdict) as each is known.
        sabotage: see `run_cases`.
    """
    crash = _group("truths", 1, cases, folder, None, lambda row: None)
    if crash:
        raise RuntimeError(f"the single process failed: {crash}")
    for ranks in sorted({c.ranks for c in cases}):
        left = {c.name: c for c in cases if c.ranks == ranks}

        def take(row: dict[str, Any], left: dict[str, Case] = left) -> None:
            del left[row["layout"]]
            report(row)

        while left:
            crash = _group("cases", ranks, list(left.values()), folder, sabotage, take)
            if left:  # the next one took the processes with it; the others get new ones
                take(_failed(next(iter(left.values())), crash or "ended without a result"))


def _group(
    job: str,
    ranks: int,
    cases: list[Case],
    folder: Path,
    sabotage: Callable[[], Any] | None,
    report: Callable[[dict[str, Any]], None],
) -> str:
    """Runs cases in processes of their own until all are done or one rank fails: why, or ""."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [
        context.Process(
            target=_rank, args=(job, rank, ranks, port, cases, folder, results, sabotage)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE_S
    why = ""
    while not why:
        if not results.empty():
            row = results.get()
            end = time.monotonic() + PATIENCE_S
            if isinstance(row, str):
                why = row
            else:
                report(row)
        elif not any(p.is_alive() for p in processes):
            break
        elif time.monotonic() > end:
            why = f"nothing for {PATIENCE_S} s"
        else:
            time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return why


def _failed(case: Case, why: str) -> dict[str, Any]:
    nothing = {"loss": float("nan"), "norm": float("nan"), "grads": float("nan")}
    row = {"layout": case.name, "ranks": case.ranks, "seconds": 0.0, "verdict": why, "worst": {}}
    return {**row, **nothing, "weights": float("nan")}


def _rank(
    job: str,
    rank: int,
    ranks: int,
    port: int,
    cases: list[Case],
    folder: Path,
    results: Any,
    sabotage: Callable[[], Any] | None,
) -> None:
    """The main function of a process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    from microtron.certificate.ranks import make_truth, run_cases, truth_folder

    def report(case: Case, result: dict[str, Any]) -> None:
        row = {"layout": case.name, "ranks": case.ranks, **result}
        results.put({**row, "verdict": verdict(row)})

    try:
        if job == "truths":
            for case in {truth_folder(c, folder): c for c in cases}.values():
                make_truth(case, folder)
        else:
            run_cases(cases, folder, report, sabotage)
    except BaseException as error:
        (folder / f"rank{rank}.err").write_text(traceback.format_exc())
        if DEBUG:
            traceback.print_exc()
        told = str(error).strip().splitlines() or [""]
        results.put(f"{type(error).__name__} on rank {rank}: {told[-1][:200]}")
        os._exit(1)
    os._exit(0)  # process groups of many layouts are not worth an orderly end


def _write(path: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    import platform

    import torch

    from microtron import __version__
    from microtron.accelerator import cpu_name

    kept = ("layout", "ranks", "loss", "norm", "grads", "weights", "seconds", "verdict")
    about = {
        "device": cpu_name(),
        "microtron": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    told = {
        "what": "largest relative error against one process, fp32, gloo, 3 steps",
        "tolerance": TOLERANCE,
        "machine": about,
        "seconds": round(seconds, 1),
        "layouts": [{k: row[k] for k in kept} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")
