"""The run's optimizer: Adam or AdamW over the table of `groups.py`, expert balancing hooked before
its step.
"""

from collections.abc import Callable
from typing import Any

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
        implementation = {
            "fused": {"fused": True},
            "foreach": {"foreach": True},
            "for-loop": {"foreach": False},  # left open, torch chooses foreach on CUDA
        }
        options = {
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            **implementation[config.implementation],
        }
        groups = [
            parameter_groups(part, config.lr, config.weight_decay, config.decay_embeddings)
            for part in model_parts
        ]
        self.optimizers = [ALGORITHMS[config.name](g, **options) for g in groups]
        self._validate_length(len(model_parts))
        self._post_init([p for part in model_parts for p in part.parameters()], options)

    def state_dict(self) -> dict[str, Any]:
        """Steps and moments by parameter, without the options: those are this run's own.

        torch flattens the options of a group (rate, betas, ...) into an entry for each parameter,
        and DCP makes an archive of each: most of a save's time where the model is small.
        """
        return {k: v for k, v in super().state_dict().items() if not _is_option(k)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes steps and moments; options that older steps carry are not looked at."""
        own = {k: v for k, v in super().state_dict().items() if _is_option(k)}
        super().load_state_dict({**state_dict, **own})


def _is_option(key: str) -> bool:
    return key.startswith("param_groups.")


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
    # Data, context and (the sequence is cut) tensor parallel ranks route different tokens.
    optimizers.balance = ExpertBalance(
        model_parts, _sum_over(parallel_dims, "loss", "tp"), _sum_over(parallel_dims, "pp")
    )
    return optimizers


def _sum_over(dims: ParallelDims, *names: str) -> Callable[[torch.Tensor], None] | None:
    """All-reduce over the meshes that this run has; None: it has none of them."""
    groups = [m.get_group() for m in map(dims.get_optional_mesh, names) if m is not None]

    def reduce(counts: torch.Tensor) -> None:
        for group in groups:
            dist.all_reduce(counts, group=group)

    return reduce if groups else None
