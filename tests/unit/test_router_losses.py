"""The losses that ride on the routing weights: their value, their gradient, their bookkeeping."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_grads, build_random, grads_of, randomise, rel, tiny_args, tokens_of
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from microtron.model.moe import MoE
from microtron.model.router import AttachLoss, switch_loss

FRACTIONS = torch.tensor([0.1, 0.5, 0.15, 0.25])


def build_moe(**overrides):
    layer = randomise(MoE(tiny_args(**overrides)))
    layer.init_buffers()
    layer.load_fractions.copy_(FRACTIONS)
    return layer


def inputs(n_tokens=24):
    return torch.randn(1, n_tokens, 40, generator=torch.Generator().manual_seed(1))


def fractions_of(logits, top_k):
    """Share of the slots that each expert gets, by counting one by one."""
    chosen = logits.topk(top_k).indices.flatten().tolist()
    return torch.tensor([chosen.count(e) / len(chosen) for e in range(logits.shape[-1])])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_switch_loss_against_transformers(top_k):
    """Their shares sum to top_k over the experts, ours to 1: theirs is top_k times ours."""
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    ours = switch_loss(logits.softmax(-1), fractions_of(logits, top_k), 50)
    torch.testing.assert_close(load_balancing_loss_func((logits,), 8, top_k), top_k * ours)


def test_switch_loss_is_one_at_balance_and_e_at_collapse():
    even = torch.full((12, 4), 0.25)
    assert switch_loss(even, torch.full((4,), 0.25), 12).item() == pytest.approx(1.0)
    alone = torch.eye(4)[:1].expand(12, 4)
    assert switch_loss(alone, torch.eye(4)[0], 12).item() == pytest.approx(4.0)


def test_attach_loss_is_the_identity_and_adds_the_gradient():
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    attached = AttachLoss.apply(x, (x * w).sum())
    assert torch.equal(attached, x)
    actual = torch.autograd.grad((5 * attached).sum(), (x, w))
    expected = torch.autograd.grad((5 * x).sum() + (x * w).sum(), (x, w))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def objective(layer, x, upstream, step_tokens):
    """The loss a careful reader would add up by hand, with the router's losses in it."""
    args = layer.router
    tokens = step_tokens or x.shape[1]
    logits = F.linear(x[0], args.gate.weight, args.gate.bias)
    fractions = FRACTIONS if args.stats_of_step else fractions_of(logits, args.top_k)
    probs = logits.softmax(-1)
    switch = sum(4 * fractions[e] * probs[:, e].sum() / tokens for e in range(4))
    z = sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / tokens
    layer.eval()  # the plain output, nothing attached
    total = (layer(x)[0] * upstream).sum() + args.aux_loss_coef * switch + args.z_loss_coef * z
    layer.train()
    return total


@pytest.mark.parametrize("step_tokens", [None, 96], ids=["forward_tokens", "step_tokens"])
@pytest.mark.parametrize("stats", ["step", "forward"])
@pytest.mark.parametrize("coefs", [(60.0, 0.0), (0.0, 3.0), (60.0, 3.0)], ids=["aux", "z", "both"])
def test_gradient_is_that_of_the_summed_objective(coefs, stats, step_tokens):
    layer = build_moe(
        load_balance="aux_loss",
        aux_loss_coef=coefs[0],
        router_z_loss_coef=coefs[1],
        balance_stats=stats,
    )
    x = inputs().requires_grad_()
    upstream = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(objective(layer, x, upstream, step_tokens), leaves)
    actual = torch.autograd.grad((layer(x, step_tokens)[0] * upstream).sum(), leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        assert rel(ours, theirs) < 1e-5
    plain = build_moe(load_balance="none")
    without = torch.autograd.grad((plain(x)[0] * upstream).sum(), [x, *plain.parameters()])
    assert rel(without[1], expected[1]) > 0.05, "the losses hardly matter: the test is blind"


def test_losses_never_show_in_the_output():
    x = inputs()
    loud = build_moe(load_balance="aux_loss", aux_loss_coef=100.0, router_z_loss_coef=100.0)
    quiet = build_moe(load_balance="none")
    assert torch.equal(loud(x)[0], quiet(x)[0])


@pytest.mark.parametrize("load_balance", ["bias", "none"])
def test_other_modes_have_no_switch_loss(load_balance):
    layer = build_moe(load_balance=load_balance, aux_loss_coef=100.0)
    assert layer.router.aux_loss_coef == 0.0
    x = inputs()
    plain = build_moe(load_balance="none", aux_loss_coef=0.0)
    for module in (layer, plain):
        module(x)[0].square().sum().backward()
    assert_same_grads(grads_of(layer), grads_of(plain), 1e-6)


def test_evaluation_attaches_nothing():
    layer = build_moe(load_balance="aux_loss", aux_loss_coef=100.0).eval()
    plain = build_moe(load_balance="none")
    x = inputs()
    for module in (layer, plain):
        module(x)[0].square().sum().backward()
    assert_same_grads(grads_of(layer), grads_of(plain), 1e-6)


def accumulated(args, tokens, micro_batches):
    """Gradients of one optimizer step, taken in some micro-batches."""
    model = build_random(args)
    model.step_tokens = tokens.numel()
    for layer in model.layers.values():
        layer.moe.load_fractions.copy_(FRACTIONS)
    for part in tokens.chunk(micro_batches):
        (model(part, labels=part.roll(-1, 1)) / tokens.numel()).backward()
    return grads_of(model), [layer.moe.tokens_per_expert for layer in model.layers.values()]


def test_gradient_accumulation_changes_nothing():
    """What `balance_stats = step` is for: the loss is linear in the tokens of the step."""
    args = tiny_args(load_balance="aux_loss", aux_loss_coef=1.0, router_z_loss_coef=0.1)
    tokens = tokens_of(args, batch=4)
    whole, whole_counts = accumulated(args, tokens, 1)
    parts, parts_counts = accumulated(args, tokens, 4)
    assert_same_grads(parts, whole, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(whole_counts, parts_counts, strict=True))
    plain, _ = accumulated(args.override({"load_balance": "none"}), tokens, 1)
    gate = "layers.0.moe.router.gate.weight"
    assert rel(plain[gate], whole[gate]) > 0.05, "the losses hardly matter: the test is blind"


def test_stats_of_the_forward_do_depend_on_the_micro_batch():
    """The other setting is not linear; were it, the test above would prove nothing."""
    args = tiny_args(load_balance="aux_loss", aux_loss_coef=1.0, balance_stats="forward")
    tokens = tokens_of(args, batch=4)
    gate = "layers.0.moe.router.gate.weight"
    assert rel(accumulated(args, tokens, 4)[0][gate], accumulated(args, tokens, 1)[0][gate]) > 1e-4
