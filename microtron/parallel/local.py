"""Parameters are DTensors, forwards are plain torch: the joint between the two.

A spread parameter is one DTensor to the optimizer, to checkpoints and to FSDP2. While a module's
forward runs, its parameters are replaced by this rank's parts, so model code computes on ordinary
tensors, custom operators work, and compiled blocks contain nothing of DTensor.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.nn.utils.stateless import _reparametrize_module


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Replaces one parameter of a module by a DTensor; nothing is sent. None stays None."""
    parameter = getattr(module, name)
    if parameter is not None:
        spread = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(spread))


def own_positions(table: nn.Embedding, group: dist.ProcessGroup) -> None:
    """Lets a table of positions look up this rank's part of the sequence alone: [B or 1, S] in,
    [B or 1, S/n, dim] out. The group told last cuts first: its parts are cut by those before.
    """

    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return args[0].chunk(group.size(), dim=-1)[group.rank()]

    table.register_forward_pre_hook(hook, prepend=True)


def with_local_parameters(
    module: nn.Module, scale: dict[str, float] | None = None, skip: str = ""
) -> None:
    """Lets ``module.forward`` see its parameters, and its children's, as this rank's parts.

    Args:
        scale: factors for parameters that every rank adds although the sum should have them once.
        skip: parameters whose names start so stay as they are (a child has its own joint).
    """
    forward, factors = module.forward, scale or {}

    def run(*args: object, **kwargs: object) -> object:
        parts: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters():
            if isinstance(parameter, DTensor) and not (skip and name.startswith(skip)):
                part = parameter.to_local()
                factor = factors.get(name, 1)
                parts[name] = part if factor == 1 else part * factor
        with _reparametrize_module(module, parts):
            return forward(*args, **kwargs)

    module.forward = run
