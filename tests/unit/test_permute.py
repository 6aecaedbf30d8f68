"""Rows to experts and back against plain indexing; the bias of the grouped layer."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import rel, tiny_args
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from microtron.model.experts import Experts
from microtron.model.grouped import grouped_linear
from microtron.model.moe import dispatch
from microtron.model.permute import by_expert, combine, take
from microtron.model.router import Routing

SHAPES = pytest.mark.parametrize("k", [1, 2, 3])


def inputs(k, dtype=torch.float32, n=7, experts=5, dim=6):
    """tokens [N, dim], the experts of each [N, k], routing weights [N, k] fp32."""
    generator = torch.Generator().manual_seed(k)
    tokens = torch.randn(n, dim, generator=generator).to(dtype).requires_grad_()
    chosen = torch.rand(n, experts, generator=generator).topk(k).indices
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(n, k, generator=generator).to(wide).requires_grad_()
    return tokens, chosen, weights


def through(tokens, chosen, weights):
    """There, squared on the way (so that each row matters by itself), and back."""
    order, slots = by_expert(chosen)
    return combine(take(tokens, order, slots).square(), order, slots, weights)


@SHAPES
def test_gradients_are_those_of_finite_differences(k):
    tokens, chosen, weights = inputs(k, torch.float64)
    assert torch.autograd.gradcheck(lambda t, w: through(t, chosen, w), (tokens, weights))


@pytest.mark.parametrize("k, compiled", [(1, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_against_plain_indexing(k, compiled, dtype):
    """Compiled takes the expressions that CUDA takes."""
    tokens, chosen, weights = inputs(k, dtype)
    run = torch.compile(through, backend="aot_eager", fullgraph=True) if compiled else through
    out = run(tokens, chosen, weights)
    assert out.dtype == dtype
    t, w = (x.detach().double().requires_grad_() for x in (tokens, weights))
    expected = (t.unsqueeze(1).square() * w.unsqueeze(-1)).sum(1)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).double()
    ours = torch.autograd.grad(out, (tokens, weights), upstream.to(dtype))
    truth = torch.autograd.grad(expected, (t, w), upstream)
    for actual, wanted in zip((out, *ours), (expected, *truth), strict=True):
        assert rel(actual, wanted) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_rows_lie_by_expert_and_in_the_order_of_their_tokens():
    chosen = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order, slots = by_expert(chosen)
    assert order.tolist() == [1, 2, 3, 5, 0, 4]
    assert chosen.reshape(-1)[order].tolist() == [0, 0, 1, 1, 2, 2]
    assert slots.tolist() == [[4, 0], [1, 2], [5, 3]]


@pytest.mark.parametrize("rows", [6, 0])
def test_a_permutation_and_its_inverse(rows):
    order, places = by_expert(torch.arange(rows).flip(0).unsqueeze(1))
    x = torch.randn(rows, 3, requires_grad=True)
    there = take(x, order, places)
    assert torch.equal(there, x.flip(0))
    back = take(there, places[:, 0], order.unsqueeze(1))
    assert torch.equal(back, x)
    (back * torch.arange(3.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(3.0).expand(rows, 3))


class Ops(TorchDispatchMode):
    """Which operators run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


# What CUDA does by atomic additions of floats.
ATOMIC = {
    "index_add",
    "index_add_",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "scatter_add",
    "scatter_add_",
    "embedding_dense_backward",
    "_embedding_bag_backward",
    "_embedding_bag_dense_backward",
}


def on_meta(compiled):
    """One trip in bf16 with grouped products and biases, as CUDA takes it."""
    with torch.device("meta"):
        tokens = torch.empty(16, 32, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(4, 32, 32, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(4, 32, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.empty(16, 2, requires_grad=True)
        chosen = torch.zeros(16, 2, dtype=torch.int64)
        counts = torch.zeros(4, dtype=torch.int64)

    def trip(tokens, weight, bias, weights):
        order, slots = by_expert(chosen)
        rows = grouped_linear(take(tokens, order, slots), weight, bias, counts)
        return combine(rows, order, slots, weights)

    leaves, seen = (tokens, weight, bias, weights), set()
    if compiled:

        def compiler(graph, inputs):
            seen.update(getattr(n.target, "_opname", "") for n in graph.graph.nodes)
            return make_boxed_func(graph)

        backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
        torch.compile(trip, backend=backend, fullgraph=True)(*leaves).float().sum().backward()
    else:
        with Ops() as ops:
            trip(*leaves).float().square().sum().backward()
        seen = ops.seen
    assert all(x.grad is not None for x in leaves) and "_grouped_mm" in seen
    return seen


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_is_added_by_atomics(compiled):
    assert not on_meta(compiled) & ATOMIC


@pytest.mark.parametrize("counts", [[5, 0, 3, 1], [0, 0, 9, 0]], ids=["ragged", "one_expert"])
def test_bias_of_each_group(monkeypatch, counts):
    """In fp32, with the products left out: the bias's gradient is the sum of its rows."""
    monkeypatch.setattr(F, "grouped_mm", lambda x, weight, offs: x * 1.0)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(9, 3, generator=generator), torch.randn(4, 3, generator=generator)
    x.requires_grad_(), bias.requires_grad_()
    out = grouped_linear(x, torch.empty(4, 3, 3), bias, torch.tensor(counts))
    expert = torch.arange(4).repeat_interleave(torch.tensor(counts))
    torch.testing.assert_close(out, x + bias[expert])
    upstream = torch.randn(9, 3, generator=generator)
    out.backward(upstream)
    expected = torch.stack([upstream[expert == e].sum(0) for e in range(4)])
    torch.testing.assert_close(bias.grad, expected)
    torch.testing.assert_close(x.grad, upstream)


class Recorded(Experts):
    """Experts that remember in what precision rows came."""

    def forward(self, x, counts, *more):
        self.seen = x.dtype
        return super().forward(x, counts, *more)


def test_rows_are_rounded_before_there_are_k_of_each():
    """Under autocast a token is cast once, not each of its rows."""
    args = tiny_args(experts_backend="loop")
    tokens, chosen, weights = inputs(2, experts=4, dim=40)
    experts = Recorded(args)
    counts = chosen.reshape(-1).bincount(minlength=4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = dispatch(tokens, Routing(weights, chosen, counts), experts)
    assert experts.seen == mixed.dtype == torch.bfloat16


@pytest.mark.gpu
def test_the_same_bits_again_on_cuda():
    """Forward and gradients twice, large enough that atomics would show."""
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"device": "cuda", "generator": generator}
    leaves = [
        torch.randn(4096, 256, **like).bfloat16(),
        torch.randn(8, 256, 256, **like).bfloat16(),
        torch.randn(8, 256, **like).bfloat16(),
        torch.rand(4096, 4, **like),
    ]
    chosen = torch.rand(4096, 8, **like).topk(4).indices
    counts = chosen.reshape(-1).bincount(minlength=8)
    order, slots = by_expert(chosen)
    results = []
    for _ in range(2):
        tokens, weight, bias, weights = (x.clone().requires_grad_() for x in leaves)
        rows = grouped_linear(take(tokens, order, slots), weight, bias, counts)
        out = combine(rows, order, slots, weights)
        out.float().square().sum().backward()
        results.append([out, tokens.grad, weight.grad, bias.grad, weights.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
