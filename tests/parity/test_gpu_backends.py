"""The CUDA kernels against the plain bodies: flex attention, grouped GEMM."""

import pytest
import torch
from helpers import assert_same_grads, build_random, grads_of, randomise, rel, tiny_args, tokens_of

from microtron.model.attention_core import eager, flex
from microtron.model.experts import Experts
from microtron.model.masks import build_masks, document_numbers

pytestmark = pytest.mark.gpu

SEQ_LEN, WINDOW = 300, 130  # neither is a multiple of flex's block of 128
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


def positions_with_documents(batch, seq_len):
    """Rows [B, S] whose positions restart at a few places, others in each row."""
    rows = []
    for row in range(batch):
        starts = sorted({0, 17 + row, 128, 201 + 3 * row})
        rows.append([t - max(s for s in starts if s <= t) for t in range(seq_len)])
    return torch.tensor(rows, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("kind", ["window", "full"])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "plain"])
def test_flex_against_eager(sinks, kind, documents, dtype):
    torch.manual_seed(0)
    device = torch.device("cuda")
    shapes = [(2, SEQ_LEN, 8, 64), (2, SEQ_LEN, 2, 64), (2, SEQ_LEN, 2, 64), (8,)]
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    positions = positions_with_documents(2, SEQ_LEN) if documents else None
    upstream = torch.randn(shapes[0], device=device)
    results = {}
    for name, core in (("eager", eager), ("flex", flex)):
        # The truth is computed in fp32 from the very same (rounded) numbers.
        cast = torch.float32 if name == "eager" else dtype
        q, k, v, s = (x.detach().to(cast).requires_grad_() for x in inputs)
        documents = None if positions is None else document_numbers(positions)
        mask = build_masks(name, SEQ_LEN, WINDOW, device, documents)[kind]
        out = core(q, k, v, s if sinks else None, mask, 0.125)
        (out.float() * upstream).sum().backward()
        results[name] = [out, q.grad, k.grad, v.grad] + ([s.grad] if sinks else [])
    for actual, expected in zip(results["flex"], results["eager"], strict=True):
        assert rel(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("counts", [[40, 0, 17, 71], [0, 128, 0, 0]], ids=["ragged", "one_expert"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_grouped_gemm_against_loop(bias, counts):
    results = {}
    x = torch.randn(128, 40, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    for backend in ("loop", "grouped_mm"):
        args = tiny_args(experts_backend=backend, mlp_bias=bias)
        experts = randomise(Experts(args)).cuda().bfloat16()
        leaf = x.clone().requires_grad_()
        out = experts(leaf, torch.tensor(counts, device="cuda"))
        out.float().square().sum().backward()
        results[backend] = [out, leaf.grad, *grads_of(experts).values()]
    for actual, expected in zip(results["grouped_mm"], results["loop"], strict=True):
        assert rel(actual, expected) < 2e-2 or expected.norm() == 0 == actual.norm()


def test_whole_model_under_autocast():
    """flex and grouped_mm in bf16 on fp32 weights, against eager and loop in fp32."""
    args = tiny_args(dim=64, expert_dim=64, top_k=4, window=20)
    tokens = tokens_of(args, seq_len=SEQ_LEN).cuda()
    grads = {}
    for name, backends in {"truth": ("eager", "loop"), "fast": ("flex", "grouped_mm")}.items():
        choice = dict(zip(("attn_backend", "experts_backend"), backends, strict=True))
        model = build_random(args.override(choice)).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=name == "fast"):
            (model(tokens, labels=tokens.roll(-1, 1)) / tokens.numel()).backward()
        grads[name] = grads_of(model)
    # bf16 through two random layers: percents, not rounding; a wrong term is off by far more.
    assert_same_grads(grads["fast"], grads["truth"], 0.15)
