"""The mixture of experts against the slow reference; grouped against loop; counting."""

import functools

import pytest
import torch
from helpers import assert_same_grads, build_random, grads_of, randomise, rel, tiny_args, tokens_of
from reference.loop_moe import expert, gated, moe
from torch.utils.checkpoint import checkpoint

from microtron.model import cpu_experts
from microtron.model.experts import Experts
from microtron.model.mlp import FeedForward, swiglu
from microtron.model.moe import MoE


def build_moe(seed=0, **overrides):
    layer = randomise(MoE(tiny_args(**overrides)), seed)
    layer.init_buffers()
    return layer


def inputs(n_tokens=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n_tokens, 40, generator=generator).requires_grad_()


def weights_of(layer):
    experts, gate = layer.experts, layer.router.gate
    return (
        gate.weight,
        gate.bias,
        experts.gate_up,
        experts.gate_up_bias,
        experts.down,
        experts.down_bias,
    )


@pytest.mark.parametrize("experts_backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_against_reference(top_k, experts_backend):
    layer = build_moe(top_k=top_k, experts_backend=experts_backend, swiglu_limit=1.5)
    x = inputs()
    expected, expected_counts = moe(x[0], *weights_of(layer), top_k, limit=1.5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    leaves = [x, *weights_of(layer)]
    truth = torch.autograd.grad(expected, leaves, upstream)
    out, counts = layer(x)
    assert counts.tolist() == expected_counts
    assert rel(out[0], expected) < 1e-5
    for ours, theirs in zip(torch.autograd.grad(out[0], leaves, upstream), truth, strict=True):
        assert rel(ours, theirs) < 1e-4 or theirs.norm() < 1e-4 > ours.norm()


def test_swiglu_clamps_and_interleaves():
    row = torch.tensor([-9.0, -9.0, 9.0, 9.0, 0.5, -0.5, 7.0, -7.5, 3.0, 7.5])
    torch.testing.assert_close(swiglu(row, 1.702, 7.0), gated(row))
    gate_up = torch.tensor([9.0, -0.25])
    assert swiglu(gate_up, 1.702, 7.0).item() == pytest.approx(7.0 * 0.75, rel=1e-4)


def test_dense_feed_forward_is_one_expert():
    layer = randomise(FeedForward(tiny_args(num_experts=0)))
    x = inputs()[0]
    rows = [
        expert(
            token,
            layer.gate_up.weight.t(),
            layer.gate_up.bias,
            layer.down.weight.t(),
            layer.down.bias,
        )
        for token in x
    ]
    assert rel(layer(x), torch.stack(rows)) < 1e-5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(
    "counts", [[5, 0, 3, 1], [0, 9, 0, 0], [0, 0, 0, 0]], ids=["ragged", "one_expert", "no_token"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grouped_against_loop(dtype, counts, bias):
    results = {}
    rows = sum(counts)
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    for backend in ("loop", "grouped_mm"):
        layer = randomise(Experts(tiny_args(experts_backend=backend, mlp_bias=bias))).to(dtype)
        leaf = x.clone().requires_grad_()
        out = layer(leaf, torch.tensor(counts))
        out.float().square().sum().backward()
        results[backend] = {"out": out, "x": leaf.grad, **grads_of(layer)}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, expected in results["loop"].items():
        actual = results["grouped_mm"][name]
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert rel(actual, expected) < tolerance or expected.norm() == 0 == actual.norm(), name
    for name in ("gate_up", "down"):
        for e, count in enumerate(counts):
            grad = results["grouped_mm"][name][e]
            assert (grad.norm() > 0) == (count > 0), f"{name} of expert {e}"


INDEX = [2, 0, 5, 5, 1, 3, 4, 0, 2]  # rows of 9 to tokens of 6: some twice


def operands(width=5, dim=6, grad=True):
    """x, index, scale, gate_up, its bias, down, its bias, counts, alpha, limit of the operator."""
    shapes = [(6, dim), (9,), (4, dim, 2 * width), (4, 2 * width), (4, width, dim), (4, dim)]
    generator = torch.Generator().manual_seed(3)
    x, *leaves = [torch.randn(s, generator=generator).requires_grad_(grad) for s in shapes]
    return [x, torch.tensor(INDEX), *leaves, torch.tensor([5, 0, 3, 1]), 1.702, 1.0]


def gradients_of(arguments):
    return [x.grad for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


def backward_operands(grad=None):
    x, index, scale, gate_up, _, down, down_bias, counts, alpha, limit = operands(grad=False)
    hidden = torch.ops.microtron.experts(*operands(grad=False))[1]
    grad = torch.randn_like(x) if grad is None else grad
    return grad, x, index, scale, gate_up, down, down_bias, counts, hidden, alpha, limit


def test_operator_obeys_torchs_rules():
    """Schema, autograd registration, fake tensors and tracing with dynamic shapes."""
    torch.library.opcheck(torch.ops.microtron.experts, operands())
    torch.library.opcheck(torch.ops.microtron.experts_backward, backward_operands())


def test_operator_takes_strided_gradients():
    """The backward of a sum hands over an expanded tensor, of a transpose a transposed one."""
    for layout in (lambda y: y.sum(), lambda y: (y.t() * torch.arange(6.0)).sum()):
        grads = []
        for wrap in (lambda y: y, lambda y: y.clone(memory_format=torch.contiguous_format) * 1.0):
            arguments = operands()
            layout(wrap(torch.ops.microtron.experts(*arguments)[0])).backward()
            grads.append(gradients_of(arguments))
        for strided, plain in zip(*grads, strict=True):
            torch.testing.assert_close(strided, plain)


def plain_experts(x, index, scale, gate_up, gate_up_bias, down, down_bias, counts, alpha, limit):
    """What the operator computes, row by row."""
    out = torch.zeros_like(x)
    for row, which in enumerate(torch.arange(4).repeat_interleave(counts)):
        hidden = x[index[row]] @ gate_up[which] + gate_up_bias[which]
        made = swiglu(hidden, alpha, limit) @ down[which] + down_bias[which]
        out = out.index_add(0, index[row : row + 1], scale[row] * made.unsqueeze(0))
    return out


@pytest.mark.parametrize("limit", [1.0, 50.0], ids=["clamped", "free"])
@pytest.mark.parametrize("rows, step", [(1024, 64), (1, 1), (2, 1), (4, 3), (100, 1)])
def test_operator_row_by_row(monkeypatch, rows, step, limit):
    """In chunks of any size, with rows left over; clamped values have no gradient."""
    monkeypatch.setattr(cpu_experts, "_ROWS", rows)
    monkeypatch.setattr(cpu_experts, "_STEP", step)
    results = []
    for body in (plain_experts, lambda *given: torch.ops.microtron.experts(*given)[0]):
        arguments = [*operands()[:-1], limit]
        out = body(*arguments)
        out.square().sum().backward()
        results.append([out, *gradients_of(arguments)])
    assert len(results[0]) == 7
    for expected, actual in zip(*results, strict=True):
        assert rel(actual, expected) < 1e-5
    hidden = backward_operands()[8]
    assert (hidden > 1).any() and (hidden < -1).any()  # with a limit of 1 the clamps are in play


def test_operator_without_rows():
    """No token at all, and experts that get none."""
    arguments = operands()
    arguments[1], arguments[2] = arguments[1][:0], torch.empty(0, requires_grad=True)
    arguments[7] = torch.zeros(4, dtype=torch.int64)
    torch.ops.microtron.experts(*arguments)[0].sum().backward()
    assert all(grad.norm() == 0 for grad in gradients_of(arguments))


def test_rows_are_rounded_up_and_none_is_lost():
    for counts in ([5, 0, 3, 1], [1, 1600, 0, 2049], [64, 63, 65, 1024]):
        seen = []
        for which, parts, size in cpu_experts._by_expert(torch.tensor(counts)):
            assert size % cpu_experts._STEP == 0
            assert all(part.stop - part.start <= size for part in parts)
            rows = [row for part in parts for row in range(part.start, part.stop)]
            assert len(rows) == counts[which]
            seen += rows
        assert seen == list(range(sum(counts)))


def test_scores_multiply_the_down_bias_too():
    """Experts that say nothing but their bias: the output is the weighted mean of the biases."""
    layer = build_moe(top_k=2)
    with torch.no_grad():
        layer.experts.down.zero_()
    x = inputs()
    logits = layer.router.gate(x[0])
    top, chosen = logits.topk(2)
    expected = (top.softmax(-1).unsqueeze(-1) * layer.experts.down_bias[chosen]).sum(1)
    torch.testing.assert_close(layer(x)[0][0], expected)


def test_weights_are_a_softmax_over_the_chosen_logits():
    layer = build_moe(top_k=2)
    x = inputs()[0]
    weights, experts, _ = layer.router(x, None, layer.load_fractions, None)
    chosen = layer.router.gate(x).gather(-1, experts)
    torch.testing.assert_close(weights, chosen.softmax(-1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))


def test_selection_bias_moves_the_choice_and_not_the_weights():
    layer = build_moe(load_balance="bias", top_k=2)
    x = inputs()
    free = layer.router(x[0], layer.expert_bias, layer.load_fractions, None)
    layer.expert_bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    forced = layer.router(x[0], layer.expert_bias, layer.load_fractions, None)
    assert forced.counts[1] == 9 and free.counts[1] < 9
    chosen = layer.router.gate(x[0]).gather(-1, forced.experts)
    torch.testing.assert_close(forced.weights, chosen.softmax(-1))
    expected, counts = moe(x[0], *weights_of(layer), 2, layer.expert_bias)
    out, actual_counts = layer(x)
    assert rel(out[0], expected) < 1e-5 and actual_counts.tolist() == counts


def test_the_bias_exists_in_bias_mode_alone():
    assert build_moe(load_balance="aux_loss").expert_bias is None
    layer = build_moe(load_balance="bias")
    assert set(layer.state_dict()) >= {"expert_bias", "load_fractions"}
    assert "tokens_per_expert" not in layer.state_dict()
    assert not layer.expert_bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["autocast", "fp32"])
def test_router_works_in_fp32(dtype):
    layer = build_moe()
    x = inputs()[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        routing = layer.router(x, None, layer.load_fractions, None)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(
        routing.weights, layer.router(x, None, layer.load_fractions, None).weights
    )


def counted(model):
    return [layer.moe.tokens_per_expert.clone() for layer in model.layers.values()]


def test_counts_are_every_slot_of_every_forward():
    args = tiny_args(top_k=3)
    model, tokens = build_random(args), tokens_of(args)
    model(tokens)
    first = counted(model)
    assert all(counts.sum() == tokens.numel() * 3 for counts in first)
    model(tokens)
    assert all(torch.equal(b, 2 * a) for a, b in zip(first, counted(model), strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved_tensors"])
def test_checkpointing_counts_once_and_changes_no_gradient(reentrant):
    args = tiny_args(load_balance="aux_loss", aux_loss_coef=5.0, router_z_loss_coef=0.5)
    tokens = tokens_of(args)
    results = []
    for recompute in (False, True):
        model = build_random(args)
        if recompute:
            for layer in model.layers.values():
                layer.forward = functools.partial(
                    checkpoint, layer.forward, use_reentrant=reentrant
                )
        model(tokens, labels=tokens.roll(-1, 1)).backward()
        results.append((counted(model), grads_of(model)))
    (plain_counts, plain), (counts, recomputed) = results
    assert all(torch.equal(a, b) for a, b in zip(plain_counts, counts, strict=True))
    assert_same_grads(recomputed, plain, 1e-6)


def test_nothing_is_counted_outside_training():
    args = tiny_args()
    model, tokens = build_random(args), tokens_of(args)
    with torch.no_grad():
        model(tokens)
    model.eval()
    model(tokens)
    assert all(counts.sum() == 0 for counts in counted(model))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "blocked"])
def test_a_compiled_block_takes_other_batches_and_lengths(backend):
    """The compiler then has symbols for sizes, with which not all arithmetic works."""
    torch._dynamo.reset()
    model = build_random(tiny_args(attn_backend=backend, experts_backend="grouped_mm"))
    shapes = [(2, 16), (3, 16), (3, 24), (5, 32)]
    tokens = [tokens_of(model.model_args, batch=b, seq_len=s) for b, s in shapes]
    expected = [float(model(t, labels=t)) for t in tokens]
    for layer in model.layers.values():
        layer.compile(backend="aot_eager", fullgraph=True)
    assert [float(model(t, labels=t)) for t in tokens] == pytest.approx(expected, rel=1e-5)


def test_block_compiles_without_a_graph_break():
    """The operator is one opaque call, so changing counts neither break nor recompile the graph."""
    args = tiny_args(attn_backend="sdpa", experts_backend="grouped_mm", load_balance="aux_loss")
    results = []
    for compiled in (False, True):
        model = build_random(args)
        if compiled:
            for layer in model.layers.values():
                layer.compile(backend="aot_eager", fullgraph=True)
        for seed in range(2):
            model(tokens_of(args, seed=seed), labels=tokens_of(args, seed=seed + 9)).backward()
        results.append((counted(model), grads_of(model)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert_same_grads(results[1][1], results[0][1], 1e-5)
