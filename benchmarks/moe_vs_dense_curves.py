"""Loss curves of moe_vs_dense.py: their mean over seeds, where two of them cross, the picture."""

from pathlib import Path
from typing import Any

import numpy as np

AXES = {"seconds": "training seconds", "flops": "training FLOPs", "tokens": "tokens"}
POINTS = 400  # of the common grid
COLOURS = {"moe": "tab:blue", "dense": "tab:orange", "dense_longer": "tab:orange"}
LABELS = {"moe": "mixture of experts", "dense": "dense twin", "dense_longer": "dense twin"}

Runs = list[dict[str, Any]]


def on_grid(runs: Runs, axis: str, grid: np.ndarray) -> np.ndarray:
    """Validation losses [run, point] of the runs, interpolated to ``grid`` along ``axis``."""
    return np.stack(
        [
            np.interp(grid, [p[axis] for p in run["curve"]], [p["val_loss"] for p in run["curve"]])
            for run in runs
        ]
    )


def common_range(runs: Runs, axis: str) -> tuple[float, float]:
    """The part of ``axis`` that every run has measured."""
    first = max(run["curve"][0][axis] for run in runs)
    return first, min(run["curve"][-1][axis] for run in runs)


def crossover(grid: np.ndarray, one: np.ndarray, other: np.ndarray) -> float | None:
    """Where ``one`` gets below ``other`` for good, between two points by a straight line.

    ``grid[0]`` when it is below from the start, None when it is not below at the end.
    """
    gap = one - other
    above = np.flatnonzero(gap >= 0)
    if not len(above):
        return float(grid[0])
    last = int(above[-1])
    if last == len(grid) - 1:
        return None
    share = gap[last] / (gap[last] - gap[last + 1])
    return float(grid[last] + share * (grid[last + 1] - grid[last]))


def compare(moe: Runs, dense: Runs, axis: str) -> dict[str, Any]:
    """Who is below at the end of the common range of ``axis``, since when, and by how much.

    ``crossover`` is None where the winner was below all along; ``gap`` is the loss of the dense
    twin less the mixture's, of the mean curves at the end of the range.
    """
    low, high = common_range(moe + dense, axis)
    grid = np.linspace(low, high, POINTS)
    means = {"moe": on_grid(moe, axis, grid).mean(0), "dense": on_grid(dense, axis, grid).mean(0)}
    gap = float(means["dense"][-1] - means["moe"][-1])
    winner, loser = ("moe", "dense") if gap > 0 else ("dense", "moe")
    since = crossover(grid, means[winner], means[loser]) if gap else None
    return {
        "from": low,
        "to": high,
        "below_at_the_end": winner if gap else None,
        "crossover": None if since == low else since,
        "gap": gap,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Two panels, loss against seconds and against FLOPs: mean over seeds, band from least to most,
    the crossover of the twins as a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2), ("seconds", "flops"), strict=True)
    for panel, axis in panels:
        for arm in ("moe", "dense_longer" if axis == "seconds" else "dense"):
            runs = [run for run in result["runs"] if run["arm"] == arm]
            grid = np.linspace(*common_range(runs, axis), POINTS)
            losses = on_grid(runs, axis, grid)
            panel.plot(grid, losses.mean(0), color=COLOURS[arm], label=LABELS[arm])
            panel.fill_between(grid, losses.min(0), losses.max(0), color=COLOURS[arm], alpha=0.25)
        found = result["compared"][axis]
        if found["crossover"] is not None:
            panel.axvline(found["crossover"], color="grey", linestyle=":")
        panel.set_title(told(found, axis), fontsize=9)
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("validation loss (nats a byte)")
        panel.legend()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def told(found: dict[str, Any], axis: str) -> str:
    """One line about a comparison along ``axis``."""
    winner = LABELS.get(found["below_at_the_end"], "neither")
    unit = {"seconds": " s", "flops": " FLOPs", "tokens": " tokens"}[axis]
    if found["crossover"] is None:
        return f"no crossover: {winner} below throughout, at the end by {abs(found['gap']):.3f}"
    return (
        f"crossover at {found['crossover']:.3g}{unit}, from there {winner} below, at the end "
        f"by {abs(found['gap']):.3f}"
    )
