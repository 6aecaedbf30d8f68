"""The host never waits for the device in a step, but once, for the norm (`Stepper._clip`).

Without a GPU: the way that CUDA takes, on the meta device, whose tensors have no values to wait
for, watched for operators that would need one and for copies between host and device. With one:
torch's own check.
"""

import contextlib
from types import SimpleNamespace

from microtron.accelerator import DEVICE_TYPE  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import build, tiny_args, tokens_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.config.job_config import Optimizer

from microtron.batch import model_inputs
from microtron.model import attention_core, masks
from microtron.model.model import Transformer
from microtron.optim.balance import ExpertBalance
from microtron.optim.build import GroupedOptimizers
from microtron.parallel.norm import clip, grad_norm

# The host must see a value, or how many there are.
ASKS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class Waits(Exception):
    """The host would wait for the device here."""


class OfOperators(TorchDispatchMode):
    """Refuses operators that would make the host wait, if meta were a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = {x.is_meta for x in tensors}
        if "device" in kwargs and kwargs["device"] is not None:
            on_device.add(torch.device(kwargs["device"]).type == "meta")
        name = func._opname
        if True in on_device:
            counted = name == "repeat_interleave" and kwargs.get("output_size") is None
            found = any(x.dtype == torch.bool for x in tensors[1:]) and name.startswith("index")
            crosses = False in on_device and name.startswith(("_to_copy", "copy_", "index"))
            if name in ASKS or counted or found or crosses:
                raise Waits(name)
        return func(*args, **kwargs)


class OfData(TorchFunctionMode):
    """Refuses tensors made from Python numbers: a copy from memory that is not pinned."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fresh = func in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)
        out = func(*args, **(kwargs or {}))
        if fresh and out.is_meta:
            raise Waits(func.__name__)
        return out


@contextlib.contextmanager
def no_wait():
    """Raises `Waits` where the host would wait for "meta"."""
    with OfData(), OfOperators():
        yield


def flex_stand_in(q, k, v, block_mask, scale, enable_gqa, return_aux):
    """FlexAttention's shapes and gradients; it has no body for meta."""
    mixed = q * (k.sum() + v.sum())
    return mixed, SimpleNamespace(lse=mixed.float().sum(-1))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Kernels and precision of a GPU: flex, grouped GEMM, bf16 products by autocast."""
    monkeypatch.setattr(attention_core, "_compiled_flex", lambda: flex_stand_in)
    monkeypatch.setattr(masks, "block_mask", lambda *options: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: True)  # unknown to "meta"
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *a: torch.bfloat16)

    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())


def step(args, device="meta"):
    """Forward, backward, norm, clip, balance: all of a step but the optimizer's kernel."""
    with torch.device(device):
        model = Transformer(args)
    shape = (2, 16)
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    positions = torch.empty(shape, dtype=torch.int64, device=device)
    with no_wait():
        inputs, extra = model_inputs({"input": tokens, "positions": positions}, tokens)
        (model(inputs, **extra) / torch.full((), 32.0, device=device)).backward()
        norm = grad_norm(list(model.parameters()))
        clip(list(model.parameters()), norm, 1.0)
        ExpertBalance([model]).step()
    assert all(p.grad is not None for p in model.parameters())


CUDA = {"attn_backend": "flex", "experts_backend": "grouped_mm"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"load_balance": "aux_loss", "router_z_loss_coef": 0.1, "z_loss": 0.1},
        {"load_balance": "bias", "qk_norm": True, "logit_softcap": 3.0},
        {"load_balance": "aux_loss", "balance_stats": "forward", "sinks": False},
        {"num_experts": 0},
    ],
    ids=["aux_loss", "bias", "forward", "dense"],
)
def test_a_step_never_waits(as_on_cuda, overrides):
    step(tiny_args(**CUDA, **overrides))


def test_the_loop_over_experts_does(as_on_cuda):
    with pytest.raises(Waits, match="_to_copy"):  # tolist
        step(tiny_args(**CUDA | {"experts_backend": "loop"}))


WAITS = {
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to": lambda x: x * torch.ones(3).to(x.device),
    "cpu": lambda x: x.cpu(),
    "copy in": lambda x: x.copy_(torch.ones(3)),
    "copy out": lambda x: torch.ones(3).copy_(x),
    "mask": lambda x: x[x > 0],
    "mask to write": lambda x: x.index_put_((x > 0,), x.sum()),
    "index of the host": lambda x: x[torch.arange(2)],
    "nonzero": lambda x: x.nonzero(),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "if": lambda x: bool(x.sum() > 0),
    "item": lambda x: x.sum().item(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_every_kind_of_wait_is_seen(wait):
    x = torch.empty(3, device="meta")
    with pytest.raises(Waits), no_wait():
        wait(x)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_torch_sees_no_wait_on_cuda(documents, compiled):
    """Forward, backward, norm, clip, balance and the fused optimizer, after two steps that compile
    and warm up."""
    args = tiny_args(dim=64, head_dim=16, expert_dim=64, load_balance="aux_loss", **CUDA)
    model = build(args).cuda()
    model.init_buffers(torch.device("cuda"))
    if compiled:
        for block in model.layers.values():
            block.compile(fullgraph=True)
    optimizers = GroupedOptimizers([model], Optimizer())
    balance = ExpertBalance([model])
    parameters = list(model.parameters())
    for number in range(3):
        tokens = tokens_of(args, seq_len=256, seed=number).pin_memory()
        starts = torch.arange(256).expand(2, 256) % (100 + number)
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            moved = {"input": tokens.to("cuda", non_blocking=True)}
            if documents:
                moved["positions"] = starts.contiguous().pin_memory().to("cuda", non_blocking=True)
            inputs, extra = model_inputs(moved, moved["input"])
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(inputs, **extra) / torch.full((), 512.0, device="cuda")
            loss.backward()
            clip(parameters, grad_norm(parameters), 1.0)
            balance.step()
            optimizers.step()
            optimizers.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
