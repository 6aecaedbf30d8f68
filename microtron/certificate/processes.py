"""The ranks of the certificate: processes of this machine, started once for each number of ranks.

They are forked from a server that has imported torch already, so that a start costs a second, and
run one layout after the other. When one rank fails, its layout has failed and the rest go on in new
processes.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from microtron.certificate.layouts import Case
from microtron.certificate.verdict import TOLERANCE, verdict

PRELOAD = ["microtron.certificate.ranks", "torch.distributed.checkpoint", "tomli_w"]
PATIENCE_S = 180
Row = dict[str, Any]
Sabotage = Mapping[str, Callable[[], AbstractContextManager[object]]]


def run_all(
    cases: list[Case],
    folder: Path,
    report: Callable[[Row], None],
    sabotage: Sabotage | None = None,
    patience_s: float = PATIENCE_S,
) -> None:
    """One process for each run, to have the truth; then the cases, by number of ranks.

    Args:
        folder: keeps the truths: a second call with the same folder finds them there.
        report: called with a row as each is known: layout, ranks, seconds, verdict, worst, missing,
            traceback ("" where nothing was raised), and the errors (see `verdict.compare`).
        sabotage: case -> a context to build and run it in; tests break a plan to see it caught.
        patience_s: a layout that is silent for so long has failed.

    Raises:
        RuntimeError: a single process failed.
    """
    failure = _group("truths", 1, cases, folder, {}, patience_s, report)
    if failure is not None:
        raise RuntimeError(
            f"the single process failed: {failure['verdict']}\n{failure['traceback']}"
        )
    for ranks in sorted({c.ranks for c in cases}):
        left = {c.name: c for c in cases if c.ranks == ranks}

        def take(row: Row, left: dict[str, Case] = left) -> None:
            del left[row["layout"]]
            report(row)

        while left:
            todo = list(left.values())
            failure = _group("cases", ranks, todo, folder, sabotage or {}, patience_s, take)
            if left:  # the next one took the processes with it; the others get new ones
                name = next(iter(left))
                take({"layout": name, "ranks": ranks, **(failure or _failed("ended early"))})


def _failed(why: str, told: str = "") -> Row:
    nothing = dict.fromkeys(TOLERANCE, float("nan"))
    about = {"worst": {}, "missing": [], "seconds": 0.0, "traceback": told}
    return {**nothing, **about, "verdict": " ".join(why.split())}


def _group(
    job: str,
    ranks: int,
    cases: list[Case],
    folder: Path,
    sabotage: Sabotage,
    patience_s: float,
    report: Callable[[Row], None],
) -> Row | None:
    """Runs cases in processes of their own until all are done (None) or a rank fails (how)."""
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
    try:
        for process in processes:
            process.start()
        last = time.monotonic()
        while True:
            over = not any(p.is_alive() for p in processes)  # asked before the results are
            if not results.empty():
                row = results.get()
                if "layout" not in row:
                    time.sleep(0.2)  # what one rank tells may follow from another's silent end
                    return _killed(processes, folder) or row
                report(row)
                last = time.monotonic()
                continue
            killed = _killed(processes, folder)
            if killed is not None or over:
                return killed
            if time.monotonic() > last + patience_s:
                why = f"nothing was heard for {patience_s:g} s"
                return _failed(why, _where(processes, folder))
            time.sleep(0.01)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _killed(processes: list[Any], folder: Path) -> Row | None:
    """A rank that ended before it could say why."""
    for rank, process in enumerate(processes):
        if process.exitcode:
            why = f"rank {rank} ended with exit code {process.exitcode}"
            return _failed(why, _tail(folder, rank) or why)
    return None


def _where(processes: list[Any], folder: Path) -> str:
    """Where each rank is."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"rank {r}:\n{_tail(folder, r)}" for r in range(len(processes)))


def _tail(folder: Path, rank: int) -> str:
    """The end of what a rank and its libraries said; nothing where it died before."""
    log = folder / f"rank{rank}.log"
    return log.read_text(errors="replace")[-8000:] if log.is_file() else ""


def _rank(
    job: str,
    rank: int,
    ranks: int,
    port: int,
    cases: list[Case],
    folder: Path,
    results: Any,
    sabotage: Sabotage,
) -> None:
    """The main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)
    os.environ.update(  # what a launcher says
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )

    def report(case: Case, result: dict[str, object]) -> None:
        row = {"layout": case.name, "ranks": case.ranks, "traceback": "", **result}
        results.put({**row, "verdict": verdict(row)})

    try:
        import torch

        torch.set_num_threads(1)
        from microtron.certificate.ranks import make_truths, run_cases

        if job == "truths":
            make_truths(cases, folder)
        else:
            run_cases(cases, folder, report, sabotage)
    except BaseException as error:
        results.put(_failed(f"rank {rank}: {_told(error)}", traceback.format_exc()))
    sys.stdout.flush()
    os._exit(0)  # process groups of many layouts are not worth an orderly end


def _told(error: BaseException) -> str:
    """The error, and the last place of ours that it passed, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/microtron/" in f.filename]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}{place}: {first[:200]}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
