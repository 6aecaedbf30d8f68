"""What a forward keeps, by formula, against real forwards: on a CPU, and as CUDA would run it."""

import contextlib
from dataclasses import asdict, replace

from microtron.accelerator import DEVICE_TYPE  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.nn.functional as F
from tiny_run import DENSE, GPT2, LLAMA, TINY

from microtron.config import resolved_args
from microtron.kernels import KERNELS, apply_kernels
from microtron.model import attention_core, model
from microtron.model.model import Transformer
from microtron.parallel.apply import SAVED_OPS, apply_ac
from microtron.parse import parse
from microtron.scaling.measure import Watch
from microtron.scaling.memory import memory_of
from microtron.scaling.plan import plan_of


def job_of(*options, ranks=1):
    """A small run, its replicas as many as its ranks."""
    layout = f"--parallelism.data_parallel_replicate_degree={ranks}"
    return parse([*TINY, "--parallelism.data_parallel_shard_degree=1", layout, *options])


def build(job, args, device="cpu"):
    """The model, checkpointed and with the bodies that the job says."""
    with torch.device(device):
        built = Transformer(args)
    if device == "cpu":
        built.init_weights()
    apply_kernels(built, asdict(job.kernels), "cpu" if device == "cpu" else "cuda")
    if job.activation_checkpoint.mode != "none":
        save = SAVED_OPS | {torch.ops.microtron_test.flex.default}
        apply_ac(built, job.activation_checkpoint, op_sac_save_list=save)
    return built


def forward(job, args, device="cpu", dtype=None):
    """Bytes that a forward of the real model keeps."""
    built = build(job, args, device)
    for parameter in built.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    shape = (job.training.local_batch_size, job.training.seq_len)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    with Watch() as watch:
        loss = built(tokens, labels=tokens)
        return watch.kept_bytes([built]) if loss.requires_grad else 0


MODES = [f"--activation_checkpoint.mode={m}" for m in ("none", "selective", "full")]
PLAIN = tuple(f"--kernels.{kernel}=torch" for kernel in KERNELS)
SHAPES = {
    "moe": (),
    "dense": (DENSE,),
    "windows": ("--model.args.window_pattern=S",),
    "no windows": ("--model.args.window_pattern=L",),
    "no biases": ("--model.args.attention_bias=false", "--model.args.mlp_bias=false"),
    "qk-norm": ("--model.args.qk_norm=true",),
    "sdpa": ("--model.args.attn_backend=sdpa",),
    "eager": ("--model.args.attn_backend=eager",),
    "loop": ("--model.args.experts_backend=loop",),
    "gpt2": GPT2,
    "llama": LLAMA,
    "64 tokens": ("--training.seq_len=64",),
    "odd width": ("--model.args.expert_dim=36",),
    "plain": (*PLAIN, "--model.args.experts_backend=loop", "--model.args.qk_norm=true"),
    "plain dense": (*PLAIN, DENSE),
}


CASES = [(MODES[0], shape) for shape in SHAPES]
CASES += [(MODES[1], "odd width")]
CASES += [
    (mode, shape) for mode in MODES[1:] for shape in ("moe", "dense", "no biases", "gpt2", "llama")
]


@pytest.mark.parametrize("mode, shape", CASES)
def test_activations_of_a_forward(flex_stand_in, mode, shape):
    job = job_of(mode, "--training.mixed_precision_param=float32", *SHAPES[shape])
    kept = forward(job, resolved_args(job))
    told = memory_of(plan_of(job, 1, "cpu"), 0).activations
    assert told == pytest.approx(kept, rel=0.02)


class Peak(Watch):
    """The most that is alive at once, but for what stands from the start."""

    def __init__(self, built):
        super().__init__()
        standing = (*built.parameters(), *built.buffers())
        self.standing = {t.untyped_storage()._cdata for t in standing}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        alive = (ref() for key, ref in self.storages.items() if key not in self.standing)
        self.most = max(self.most, sum(s.nbytes() for s in alive if s is not None))
        return out


