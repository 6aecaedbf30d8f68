"""What is compared, how, and when it agrees."""

from collections.abc import Iterable

import torch

# Relative to the norm of what one process got; gradients and weights parameter by parameter.
TOLERANCE = {"loss": 1e-6, "norm": 1e-5, "grads": 1e-4, "weights": 1e-4}
# Gradients below this share of the step's norm are measured as if they were so large: GPT-2's key
# bias has none but rounding (1e-9 of the norm), for it moves no softmax; others have as much.
FAINT = 3e-4


def distance(
    actual: torch.Tensor | None, expected: torch.Tensor | None, least: float = 1e-30
) -> float:
    """Norm of the difference over the norm of what is expected (``least`` or more); infinite where
    one is not there, has another shape or is not finite.
    """
    if actual is None or expected is None or actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()
    return _no_nan(((actual - expected).norm() / expected.norm().clamp(min=least)).item())


def compare(ours: dict[str, object], truth: dict[str, object]) -> dict[str, object]:
    """Largest relative errors of what a rank knows; of the first step that is off where one is,
    for the steps after it are off in consequence.

    Args:
        ours, truth: ``steps``, of each its ``loss``, ``norm`` and ``grads``; and ``weights``.

    Returns:
        loss, norm, grads, weights: the errors; a gradient that is not there is off by infinity;
        ``worst``: where each of them is; ``step``: when; ``parameters``: the names compared.
    """
    found: list[dict[str, object]] = [_error(kind, 0.0) for kind in TOLERANCE]
    known = ours["weights"].keys()
    for step, (mine, right) in enumerate(zip(ours["steps"], truth["steps"], strict=True), 1):
        for kind in ("loss", "norm"):
            value = _no_nan(abs(mine[kind] - right[kind]) / abs(right[kind]))
            found.append(_error(kind, value, f"step {step}", step))
        for name in sorted(mine["grads"].keys() | (known & right["grads"].keys())):
            both = mine["grads"].get(name), right["grads"].get(name)
            value = distance(*both, FAINT * right["norm"])
            found.append(_error("grads", value, f"{name} at step {step}", step))
    for name, weight in ours["weights"].items():
        found.append(_error("weights", distance(weight, truth["weights"].get(name)), name))
    return {**worst_of(found), "parameters": sorted(known)}


def worst_of(results: Iterable[dict[str, object]]) -> dict[str, object]:
    """The errors that count among those of all ranks, and the parameters that any compared."""
    results = list(results)
    whole: dict[str, object] = {"worst": {}, "step": {}}
    for kind, most in TOLERANCE.items():
        here = [r for r in results if kind in r]
        off = [r for r in here if r[kind] > most]
        first = min((r["step"][kind] for r in off), default=0)
        worst = max([r for r in off if r["step"][kind] == first] or here, key=lambda r: r[kind])
        whole[kind] = worst[kind]
        for about in ("worst", "step"):
            whole[about][kind] = worst[about][kind]
    whole["parameters"] = sorted({name for r in results for name in r["parameters"]})
    return whole


def _error(kind: str, value: float, where: str = "", step: int = 0) -> dict[str, object]:
    return {kind: value, "worst": {kind: where}, "step": {kind: step}, "parameters": ()}


def verdict(result: dict[str, object]) -> str:
    """``agrees``, or where and by how much it does not."""
    wrong = [
        f"{kind} off by {result[kind]:.1e} ({result['worst'][kind]})"
        for kind, most in TOLERANCE.items()
        if not result[kind] <= most
    ]
    if result["missing"]:
        wrong.append(f"never compared: {', '.join(result['missing'][:3])}")
    return "; ".join(wrong) or "agrees"


def _no_nan(value: float) -> float:
    return value if value == value else float("inf")
