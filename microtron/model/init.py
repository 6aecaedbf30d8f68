"""Weights at step 0, the same on every layout.

Each parameter draws from a generator of its own, keyed by the seed and the parameter's name, so
neither the order of modules nor the number of ranks nor the device changes a single number. (A
DTensor on CPU has no distributed random state: `normal_` on it gives every rank the same shard.)
"""

import math
import re
import zlib
from collections.abc import Callable

import torch
from torch import nn

# What wrappers for checkpointing and compilation put into a parameter's name.
_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")


def plain_name(name: str) -> str:
    """The parameter's name without the wrappers around its module."""
    return _WRAPPERS.sub("", name)


def normal(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    """fp32 normal(0, std) on CPU from the generator of (seed, name)."""
    # Seed and name in one 32-bit number: torch's CPU generator drops the higher bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def std_of(name: str, shape: torch.Size, args: object) -> float | None:
    """Standard deviation a parameter starts with; 0 means zeros, None means ones.

    Matrices get init_scale / sqrt(fan_in); the two that write to the residual stream are divided by
    sqrt(2 n_layers) (GPT-2); the head starts at 1 / fan_in, so that the loss starts at ln(V). A
    table that is both embedding and head, and one of positions, gets GPT-2's 0.02.
    """
    if name.endswith("bias"):
        return 0.0
    if "norm" in name:
        return None
    if name.endswith("sinks") or name.startswith("pos_embeddings"):
        return 0.02
    if name.startswith("tok_embeddings"):
        return args.embed_std if not args.tie_embeddings else 0.02
    if name.startswith("output"):
        return 1.0 / shape[1]
    fan_in = shape[1]  # Linear is [out, in], experts are [E, in, out]
    std = args.init_scale / math.sqrt(fan_in)
    residual = name.endswith(("wo.weight", "down", "down.weight"))
    return std / math.sqrt(2 * args.n_layers) if residual else std


def init_parameters(
    model: nn.Module,
    args: object,
    seed: int,
    place: Callable[[nn.Parameter, torch.Tensor], None] | None = None,
) -> None:
    """Fills every parameter of the model or of a part of it.

    Args:
        place: writes a full CPU tensor into a parameter that may be spread over ranks; the default
            copies. (`parallel/` hands in the one that knows DTensors.)
    """
    place = place or (lambda parameter, full: parameter.data.copy_(full))
    for raw, parameter in model.named_parameters():
        name = plain_name(raw)
        std = std_of(name, parameter.shape, args)
        if std is None:
            place(parameter, torch.ones(parameter.shape))
        elif std == 0.0:
            place(parameter, torch.zeros(parameter.shape))
        else:
            place(parameter, normal(name, parameter.shape, std, seed))
