"""The gradient norm of a spread model, and clipping by it.

Parameters lie on meshes of different shapes (experts on one, the rest on another), which torch's
own norm refuses to mix. Here each part is squared where it lies, in fp32, and summed over just
those ranks among which its parameter is cut.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut_over(parameter: nn.Parameter) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose ranks hold different parts of a parameter."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


@torch.no_grad()
def grad_norm(
    parameters: list[nn.Parameter], pipeline: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """L2 norm of all gradients of the run: fp32 scalar, the same on every rank; no host sync.

    Args:
        pipeline: the group of this rank's pipeline, whose stages hold different parameters.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_groups.setdefault(_cut_over(parameter), []).append(_local(parameter.grad))
    device = next(iter(parameters)).device
    total = torch.zeros((), dtype=torch.float32, device=device)
    # Every rank of a stage has the same kinds of parameters, so the order of collectives agrees.
    for groups, grads in by_groups.items():
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum().to(device)
        for group in groups:
            dist.all_reduce(square, group=group)
        total += square
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    return total.sqrt()


@torch.no_grad()
def clip(parameters: list[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scales all gradients by ``max_norm / norm`` where that is below 1.

    Under a norm that is not finite they stay as they are, for whoever looks for the cause.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(torch.isfinite(norm), factor, 1.0)
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, factor.to(grads[0].device))
