"""How many CPU threads torch should use, by a short probe. It needs no TorchTitan, whose import
takes commands that only infer seconds.
"""

import os
import time

import torch


def pick_threads(ranks_here: int = 1) -> str:
    """Sets torch's CPU threads to the fastest count of a short probe; returns what it did, in
    words.

    OMP_NUM_THREADS wins where it is set. On small virtual machines two OpenMP threads can be ten
    times slower than one (their spin-waits fight for the core); on real ones many are better.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        count = torch.get_num_threads()
        return f"{count} CPU thread{'s' * (count > 1)} (OMP_NUM_THREADS)"
    available = max(1, len(os.sched_getaffinity(0)) // ranks_here)
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= available]
    seconds = {}
    for count in counts:
        torch.set_num_threads(count)
        seconds[count] = _probe()
        if seconds[count] > 2 * min(seconds.values()):
            break
    # More threads must pay clearly: the second one competes with the data thread and other users.
    best = min(n for n in seconds if seconds[n] < 1.2 * min(seconds.values()))
    torch.set_num_threads(best)
    table = ", ".join(f"{n}: {1e3 * s:.0f} ms" for n, s in seconds.items())
    return f"{best} CPU thread{'s' if best > 1 else ''} (probe {table}; OMP_NUM_THREADS overrides)"


def _probe() -> float:
    """Seconds for the kind of work a small model does: many middling operations, best of 3."""
    x, w = torch.randn(2048, 128), torch.randn(128, 384)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(8):
            torch.sigmoid(x @ w).sum(-1)
        best = min(best, time.perf_counter() - start)
    return best
