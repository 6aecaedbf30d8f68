"""[kernels]: which body a module gets, that every body computes the same, what is refused."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import GPT2, LLAMA, build_random, grads_of, rel, tiny_args, tokens_of

from microtron import check, kernels
from microtron.errors import UserError
from microtron.model.head import full_loss
from microtron.model.mlp import plain_swiglu
from microtron.model.norms import rms_norm
from microtron.model.rope import RotaryEmbedding, rotate_both
from microtron.parallel.apply import splits_backward
from microtron.parse import parse

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMPILE = dict.fromkeys(kernels.KERNELS, "compile")


def test_the_table_of_auto_is_whole_and_as_measured():
    devices = kernels.DEPENDABLE
    assert set(kernels.AUTO) == set(itertools.product(devices, kernels.KERNELS))
    for (device, _), choice in kernels.AUTO.items():
        assert choice in devices[device]
    for file in RESULTS.glob("kernels_*.json"):
        measured = json.loads(file.read_text())
        table = {k: kernels.AUTO[measured["device_type"], k] for k in kernels.KERNELS}
        assert table == measured["auto"], file


def test_auto_is_settled_by_device(monkeypatch):
    monkeypatch.setitem(kernels.AUTO, ("cuda", "rope"), "compile")
    asked = {"norm": "liger", "rope": "auto", "swiglu": "compile"}
    settled = {"norm": "liger", "swiglu": "compile", "loss": "torch"}
    assert kernels.settle(asked, "cuda") == settled | {"rope": "compile"}
    assert kernels.settle(asked, "tpu") == settled | {"rope": "torch"}


@pytest.fixture
def counted(monkeypatch):
    """`compiled` counts the calls of its function instead."""
    calls = []

    def compiled(function):
        def run(*args):
            calls.append(function.__name__)
            return function(*args)

        return run

    monkeypatch.setattr(kernels, "compiled", compiled)
    return calls


def step(model):
    """Loss and gradients of a training pass."""
    tokens = tokens_of(model.model_args)
    model.zero_grad()
    loss = model(tokens, labels=tokens.roll(-1, 1))
    loss.backward()
    return [loss.detach(), *grads_of(model).values()]


# Two layers: a norm before attention and one before the feed-forward, one at the end.
@pytest.mark.parametrize(
    "shape, inside, outside",
    [
        ({}, {"rms_norm": 4, "rotate_both": 2, "swiglu": 2}, {"rms_norm": 1, "chunk_loss": 1}),
        (
            {"qk_norm": True},
            {"rms_norm": 8, "rotate_both": 2, "swiglu": 2},
            {"rms_norm": 1, "chunk_loss": 1},
        ),
        (GPT2, {"layer_norm": 4}, {"layer_norm": 1, "chunk_loss": 1}),
        (
            LLAMA,
            {"rms_norm": 4, "rotate_both": 2, "plain_swiglu": 2},
            {"rms_norm": 1, "chunk_loss": 1},
        ),
    ],
    ids=["moe", "qk-norm", "gpt2", "llama"],
)
@pytest.mark.parametrize("blocks_compiled", [False, True], ids=["", "blocks"])
def test_every_module_gets_its_body(counted, shape, inside, outside, blocks_compiled):
    """All of them; only what is outside of the blocks where these are compiled whole."""
    model = build_random(tiny_args(**shape, loss_chunk_tokens=1000))
    names = list(model.state_dict())
    before = step(model)
    assert not counted
    kernels.apply_kernels(model, COMPILE, "cpu", blocks_compiled)
    after = step(model)
    expected = dict(outside)
    if not blocks_compiled:
        expected = {n: outside.get(n, 0) + inside.get(n, 0) for n in outside | inside}
    assert {n: counted.count(n) for n in set(counted)} == expected
    assert all(map(torch.equal, before, after))
    assert list(model.state_dict()) == names  # a checkpoint knows nothing of it


def test_experts_apart_from_compiled_blocks(counted):
    """Expert parallel runs them outside of the graph."""
    model = build_random(tiny_args(loss_chunk_tokens=1000))
    kernels.apply_kernels(model, COMPILE, "cpu", blocks_compiled=True, experts_apart=True)
    step(model)
    assert sorted(counted) == ["chunk_loss", "rms_norm", "swiglu", "swiglu"]


def test_auto_leaves_a_loss_on_shards_alone(counted):
    """Tensor parallel has put its own loss into the head by then."""
    model = build_random(tiny_args())
    plain = model.output.chunk_loss
    shards = model.output.chunk_loss = lambda *args: plain(*args)
    kernels.apply_kernels(model, {"loss": "compile"}, "cpu")
    assert model.output.chunk_loss is shards


def test_one_compiled_body_serves_all_modules(monkeypatch):
    def function():
        pass

    monkeypatch.setattr(torch, "compile", lambda function: object())
    assert kernels.compiled(function) is kernels.compiled(function)


@pytest.mark.parametrize("schedule, pp, splits", [("ZBVZeroBubble", 2, True), ("1F1B", 2, False)])
def test_schedules_that_split_the_backward(schedule, pp, splits):
    mesh = types.SimpleNamespace(pipeline_parallel_schedule=schedule)
    job = types.SimpleNamespace(parallelism=mesh)
    assert splits_backward(types.SimpleNamespace(pp_enabled=pp > 1), job) is splits
    assert not splits_backward(types.SimpleNamespace(pp_enabled=False), job)


@pytest.fixture
def traced(monkeypatch):
    """`compiled` without the code generator, which takes seconds a function."""

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "compiled", compiled)


def agree(shape, asked=COMPILE, chunk=7):
    """A training pass with the bodies asked for against plain torch."""
    args = tiny_args(**shape, logit_softcap=5.0, z_loss=0.01, loss_chunk_tokens=chunk)
    model = build_random(args)
    expected = step(model)
    kernels.apply_kernels(model, asked, "cpu")
    largest = max(float(e.norm()) for e in expected[1:])
    for actual, truth in zip(step(model), expected, strict=True):
        # A gradient that cancels to zero (GPT-2's key bias) is rounding alone.
        assert float((actual - truth).norm()) < 1e-5 * max(float(truth.norm()), largest / 1e3)


def test_traced_bodies_agree(traced):
    """No graph break, the same loss and gradients."""
    agree({}, chunk=12)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"qk_norm": True}, GPT2, LLAMA], ids=["moe", "gpt2", "llama"])
def test_compiled_bodies_agree(shape):
    from torch._dynamo.utils import counters

    counters.clear()
    agree(shape)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


class Kept:
    """An autograd function's stand-in that is called by `apply`."""

    def __init__(self, function):
        self.apply = function


