"""eager against the slow reference, the other bodies against eager."""

import pytest
import torch
from helpers import rel
from reference.sink_attention import sink_attention

from microtron.model import attention_core
from microtron.model.attention_core import BACKENDS, blocked, eager, flex, resolve_backend, sdpa
from microtron.model.cpu_attention import cpu_attention
from microtron.model.masks import build_masks, dense_mask, document_numbers

CPU = torch.device("cpu")
SEQ_LEN, WINDOW, HEADS, WIDTH = 11, 4, 4, 16
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1]])


def inputs(n_kv_heads=2, dtype=torch.float32, seed=0):
    """Leaves q, k, v, sinks; logits of a few units, so that neither keys nor sinks vanish."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, SEQ_LEN, HEADS, WIDTH),
        (2, SEQ_LEN, n_kv_heads, WIDTH),
        (2, SEQ_LEN, n_kv_heads, WIDTH),
        (HEADS,),
    ]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def run(core, leaves, sinks=True, kind="full", positions=None):
    """[out, dq, dk, dv(, dsinks)] of one body."""
    q, k, v, s = leaves
    name = next(key for key, body in BACKENDS.items() if body is core)
    documents = None if positions is None else document_numbers(positions)
    mask = build_masks(name, SEQ_LEN, WINDOW, CPU, documents)[kind]
    out = core(q, k, v, s if sinks else None, mask, WIDTH**-0.5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    wanted = leaves if sinks else leaves[:3]
    return [out, *torch.autograd.grad(out, wanted, upstream)]


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_eager_against_reference(n_kv_heads, kind, sinks):
    leaves = inputs(n_kv_heads)
    expected = sink_attention(
        *leaves[:3], leaves[3] if sinks else None, WINDOW if kind == "window" else None
    )
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad(expected, leaves if sinks else leaves[:3], upstream)
    actual = run(eager, leaves, sinks, kind)
    for ours, theirs in zip(actual, [expected, *grads], strict=True):
        assert rel(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["full", "window"])
def test_eager_keeps_documents_apart(kind):
    leaves = inputs()
    expected = sink_attention(
        *leaves, WINDOW if kind == "window" else None, document_numbers(POSITIONS).tolist()
    )
    assert rel(run(eager, leaves, True, kind, POSITIONS)[0], expected) < 1e-5


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one", "documents"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("core", [sdpa, blocked])
def test_fast_bodies_against_eager(core, n_kv_heads, kind, sinks, positions):
    leaves = inputs(n_kv_heads)
    expected = run(eager, leaves, sinks, kind, positions)
    for ours, theirs in zip(run(core, leaves, sinks, kind, positions), expected, strict=True):
        assert rel(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one", "documents"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("n_kv_heads", [4, 2], ids=["mha", "gqa"])
def test_flex_forward_against_eager(monkeypatch, n_kv_heads, kind, sinks, positions):
    """Uncompiled, which CPU can do; gradients need CUDA: parity/test_gpu_backends.py."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_core, "_compiled_flex", lambda: flex_attention)
    q, k, v, s = (leaf.detach() for leaf in inputs(n_kv_heads))
    documents = None if positions is None else document_numbers(positions)
    mask = build_masks("flex", SEQ_LEN, WINDOW, CPU, documents)[kind]
    out = flex(q, k, v, s if sinks else None, mask, WIDTH**-0.5)
    assert rel(out, run(eager, inputs(n_kv_heads), sinks, kind, positions)[0]) < 1e-5


def test_full_causal_sdpa_needs_no_mask():
    """Else the case above would not have tried the body that puts a dummy query in front."""
    masks = build_masks("sdpa", SEQ_LEN, WINDOW, CPU)
    assert masks["full"] is None and masks["window"] is not None


@pytest.mark.parametrize("core", [eager, sdpa, blocked])
@pytest.mark.parametrize("kind", ["full", "window"])
def test_bf16_stays_near_fp32(core, kind):
    leaves = inputs(dtype=torch.bfloat16)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    for ours, theirs in zip(
        run(core, leaves, True, kind), run(eager, exact, True, kind), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert rel(ours, theirs) < 2e-2


@pytest.mark.parametrize("core", [eager, sdpa])
def test_a_large_sink_means_attending_to_nothing(core):
    q, k, v, sinks = inputs()
    mask = build_masks("eager", SEQ_LEN, WINDOW, CPU)["full"]
    out = core(q, k, v, torch.full_like(sinks, 60.0), mask, WIDTH**-0.5)
    assert out.abs().max() < 1e-6
    out = core(q, k, v, torch.full_like(sinks, -60.0), mask, WIDTH**-0.5)
    assert rel(out, core(q, k, v, None, mask, WIDTH**-0.5)) < 1e-5


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize("window", [1, 5, 40, 1000])
@pytest.mark.parametrize("seq_len", [1, 31, 32, 70])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_cpu_operator_against_eager(n_kv_heads, seq_len, window, sinks):
    """Whole and partial blocks, windows shorter and longer than a block."""
    generator = torch.Generator().manual_seed(seq_len)
    shapes = [(2, seq_len, h, 8) for h in (4, n_kv_heads, n_kv_heads)] + [(4,)]
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    *qkv, sink = leaves
    mask = dense_mask(seq_len, window, None, CPU)
    bodies = (
        lambda: eager(*qkv, sink if sinks else None, mask, 0.3),
        lambda: cpu_attention(*qkv, sink if sinks else None, window, 0.3),
    )
    upstream = torch.randn(shapes[0], generator=generator)
    results = []
    for body in bodies:
        out = body()
        results.append([out, *torch.autograd.grad(out, leaves if sinks else qkv, upstream)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm().clamp(min=1.0)


def test_cpu_operator_obeys_torchs_rules():
    q, k, v, sinks = inputs()
    torch.library.opcheck(torch.ops.microtron.attention, (q, k, v, sinks, 3, 0.3))
    detached = [x.detach() for x in (q, k, v, sinks)]
    out, lse = torch.ops.microtron.attention(*detached, 3, 0.3)
    arguments = (torch.randn_like(out), *detached, out, lse, 3, 0.3)
    torch.library.opcheck(torch.ops.microtron.attention_backward, arguments)


def test_auto_is_blocked_on_cpu_and_flex_on_cuda():
    assert resolve_backend("auto", "cpu") == "blocked"
    assert resolve_backend("auto", "mps") == "sdpa"
    assert resolve_backend("auto", "cuda") == "flex"
    assert resolve_backend("eager", "cuda") == "eager"
