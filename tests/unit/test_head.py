"""The chunked loss against all logits at once; what it keeps in memory."""

import math

import pytest
import torch
from helpers import build_random, rel, tiny_args, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from microtron.model.head import IGNORE, Head, full_loss

N, DIM, VOCAB = 20, 40, 61


class Watch(TorchDispatchMode):
    """Remembers the most rows over the vocabulary and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.rows, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1:] == (VOCAB,):
            self.rows = max(self.rows, out.numel() // VOCAB)
        self.products += "mm" in func.name() or "linear" in func.name()
        return out


def inputs(ignored=(3, 4, 19)):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, N, DIM, generator=generator).requires_grad_()
    labels = torch.randint(VOCAB, (1, N), generator=generator)
    labels[0, list(ignored)] = IGNORE
    return h, labels


def build_head(**overrides):
    head = Head(tiny_args(**overrides))
    with torch.no_grad():
        head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return head


def both(head, h, labels, scale=1.0):
    """([loss, dh, dw] chunked, the same in full)."""
    results = []
    for loss in (
        head(h, labels),
        full_loss(h[0], head.weight, labels[0], head.softcap, head.z_loss),
    ):
        results.append([loss, *torch.autograd.grad(loss * scale, (h, head.weight))])
    return results


@pytest.mark.parametrize("z_loss", [0.0, 0.02], ids=["", "z"])
@pytest.mark.parametrize("logit_softcap", [0.0, 2.0], ids=["", "cap"])
@pytest.mark.parametrize("chunk", [1, 7, 20, 50])
def test_chunked_against_full(chunk, logit_softcap, z_loss):
    head = build_head(loss_chunk_tokens=chunk, logit_softcap=logit_softcap, z_loss=z_loss)
    for ours, theirs in zip(*both(head, *inputs()), strict=True):
        assert rel(ours, theirs) < 1e-5
        assert ours.dtype == torch.float32


def test_gradients_are_scaled_by_what_follows():
    """Training divides the sum by the tokens of the global batch."""
    head = build_head(loss_chunk_tokens=7)
    for ours, theirs in zip(*both(head, *inputs(), scale=1 / 17), strict=True):
        assert rel(ours, theirs) < 1e-5


def test_ignored_labels_count_for_nothing():
    head = build_head(loss_chunk_tokens=7, z_loss=0.02)
    h, labels = inputs()
    loss, dh, dw = both(head, h, labels)[0]
    assert (dh[0, [3, 4, 19]] == 0).all() and (dh[0, [0, 5]] != 0).any(-1).all()
    keep = labels[0] != IGNORE
    assert rel(head(h[:, keep], labels[:, keep]), loss) < 1e-6
    nothing = torch.full_like(labels, IGNORE)
    loss, dh, dw = both(head, h, nothing)[0]
    assert loss == 0 and (dh == 0).all() and (dw == 0).all()


@pytest.mark.parametrize("chunk", [7, 50])
def test_bf16_autocast(chunk):
    """Products in bf16, softmax and sums in fp32, gradients in the dtype of the leaves."""
    head = build_head(loss_chunk_tokens=chunk)
    h, labels = inputs()
    exact = both(head, h, labels)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(h, labels)
    actual = [loss, *torch.autograd.grad(loss, (h, head.weight))]
    assert 0 < rel(loss, exact[0]) < 5e-3
    for ours, theirs in zip(actual, exact, strict=True):
        assert ours.dtype == torch.float32
        assert rel(ours, theirs) < 2e-2


def test_bf16_hidden_states_and_fp32_weights():
    """What FSDP's mixed precision and autocast hand over."""
    head = build_head(loss_chunk_tokens=7)
    h, labels = inputs()
    exact = both(head, h, labels)[1]
    half = h.detach().bfloat16().requires_grad_()
    loss = head(half, labels)
    dh, dw = torch.autograd.grad(loss, (half, head.weight))
    assert (loss.dtype, dh.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for ours, theirs in zip((loss, dh, dw), exact, strict=True):
        assert rel(ours, theirs) < 2e-2
    # The logits are rounded, what follows is not.
    assert rel(loss, full_loss(half[0], head.weight.bfloat16(), labels[0])) < 1e-5


def test_logits_never_exist_all_at_once():
    """The most rows are those of the transposed weight, though there are five times more tokens."""
    head = build_head(loss_chunk_tokens=3)
    h, labels = inputs()
    h, labels = h.detach().repeat(1, 10, 1).requires_grad_(), labels.repeat(1, 10)
    with Watch() as watch:
        head(h, labels).backward()
    assert watch.rows == DIM
    with Watch() as watch:
        full_loss(h[0], head.weight, labels[0])
    assert watch.rows == 10 * N == 5 * DIM


def test_each_chunk_costs_three_products_in_training_and_one_in_validation():
    head = build_head(loss_chunk_tokens=10)
    h, labels = inputs()
    with Watch() as watch:
        loss = head(h, labels)
        loss.backward()
    assert watch.products == 2 * 3
    with Watch() as watch, torch.no_grad():
        same = head(h, labels)
    assert watch.products == 2 * 1
    assert torch.equal(same, loss.detach())


def test_validation_is_plain_cross_entropy():
    head = build_head(z_loss=0.5)
    h, labels = inputs()
    head.eval()
    plain = torch.nn.functional.cross_entropy(
        head(h)[0], labels[0], ignore_index=IGNORE, reduction="sum"
    )
    assert rel(head(h, labels), plain) < 1e-5


def test_softcap_holds_for_logits_as_for_the_loss():
    head = build_head(logit_softcap=0.5)
    h, _ = inputs()
    expected = 0.5 * torch.tanh(h @ head.weight.t() / 0.5)
    torch.testing.assert_close(head(h), expected)


def test_frozen_head_or_frozen_trunk():
    """A gradient for one of the two alone."""
    head = build_head()
    h, labels = inputs()
    expected = both(head, h, labels)[1]
    head.weight.requires_grad_(False)
    assert rel(torch.autograd.grad(head(h, labels), h)[0], expected[1]) < 1e-5
    head.weight.requires_grad_(True)
    assert rel(torch.autograd.grad(head(h.detach(), labels), head.weight)[0], expected[2]) < 1e-5


def test_uniform_logits_lose_ln_v():
    head = build_head()
    with torch.no_grad():
        head.weight.zero_()
    h, labels = inputs(ignored=())
    assert head(h, labels).item() == pytest.approx(N * math.log(VOCAB), rel=1e-5)


def test_model_with_labels_returns_the_sum_over_its_logits():
    args = tiny_args(loss_chunk_tokens=5)
    model, tokens = build_random(args), tokens_of(args)
    labels = tokens.roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert rel(model(tokens, labels=labels), expected) < 1e-5
