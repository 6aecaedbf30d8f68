"""The run's optimizer: Adam or AdamW over the table of `groups.py`, expert balancing hooked before
its step.
"""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims

from microtron import accelerator  # noqa: F401  (before torchtitan)
from microtron.errors import UserError
from microtron.optim.balance import ExpertBalance
from microtron.optim.groups import parameter_groups

ALGORITHMS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


class GroupedOptimizers(OptimizersContainer):
    """TorchTitan's container (one optimizer a model part) with parameter groups of our own."""

    def __init__(self, model_parts: list[nn.Module], config: OptimizerConfig) -> None:
        self.model_parts = model_parts
        implementation = {"fused": {"fused": True}, "foreach": {"foreach": True}}
        options = {
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            **implementation.get(config.implementation, {}),
        }
        groups = [
            parameter_groups(part, config.lr, config.weight_decay, config.decay_embeddings)
            for part in model_parts
        ]
        self.optimizers = [ALGORITHMS[config.name](g, **options) for g in groups]
        self._validate_length(len(model_parts))
        self._post_init([p for part in model_parts for p in part.parameters()], options)


def build_optimizers(
    model_parts: list[nn.Module],
    config: OptimizerConfig,
    parallel_dims: ParallelDims,
    ft_manager: object = None,
) -> GroupedOptimizers:
    """TorchTitan's builder signature. The result carries the run's ExpertBalance as ``balance``.

    Raises:
        UserError: the optimizer in backward was asked for.
    """
    if config.early_step_in_backward:
        raise UserError(
            "optimizer.early_step_in_backward = true cannot work with gradient clipping: "
            "leave it out"
        )
    optimizers = GroupedOptimizers(model_parts, config)
    mesh = parallel_dims.get_optional_mesh("loss")
    reduce = (
        functools.partial(dist.all_reduce, group=mesh.get_group()) if mesh is not None else None
    )
    optimizers.balance = ExpertBalance(model_parts, reduce)
    return optimizers
