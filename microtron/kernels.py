"""Which body computes norms, rotations, SwiGLU and the loss: ``[kernels]`` in a run's TOML.

* ``torch``: the plain functions of `model/`, the truth.
* ``cpu``: `model/cpu_pointwise.py`, few passes over memory, for a CPU.
* ``compile``: the same function, compiled by itself. Where whole blocks are compiled
  (``compile.enable``) that happens anyway, and this choice is left for what lies outside of them:
  the last norm, the loss, and with expert parallel the experts.
* ``liger``: Triton kernels of Liger-Kernel (arXiv:2410.10989), CUDA only.
* ``auto``: the fastest that was measured (`AUTO`).

A choice is no part of the architecture: a checkpoint knows nothing of it, and a run may go on with
another. Modules hold the function that they call, and `apply_kernels` puts another there.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from microtron.model import cpu_pointwise
from microtron.model.attention import InnerAttention
from microtron.model.experts import Experts
from microtron.model.head import IGNORE, Head, chunk_loss
from microtron.model.mlp import FeedForward, deinterleave, swiglu
from microtron.model.norms import LayerNorm, RMSNorm, rms_norm
from microtron.model.rope import rotate_both

KERNELS = ("norm", "rope", "swiglu", "loss")
# (device, kernel) -> what `auto` means there: the fastest forward and backward in
# benchmarks/results/kernels_*.json among `DEPENDABLE`; a test holds the two together.
AUTO: dict[tuple[str, str], str] = {
    ("cpu", "norm"): "cpu",
    ("cpu", "rope"): "cpu",
    ("cpu", "swiglu"): "cpu",
    ("cpu", "loss"): "cpu",
    ("cuda", "norm"): "torch",  # no GPU has measured yet
    ("cuda", "rope"): "torch",
    ("cuda", "swiglu"): "torch",
    ("cuda", "loss"): "torch",
}
# What `auto` may choose from. On a CPU compiling needs a C++ compiler and makes every start slower
# by more than a short run can gain; Liger is an optional package.
DEPENDABLE = {"cpu": ("torch", "cpu"), "cuda": ("torch", "compile")}

# The bodies of `cpu`; what has none stays as it is.
BY_HAND: dict[Callable, Callable] = {
    rms_norm: cpu_pointwise.rms_norm,
    rotate_both: cpu_pointwise.rotate_both,
    swiglu: cpu_pointwise.swiglu,
    chunk_loss: cpu_pointwise.chunk_loss,
}


def settle(asked: Mapping[str, str], device_type: str) -> dict[str, str]:
    """The choice for each of `KERNELS`, with ``auto`` (also: not told) replaced."""
    chosen = {}
    for kernel in KERNELS:
        choice = asked.get(kernel, "auto")
        chosen[kernel] = AUTO.get((device_type, kernel), "torch") if choice == "auto" else choice
    return chosen


def apply_kernels(
    model: nn.Module,
    asked: Mapping[str, str],
    device_type: str,
    blocks_compiled: bool = False,
    experts_apart: bool = False,
) -> None:
    """Gives every module of ``model`` the body that was asked for.

    Args:
        model: a Transformer or a stage of one; tensor parallel must have been applied, since a head
            that holds a part of the vocabulary keeps its own loss.
        asked: kernel -> auto, torch, cpu, compile or liger.
        blocks_compiled: ``model.layers`` will be compiled whole,
        experts_apart: but for their experts.
    """
    chosen = settle(asked, device_type)
    inside = {id(m) for m in model.layers.modules()} if blocks_compiled else set()
    if experts_apart:
        inside -= {id(m) for m in model.layers.modules() if isinstance(m, Experts)}
    for module in model.modules():
        for kernel, attribute in _sites(module):
            choice = chosen[kernel]
            if choice == "cpu" and id(module) not in inside:
                body = getattr(module, attribute)
                setattr(module, attribute, BY_HAND.get(body, body))
            elif choice == "liger":
                setattr(module, *_liger(module, attribute))
            elif choice == "compile" and id(module) not in inside:
                setattr(module, attribute, compiled(getattr(module, attribute)))


def _sites(module: nn.Module) -> list[tuple[str, str]]:
    """(kernel, attribute that holds its body) of one module."""
    if isinstance(module, (RMSNorm, LayerNorm)):
        return [("norm", "norm")]
    if isinstance(module, InnerAttention):
        return [("rope", "rotate")]
    if isinstance(module, (Experts, FeedForward)):
        return [("swiglu", "swiglu")]
    if isinstance(module, Head) and module.chunk_loss is chunk_loss:
        return [("loss", "chunk_loss")]
    return []


@functools.cache
def compiled(function: Callable) -> Callable:
    """``function`` compiled by itself, once for all modules that share it.

    It has no graph break (tested). It is not called `fullgraph`, since a run that samples and
    validates shows it many shapes, and past the compiler's limit of those `fullgraph` ends the run
    where this goes on uncompiled.
    """
    return torch.compile(function)


def _liger(module: nn.Module, attribute: str) -> tuple[str, Callable]:
    """(attribute, Liger's body for it). `check.py` has refused what Liger does not have."""
    if isinstance(module, LayerNorm):
        return attribute, module.norm
    if isinstance(module, Head):
        return "fused_loss", liger_loss
    bodies = {"norm": liger_norm, "rotate": liger_rotate, "swiglu": liger_swiglu}
    return attribute, bodies[attribute]


def liger_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`norms.rms_norm` by Liger; "gemma" names its way of computing all of it in fp32."""
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: the gradient that comes in may belong to others too.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


def liger_rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope.rotate_both` by Liger, which wants [B, H, S, D] and reads the tables' first halves.

    It writes over its inputs, behind autograd's back: these are copied, or selective checkpointing
    would hand out projections that are rotated already.
    """
    from liger_kernel.ops import LigerRopeFunction

    q, k = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k))
    # The first half of sin carries the minus that Liger writes itself.
    q, k = LigerRopeFunction.apply(q, k, cos.squeeze(2), -sin.squeeze(2))
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`mlp.plain_swiglu` by Liger. (It has no clamps: gpt-oss's stays with torch.)"""
    from liger_kernel.ops import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(*deinterleave(gate_up))


def liger_loss(
    h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float, z: float
) -> torch.Tensor:
    """`head.full_loss` by Liger's fused linear cross-entropy, which makes its own chunks.

    h [N, dim], weight [V, dim], labels [N] -> summed loss, fp32. The host waits twice for the
    device: Liger counts the targets, and compares the incoming gradient with 1.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    options = {
        "bias": None,
        "ce_weight": None,
        "ignore_index": IGNORE,
        "lse_square_scale": z,
        "label_smoothing": 0.0,
        "reduction": "sum",
        "softcap": cap or None,
        "return_z_loss": False,
        "accum_dtype": torch.float32,  # else chunks are summed in bf16
    }  # in the order of its parameters: autograd functions take no names
    return LigerFusedLinearCrossEntropyFunction.apply(h, weight, labels, *options.values())[0]
