"""The experts of a layer, applied to tokens that are already sorted by expert.

``loop`` is the truth: one expert after the other, plain autograd, one host sync for the counts.
``grouped_mm`` answers to it: on CUDA torch's grouped GEMM (`grouped.py`), which reads the counts on
the device; on CPU the operator of `cpu_experts.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.cpu_experts import cpu_experts
from microtron.model.grouped import grouped_linear
from microtron.model.mlp import swiglu
from microtron.model.precision import compute_dtype


class Experts(nn.Module):
    """E feed-forwards; weights are [E, in, out], so that ``x @ w`` needs no transposition."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        experts, dim, width = args.num_experts, args.dim, args.expert_dim
        self.alpha, self.limit = args.swiglu_alpha, args.swiglu_limit
        self.swiglu = swiglu  # [kernels] may put another body here
        self.backend = "grouped_mm" if args.grouped_experts else "loop"
        self.gate_up = nn.Parameter(torch.empty(experts, dim, 2 * width))
        self.down = nn.Parameter(torch.empty(experts, width, dim))
        bias = args.mlp_bias
        self.gate_up_bias = nn.Parameter(torch.empty(experts, 2 * width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, dim)) if bias else None

    def permutes(self, x: torch.Tensor) -> bool:
        """Whether forward also takes rows from tokens and adds them up by itself."""
        return self.backend == "grouped_mm" and x.device.type == "cpu"

    def forward(
        self,
        x: torch.Tensor,
        counts: torch.Tensor,
        index: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, dim], the first counts[0] rows for expert 0 and so on; counts [E] -> [M, dim].

        With ``index`` and ``scale`` [M] (see `permutes`) x are tokens [N, dim], as in cpu_experts.
        """
        x = x.to(compute_dtype(x))
        weights = [
            w if w is None else w.to(x.dtype)
            for w in (self.gate_up, self.gate_up_bias, self.down, self.down_bias)
        ]
        if self.permutes(x):
            return cpu_experts(x, weights, counts, self.alpha, self.limit, index, scale)
        linear = grouped_linear
        if self.backend == "loop":
            linear, counts = _loop_linear, counts.tolist()
        hidden = self.swiglu(linear(x, *weights[:2], counts), self.alpha, self.limit)
        return linear(hidden, *weights[2:], counts)


def _loop_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: list[int]
) -> torch.Tensor:
    """``x[rows of e] @ weight[e] + bias[e]``: x [M, in], weight [E, in, out] -> [M, out]."""
    rows = x.split(counts)
    biases = [None] * len(rows) if bias is None else bias.unbind(0)
    outs = [F.linear(r, w.t(), b) for r, w, b in zip(rows, weight.unbind(0), biases, strict=True)]
    return torch.cat(outs)
