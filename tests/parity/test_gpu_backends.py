"""The CUDA kernels against the plain bodies: flex attention, grouped GEMM, [kernels]."""

import microtron.accelerator  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import assert_same_grads, build_random, grads_of, randomise, rel, tiny_args, tokens_of
from torchtitan.config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from microtron import kernels
from microtron.model.attention_core import eager, flex
from microtron.model.experts import Experts
from microtron.model.head import full_loss
from microtron.model.masks import build_masks, document_numbers
from microtron.model.mlp import plain_swiglu, swiglu
from microtron.model.norms import rms_norm
from microtron.model.rope import RotaryEmbedding, rotate_both
from microtron.parallel.apply import SAVED_OPS

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


CHOICES = ["compile", "liger"]
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # bf16 keeps 8 bits: 4e-3 a rounding


def body_of(kernel, choice):
    """The body of [kernels] and the plain one, and their inputs: (fast, plain, tensors, rest)."""
    plain, liger, *inputs = {
        "norm": (rms_norm, kernels.liger_norm, [(2, 300, 1440), (1440,)], [1e-5]),
        "rope": (rotate_both, kernels.liger_rotate, [(2, 300, 8, 64), (2, 300, 2, 64)], tables()),
        "swiglu": (plain_swiglu, kernels.liger_swiglu, [(500, 2 * 96)], []),
        "clamped": (swiglu, None, [(500, 2 * 96)], [1.702, 7.0]),
    }[kernel]
    fast = liger if choice == "liger" else kernels.compiled(plain)
    return fast, plain, *inputs


def tables():
    table = RotaryEmbedding(tiny_args(head_dim=64, rope_factor=32.0))
    table.init_weights(torch.device("cuda"))
    return table(positions_with_documents(2, 300))


def results(body, tensors, rest, dtype):
    """Outputs and gradients, for an upstream gradient that is always the same."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = body(*leaves, *rest)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator("cuda").manual_seed(1)
    up = [torch.randn(o.shape, generator=generator, device="cuda").to(o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, up)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kernel", ["norm", "rope", "swiglu", "clamped"])
def test_kernels_against_torch(kernel, choice, dtype):
    """Outputs and gradients against plain torch in fp32 on the same (rounded) numbers."""
    if choice == "liger":
        pytest.importorskip("liger_kernel")
        if kernel == "clamped":
            pytest.skip("Liger has no clamped SwiGLU")
    torch._dynamo.reset()
    fast, plain, shapes, rest = body_of(kernel, choice)
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]
    truth = results(plain, tensors, rest, torch.float32)
    for actual, expected in zip(results(fast, tensors, rest, dtype), truth, strict=True):
        assert actual.dtype == dtype
        assert rel(actual, expected) < PRECISION[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cap, z", [(0.0, 0.0), (5.0, 0.01)], ids=["plain", "cap and z"])
@pytest.mark.parametrize("choice", CHOICES)
def test_loss_against_all_logits(choice, cap, z, dtype):
    """Under autocast, as one device trains: fp32 weights and hidden states, products in bf16."""
    if choice == "liger":
        pytest.importorskip("liger_kernel")
    torch._dynamo.reset()
    args = tiny_args(dim=64, vocab_size=1000, logit_softcap=cap, z_loss=z, loss_chunk_tokens=100)
    model = build_random(args).cuda()
    kernels.apply_kernels(model, {"loss": choice}, "cuda")
    head, h = model.output, torch.randn(1, 350, 64, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (1, 350), device="cuda")
    labels[0, [0, 7, 349]] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = head(h, labels) / 347  # what follows must scale the gradients
    found = [loss, *torch.autograd.grad(loss, (h, head.weight))]
    whole = full_loss(h[0], head.weight, labels[0], cap, z) / 347
    truth = [whole, *torch.autograd.grad(whole, (h, head.weight))]
    assert head.fused_loss is (kernels.liger_loss if choice == "liger" else None)
    for actual, expected in zip(found, truth, strict=True):
        # fp32 products of CUDA may be TF32's; bf16 logits round what the softmax sees.
        assert rel(actual, expected) < (1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("choice", CHOICES)
def test_kernels_in_a_model(choice, mode):
    """All of [kernels], with what backward computes again: a body that writes over what selective
    checkpointing keeps would show.
    """
    if choice == "liger":
        pytest.importorskip("liger_kernel")
    torch._dynamo.reset()
    # Without qk-norm it is the saved projections themselves that are rotated.
    dense = {"num_experts": 0, "hidden_dim": 72, "activation": "swiglu", "dim": 64}
    args = tiny_args(**dense, attn_backend="sdpa")
    tokens, grads = tokens_of(args, seq_len=40).cuda(), {}
    for name in ("torch", choice):
        model = build_random(args).cuda()
        kernels.apply_kernels(model, dict.fromkeys(kernels.KERNELS, name), "cuda")
        if mode != "none":
            ac = ActivationCheckpoint(mode=mode, selective_ac_option="op")
            apply_ac(model, ac, model_compile_enabled=False, op_sac_save_list=SAVED_OPS)
        (model(tokens, labels=tokens.roll(-1, 1)) / tokens.numel()).backward()
        grads[name] = grads_of(model)
    assert_same_grads(grads[choice], grads["torch"], 1e-3)
