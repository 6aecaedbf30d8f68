"""Matrix products on a CPU, each by the library that is fastest at it.

torch gives fp32 products to MKL, which takes its AVX2 kernels on processors that are not Intel's;
oneDNN, which torch brings too, takes whatever the processor has: on an AMD EPYC with AVX-512 twice
as fast (`benchmarks/gemm.py`). It makes a kernel for each new shape, so rows that vary from step to
step are better rounded up (`cpu_experts.py`). bf16 products go to oneDNN by themselves.
"""

import functools

import torch
from torch import nn


@functools.cache
def has_onednn() -> bool:
    """Whether fp32 products go to oneDNN: where it is built in and the processor has AVX-512."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available()


def onednn_operators() -> set[object]:
    """What `product` runs there, for checkpointing to know; empty where torch lacks it."""
    name = "_linear_pointwise"
    operators = torch.ops.mkldnn
    return {getattr(operators, name).default} if hasattr(operators, name) else set()


def _by_onednn(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():  # which chooses for itself
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and has_onednn()


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b + bias`` without gradient: a [M, K], b [K, N], bias [N] or None -> [M, N].

    A transposed ``a`` is copied by oneDNN, a transposed ``b`` is read as it lies.
    """
    if _by_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return a @ b if bias is None else torch.addmm(bias, a, b)


def product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out = a @ b`` likewise, in the dtype of ``out`` [M, N]."""
    if _by_onednn(a) or out.dtype != a.dtype:
        out.copy_(product(a, b))
    else:
        torch.mm(a, b, out=out)


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a.t() @ b`` without gradient: a [N, M], b [N, K] -> [M, K]."""
    if _by_onednn(a) and b.shape[1] < a.shape[1]:
        return product(b.t(), a).t()  # copies the narrower
    return product(a.t(), b)


class _Linear(torch.autograd.Function):
    """``x @ weight.t() + bias``: x [N, in], weight [out, in], bias [out] or None -> [N, out]."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        dx = product(grad, weight) if need_x else None
        # As the weight lies: zero bubble's schedules make this the gradient without a look at it.
        dw = inner(grad, x).contiguous() if need_weight else None
        return dx, dw, grad.sum(0) if ctx.biased else None


class Linear(nn.Linear):
    """nn.Linear whose fp32 products on a CPU are `product`: x [..., in] -> [..., out]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if torch.is_autocast_enabled("cpu") or not _by_onednn(x):
            return super().forward(x)
        out = _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return out.view(*x.shape[:-1], self.weight.shape[0])