def rope_over_its_input(q, k, cos, sin):
    """Liger's rope_forward: [B, H, S, D], tables [B or 1, S, D] read by halves, written in place
    where the memory is contiguous as [B, S, H, D].
    """
    out = []
    for x in (q.transpose(1, 2), k.transpose(1, 2)):
        half = x.shape[-1] // 2
        c, s = cos[..., None, :half], sin[..., None, :half]
        one, two = x[..., :half].float(), x[..., half:].float()
        new = torch.cat((one * c - two * s, two * c + one * s), dim=-1).to(x.dtype)
        if x.is_contiguous():
            x.data.copy_(new)
        out.append(new.transpose(1, 2))
    return tuple(out)


def fused_loss(h, weight, target, bias, ce_weight, ignore, z, smooth, how, cap, with_z, dtype):
    """Liger's parameters in their order (0.8.0 to 0.8.5)."""
    assert (bias, ce_weight, smooth, how, with_z) == (None, None, 0.0, "sum", False)
    assert (ignore, dtype) == (-100, torch.float32) and cap != 0
    return full_loss(h, weight, target, cap or 0.0, z), None, None, None


@pytest.fixture
def liger(monkeypatch):
    """A stand-in with Liger's signatures, layouts and manners; the real one needs CUDA."""

    def norm(x, weight, eps, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "gemma", False)
        return rms_norm(x, weight, eps)

    ops = types.ModuleType("liger_kernel.ops")
    ops.LigerRMSNormFunction = Kept(norm)
    ops.LigerRopeFunction = Kept(rope_over_its_input)
    ops.LigerSiLUMulFunction = Kept(lambda gate, up: F.silu(gate) * up)
    ops.LigerFusedLinearCrossEntropyFunction = Kept(fused_loss)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)


def test_liger_gets_what_it_expects(liger):
    """Layouts, signs and constants of every call, in a model whose every term matters."""
    agree({**LLAMA, "rope_factor": 32.0}, dict.fromkeys(kernels.KERNELS, "liger"))
    agree({"qk_norm": True}, {"norm": "liger", "rope": "liger", "loss": "liger"})


def test_validation_with_liger_counts_no_z_loss(liger):
    model = build_random(tiny_args(z_loss=0.5)).eval()
    tokens = tokens_of(model.model_args)
    plain = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
    kernels.apply_kernels(model, {"loss": "liger"}, "cpu")
    assert rel(model(tokens, labels=tokens), plain) < 1e-6


