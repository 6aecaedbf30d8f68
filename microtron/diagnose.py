"""Which tensors went bad: run once, when a step's loss or gradient is not finite."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from microtron.errors import UserError
from microtron.model.init import plain_name


class NonFinite(UserError):
    """A step produced NaN or infinity; the run stops and writes nothing of it."""


def _bad(tensor: torch.Tensor | None) -> bool:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor is not None and not bool(torch.isfinite(tensor).all())


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def non_finite(
    parts: list[nn.Module], step: int, loss: float, forward: Callable[[], object]
) -> NonFinite:
    """The error to raise on every rank: the step, the rank where it began, and the offending
    weights, gradients and first bad activation. All ranks call it.

    Args:
        parts: the model, or this rank's stages of it.
        loss: this rank's part of the loss.
        forward: runs the step's last micro-batch again, to find the first module whose output is
            bad.
    """
    named = [(plain_name(n), p) for part in parts for n, p in part.named_parameters()]
    weights = [n for n, p in named if _bad(p)]
    gradients = [n for n, p in named if _bad(p.grad)]
    first: list[str] = []
    hooks = [
        m.register_forward_hook(_watch(plain_name(n), first))
        for part in parts
        for n, m in part.named_modules()
        if n and not list(m.children())
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    told = [f"loss {loss}"]
    told += [f"weights {_some(weights)}"] if weights else []
    told += [f"first bad output of {first[0]}"] if first else []
    told += [f"gradients {_some(gradients)}"] if gradients else []
    order = (_depth(first[0]) if first else 1e9, math.isfinite(loss), dist.get_rank())
    reports: list[tuple] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (order, "; ".join(told)))
    (*_, rank), worst = min(reports)
    where = f" on rank {rank}" if len(reports) > 1 else ""
    return NonFinite(
        f"step {step} is not finite{where} ({worst}). Nothing of it was saved; resume from the "
        "last checkpoint with a lower optimizer.lr, a longer warm-up or a smaller training.max_norm"
    )


def _depth(name: str) -> float:
    """Where in the model a module stands, so that the first bad one of all ranks can be told."""
    parts = name.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return -1 if parts[0] in ("tok_embeddings", "rope") else 1e6


def _watch(name: str, first: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        leaves = output if isinstance(output, tuple) else (output,)
        if not first and any(
            isinstance(t, torch.Tensor) and t.is_floating_point() and _bad(t) for t in leaves
        ):
            first.append(name)

    return hook