@pytest.mark.parametrize("shape", ["moe", "dense", "gpt2"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.partition("=")[2])
def test_peak_of_forward_and_backward(flex_stand_in, mode, shape):
    """Told from above: gradients and activations as if all were there at once."""
    job = job_of(mode, "--training.mixed_precision_param=float32", *SHAPES[shape])
    built = build(job, resolved_args(job))
    tokens = torch.zeros((job.training.local_batch_size, job.training.seq_len), dtype=torch.int64)
    with Peak(built) as peak:
        built(tokens, labels=tokens).backward()
    told = memory_of(plan_of(job, 1, "cpu"), 0)
    assert 0.95 < (told.peak - told.parameters - told.optimizer) / peak.most < 1.2


@pytest.fixture(scope="module")
def operators():
    """What stands for CUDA's fused attention and norm: they keep what those keep."""
    library = torch.library

    @library.custom_op("microtron_test::flex", mutates_args=())
    def flex(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)

    @library.custom_op("microtron_test::norm", mutates_args=())
    def norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(x), x.new_zeros(x.shape[:-1])

    flex.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3]).float()))
    norm.register_fake(lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1])))

    @library.custom_op("microtron_test::flex_backward", mutates_args=())
    def back(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    back.register_fake(lambda grad, q, k, v, out, lse: tuple(map(torch.empty_like, (q, k, v))))
    flex.register_autograd(
        lambda ctx, grad, unused: torch.ops.microtron_test.flex_backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
    )
    norm.register_autograd(
        lambda ctx, *grads: None,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
    )


@pytest.fixture
def flex_stand_in(operators, monkeypatch):
    """FlexAttention as far as memory goes, and fused norms, on any device."""

    def flex(q, k, v, sinks, mask, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.microtron_test.flex(q, k, v)
        if sinks is not None:
            kept = torch.sigmoid(lse - sinks.float().view(1, -1, 1))
            out = out * kept.unsqueeze(-1).to(out.dtype)
        return out.transpose(1, 2)

    monkeypatch.setitem(attention_core.BACKENDS, "flex", flex)


@pytest.fixture
def without_cuda(flex_stand_in, monkeypatch):
    """The model as CUDA would run it, on the meta device."""
    monkeypatch.setattr(model, "build_masks", lambda *a: {"window": None, "full": None})
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: False)  # unknown to "meta"


def cuda_plan(job):
    """FSDP2's mixed precision, FlexAttention."""
    args = resolved_args(job).override({"attn_backend": "flex"})
    return replace(plan_of(job, 2, "cuda"), args=args)


BF16 = "--training.mixed_precision_param=bfloat16"


@pytest.mark.parametrize("shape", ["moe", "dense", "no biases", "qk-norm", "gpt2", "llama"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.partition("=")[2])
def test_activations_on_cuda_as_far_as_they_can_be_seen_without_it(
    without_cuda, monkeypatch, mode, shape
):
    monkeypatch.setattr(
        F, "rms_norm", lambda x, size, weight, eps: torch.ops.microtron_test.norm(x, weight)[0]
    )
    job = job_of(mode, BF16, *SHAPES[shape], ranks=2)
    plan = cuda_plan(job)
    kept = forward(job, plan.args, "meta", torch.bfloat16)
    assert memory_of(plan, 0).activations == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("shape", ["moe", "dense", "gpt2", "llama"])
def test_activations_of_compiled_blocks(without_cuda, shape):
    """By torch's own partitioner, without code generation."""
    job = job_of(BF16, "--compile.enable", *SHAPES[shape], ranks=2)
    plan = cuda_plan(job)
    with torch.device("meta"):
        built = Transformer(plan.args)
    for parameter in built.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for block in built.layers.values():
        block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    tokens = torch.empty((plan.microbatch, plan.seq_len), dtype=torch.int64, device="meta")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        built(tokens, labels=tokens)
    standing = {t.untyped_storage()._cdata for t in (*built.parameters(), *built.buffers())}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    kept = sum(size for key, size in storages.items() if key not in standing)
    assert memory_of(plan, 0).activations == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("shape", ["moe", "dense", "gpt2", "llama"])
def test_activations_under_autocast(flex_stand_in, monkeypatch, shape):
    """One GPU without FSDP2; a CPU's autocast stands for CUDA's. Copies of weights count too."""
    monkeypatch.setattr(model, "build_masks", lambda *a: {"window": None, "full": None})
    monkeypatch.setattr(
        F, "rms_norm", lambda x, size, weight, eps: torch.ops.microtron_test.norm(x, weight)[0]
    )
    job = job_of(BF16, *PLAIN, "--model.args.experts_backend=loop", *SHAPES[shape])
    args = resolved_args(job).override({"attn_backend": "flex"})
    plan = replace(plan_of(job, 1, "cuda"), args=args)
    with torch.autocast("cpu", torch.bfloat16):
        kept = forward(job, args)
    told = memory_of(plan, 0)
    assert told.activations + told.gathered_weights == pytest.approx(kept, rel=0.05)