def test_liger_leaves_the_projections_as_they_are(liger):
    """Selective checkpointing hands them out again in backward."""
    table = RotaryEmbedding(tiny_args())
    table.init_weights()
    tables = table(torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]]))
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    kept = q.clone(), k.clone()
    out = kernels.liger_rotate(q, k, *tables)
    assert torch.equal(q, kept[0]) and torch.equal(k, kept[1])
    for actual, expected in zip(out, rotate_both(q, k, *tables), strict=True):
        assert rel(actual, expected) < 1e-6


def test_liger_reads_gate_and_up_in_their_order(liger):
    x = torch.randn(3, 10)
    assert torch.equal(kernels.liger_swiglu(x), plain_swiglu(x))


LLAMA_FLAGS = "--model.args.activation=swiglu --model.args.num_experts=0 --model.args.hidden_dim=64"
GPT2_FLAGS = "--model.flavor=gpt2_124m --training.seq_len=8"
ZERO_BUBBLE = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
REFUSED = {  # device, options, what the line says
    "choice": ("cpu", "--kernels.norm=triton", "one of 'auto', 'torch', 'cpu', 'compile', 'liger'"),
    "cpu": ("cpu", "--kernels.norm=liger", "'liger' cannot work: Liger's kernels need CUDA"),
    "by hand on cuda": (
        "cuda",
        "--kernels.norm=cpu",
        "its bodies are for a CPU; use auto or torch",
    ),
    "layer by hand": ("cpu", f"{GPT2_FLAGS} --kernels.norm=cpu", "RMSNorm, not LayerNorm"),
    "plain by hand": ("cpu", f"{LLAMA_FLAGS} --kernels.swiglu=cpu", "there is the clamped one"),
    "operator by hand": ("cpu", "--kernels.swiglu=cpu", "SwiGLU within; leave it out"),
    "blocks by hand": ("cpu", "--kernels.rope=cpu --compile.enable", "leave one of the two out"),
    "tensor by hand": (
        "cpu",
        "--kernels.loss=cpu --parallelism.tensor_parallel_degree=2",
        "under tensor parallelism",
    ),
    "package": ("cuda", "--kernels.rope=liger", "pip install 'microtron[liger]'"),
    "learned": ("cpu", f"{GPT2_FLAGS} --kernels.rope=compile", "rotates nothing"),
    "gelu": ("cpu", f"{GPT2_FLAGS} --kernels.swiglu=compile", "activation = gelu"),
    "operator": ("cpu", "--kernels.swiglu=compile", "SwiGLU within; leave it out"),
    "layer": ("cuda", f"{GPT2_FLAGS} --kernels.norm=liger", "not LayerNorm"),
    "clamps": ("cuda", "--kernels.swiglu=liger", "Liger's has no clamps; use compile"),
    "blocks": ("cuda", "--kernels.norm=liger --compile.enable", "leave one of the two out"),
    "tensor": (
        "cpu",
        "--kernels.loss=compile --parallelism.tensor_parallel_degree=2",
        "kernels.loss = 'compile' cannot work: under tensor parallelism",
    ),
    "zero bubble": (
        "cpu",
        f"--kernels.norm=compile --parallelism.pipeline_parallel_degree=2 {ZERO_BUBBLE}",
        "ZBVZeroBubble splits the backward; use torch",
    ),
}
TAKEN = {
    "compile": ("cpu", "--kernels.norm=compile --kernels.rope=compile --kernels.loss=compile"),
    "loop": ("cpu", "--kernels.swiglu=compile --model.args.experts_backend=loop"),
    "by hand": ("cpu", "--kernels.norm=cpu --kernels.rope=cpu --kernels.loss=cpu"),
    "by hand, split": (
        "cpu",
        f"--kernels.norm=cpu --parallelism.pipeline_parallel_degree=2 {ZERO_BUBBLE}",
    ),
    "dense": ("cpu", f"--kernels.swiglu=compile {LLAMA_FLAGS}"),
    "torch": (
        "cpu",
        f"--kernels.norm=torch --parallelism.pipeline_parallel_degree=2 {ZERO_BUBBLE}",
    ),
    "liger": ("cuda", f"--kernels.norm=liger --kernels.swiglu=liger {LLAMA_FLAGS}"),
    "liger's loss": ("cuda", "--kernels.loss=liger --compile.enable"),
}


def parsed(monkeypatch, device, options):
    monkeypatch.setattr(check, "DEVICE_TYPE", device)
    monkeypatch.setattr(check, "TORCH", (2, 13))  # an older one refuses zero bubble
    return parse(["--data.mock", *options.split()])


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_line(monkeypatch, case):
    device, options, told = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        parsed(monkeypatch, device, options)
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("case", TAKEN)
def test_taken(monkeypatch, case):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name)
    device, options = TAKEN[case]
    job = parsed(monkeypatch, device, options)
    assert {getattr(job.kernels, k) for k in kernels.KERNELS} != {"auto"}
