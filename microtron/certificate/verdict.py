"""What is compared, how, and when it agrees."""

from collections.abc import Iterable

import torch

# Relative to the norm of what one process got; gradients and weights parameter by parameter.
TOLERANCE = {"loss": 1e-6, "norm": 1e-5, "grads": 1e-4, "weights": 1e-4}


def distance(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Norm of the difference over the norm of what is expected; infinite where one is not there,
    has another shape or is not finite.
    """
    if actual is None or expected is None or actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()
    return _no_nan(((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item())


def compare(ours: dict[str, object], truth: dict[str, object]) -> dict[str, object]:
    """Largest relative errors of what a rank knows.

    Args:
        ours, truth: ``steps``, of each its ``loss``, ``norm`` and ``grads``; and ``weights``.

    Returns:
        loss, norm, grads, weights: the errors; a gradient that is not there is off by infinity;
        ``worst``: where each of them is; ``parameters``: the names compared.
    """
    errors: dict[str, object] = dict.fromkeys(TOLERANCE, 0.0)
    worst = dict.fromkeys(TOLERANCE, "")

    def take(kind: str, value: float, where: str) -> None:
        if value >= errors[kind]:
            errors[kind], worst[kind] = value, where

    known = ours["weights"].keys()
    for step, (mine, right) in enumerate(zip(ours["steps"], truth["steps"], strict=True), 1):
        for kind in ("loss", "norm"):
            take(kind, _no_nan(abs(mine[kind] - right[kind]) / abs(right[kind])), f"step {step}")
        for name in mine["grads"].keys() | (known & right["grads"].keys()):
            value = distance(mine["grads"].get(name), right["grads"].get(name))
            take("grads", value, f"{name} at step {step}")
    for name in known:
        take("weights", distance(ours["weights"][name], truth["weights"].get(name)), name)
    return {**errors, "worst": worst, "parameters": sorted(known)}


def worst_of(results: Iterable[dict[str, object]]) -> dict[str, object]:
    """The largest errors of all ranks, and the parameters that any of them compared."""
    results = list(results)
    whole: dict[str, object] = {"worst": {}}
    for kind in TOLERANCE:
        result = max(results, key=lambda r: r[kind])
        whole[kind], whole["worst"][kind] = result[kind], result["worst"][kind]
    whole["parameters"] = sorted({name for r in results for name in r["parameters"]})
    return whole


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
