"""What a CPU computes by other means, against torch's plain expressions: values and gradients."""

import pytest
import torch
from helpers import build_random, grads_of, rel, tiny_args, tokens_of
from torch import nn

from microtron.kernels import apply_kernels
from microtron.model import cpu_pointwise, cpu_product, head, mlp, norms, rope
from microtron.model.args import ModelArgs
from microtron.model.attention_core import eager
from microtron.model.cpu_attention import cpu_attention
from microtron.model.cpu_product import Linear, inner, product
from microtron.model.masks import dense_mask


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    """Both libraries, whatever this processor has (without AVX-512 oneDNN is slower, not wrong)."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(cpu_product, "has_onednn", lambda: request.param)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(plain, other, leaves, tolerance=1e-5):
    """The results of two functions of the same leaves, and the gradients of both."""
    results = []
    for function in (plain, other):
        copies = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in leaves]
        outs = function(*copies)
        outs = outs if isinstance(outs, tuple) else (outs,)
        upstream = [seeded(*out.shape, seed=7).to(out.dtype) for out in outs]
        wanted = [x for x in copies if x.requires_grad]
        results.append([*outs, *torch.autograd.grad(outs, wanted, upstream)])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert rel(actual, expected) < tolerance


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_product_of_any_layout(library, rows):
    a, b, bias = seeded(rows, 12), seeded(12, 20), seeded(20)
    torch.testing.assert_close(product(a, b, bias), a @ b + bias)
    torch.testing.assert_close(product(a.t().contiguous().t(), b), a @ b)
    torch.testing.assert_close(product(a, b.t().contiguous().t()), a @ b)
    torch.testing.assert_close(product(seeded(rows, 24)[:, :12], b), seeded(rows, 24)[:, :12] @ b)


@pytest.mark.parametrize("widths", [(12, 20), (20, 12), (12, 12)])
def test_inner_product_copies_either_side(library, widths):
    a, b = seeded(33, widths[0]), seeded(33, widths[1], seed=1)
    torch.testing.assert_close(inner(a, b), a.t() @ b)


def test_products_go_to_onednn(monkeypatch):
    """fp32 on a CPU, and nothing else."""
    monkeypatch.setattr(cpu_product, "has_onednn", lambda: True)
    taken = []
    monkeypatch.setattr(
        cpu_product.torch.ops.mkldnn,
        "_linear_pointwise",
        lambda a, b, *_: taken.append(a.dtype) or a @ b.t(),
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        product(torch.ones(2, 3, dtype=dtype), torch.ones(3, 4, dtype=dtype))
    assert taken == [torch.float32]


def test_a_build_without_onednn(monkeypatch):
    assert all(op.namespace == "mkldnn" for op in cpu_product.onednn_operators())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(cpu_product.torch.ops, "mkldnn", None)  # nothing is registered there
    assert cpu_product.onednn_operators() == set()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 12), (7, 12), (12,), (0, 12)])
def test_linear_layer(library, shape, bias):
    layer = Linear(12, 20, bias=bias)
    leaves = [seeded(*shape), *layer.parameters()]

    def plain(x, *parameters):
        return nn.functional.linear(x, *parameters)

    def ours(x, *parameters):
        values = dict(zip(("weight", "bias"), parameters, strict=False))
        return torch.func.functional_call(layer, values, (x,))

    compare(plain, ours, leaves)


def test_linear_layer_with_a_frozen_side(library):
    layer = Linear(12, 20)
    layer.weight.requires_grad_(False)
    x = seeded(4, 12).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 12))
    assert layer.weight.grad is None
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(20, 12))


@pytest.mark.parametrize("sizes", [(12, 20), (20, 12)])
def test_gradients_lie_as_their_weights(library, sizes):
    """Pipeline schedules that split the backward hand them to fused AdamW as they are."""
    layer = Linear(*sizes)
    weight = (layer.weight,)
    (grad,) = torch.autograd.grad(layer(seeded(4, sizes[0])).square().sum(), weight)
    assert grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    x, weight = 3 * seeded(2, 5, 24).to(dtype), 1 + seeded(24, seed=1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    compare(
        lambda *given: norms.rms_norm(*given, 1e-5),
        lambda *given: cpu_pointwise.rms_norm(*given, 1e-5),
        [x, weight],
        tolerance,
    )


def test_norm_of_zeros_is_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    cpu_pointwise.rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(dtype):
    table = rope.RotaryEmbedding(ModelArgs(head_dim=8, rope_factor=4.0))
    table.init_weights()
    cos, sin = table(torch.arange(6).unsqueeze(0))
    leaves = [seeded(2, 6, 4, 8).to(dtype), seeded(2, 6, 2, 8, seed=1).to(dtype)]
    compare(
        lambda q, k: rope.rotate_both(q, k, cos, sin),
        lambda q, k: cpu_pointwise.rotate_both(q, k, cos, sin),
        leaves,
        1e-6 if dtype == torch.float32 else 1e-2,
    )


@pytest.mark.parametrize("limit", [1.0, 50.0], ids=["clamped", "free"])
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 700, 8)])
def test_swiglu(monkeypatch, shape, limit):
    """In rows of one part and of three; with values out of bounds and without."""
    monkeypatch.setattr(cpu_pointwise, "PART", 1000)
    leaves = [2 * seeded(*shape)]
    assert (leaves[0].abs().max() > 1) and leaves[0].abs().max() < 50
    compare(
        lambda x: mlp.swiglu(x, 1.702, limit),
        lambda x: cpu_pointwise.swiglu(x, 1.702, limit),
        leaves,
    )


@pytest.mark.parametrize("x", [[7.0, 1.0, 2.0, 7.0], [1.0, -7.0], [-7.0, 2.0], []], ids=str)
def test_swiglu_at_its_bounds_and_of_no_rows(x):
    """bf16 meets a bound exactly now and then; an expert in a loop may have no rows."""
    compare(
        lambda x: mlp.swiglu(x, 1.702, 7.0),
        lambda x: cpu_pointwise.swiglu(x, 1.702, 7.0),
        [torch.tensor(x).view(-1, 2)],
    )


@pytest.mark.parametrize("cap, z", [(0.0, 0.0), (3.0, 0.0), (0.0, 0.1), (3.0, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_a_chunk(dtype, cap, z):
    """Large logits too, whose exponentials alone would overflow; -100 is no target."""
    logits, labels = 100 * seeded(9, 30), torch.randint(30, (9,))
    labels[[0, 4]] = head.IGNORE
    for need in (True, False):
        expected = head.chunk_loss(logits.to(dtype), labels, cap, z, need)
        actual = cpu_pointwise.chunk_loss(logits.to(dtype).clone(), labels, cap, z, need)
        torch.testing.assert_close(actual[0], expected[0])
        assert (actual[1] is None) == (not need)
        if need:
            torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [20, 200])
def test_attention_in_bf16_is_as_near_the_truth_as_eager(window):
    shapes = [(2, 150, h, 16) for h in (4, 2, 2)]
    exact = [seeded(*s, seed=i) for i, s in enumerate(shapes)]
    sinks, mask = seeded(4, seed=5), dense_mask(150, window, None, torch.device("cpu"))

    def results(body, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        out = body(*leaves)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    def slow(q, k, v):
        return eager(q, k, v, sinks, mask, 0.25)

    def fast(q, k, v):
        return cpu_attention(q, k, v, sinks, window, 0.25)

    rounded = [x.bfloat16().float() for x in exact]
    exact[:] = rounded
    truth = results(slow, torch.float32)
    for true, near, ours in zip(
        truth, results(slow, torch.bfloat16), results(fast, torch.bfloat16), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert rel(ours.float(), true) < 1.5 * rel(near.float(), true) < 3e-2


def test_a_model_gets_them_all():
    """`auto` on a CPU, and the whole model computes what it did."""
    model = build_random(tiny_args(norm_eps=1e-5))
    tokens = tokens_of(model.model_args)

    def step():
        model.zero_grad()
        loss = model(tokens, labels=tokens.roll(-1, 1))
        loss.backward()
        return [loss.detach(), *grads_of(model).values()]

    plain = step()
    apply_kernels(model, {}, "cpu")
    block = model.layers["0"]
    bodies = [block.attention_norm.norm, block.attention.inner_attention.rotate]
    bodies += [model.output.chunk_loss, block.moe.experts.swiglu]
    assert {body.__module__ for body in bodies} == {cpu_pointwise.__name__}
    for expected, actual in zip(plain, step(), strict=True):
        assert rel(actual, expected) < 1e-5
