"""The kernel classes of a training step, each with its bodies and what it must at least move and
compute; `kernel_speed.py` measures them.

A body is a function of the case's tensors. Bytes are the least traffic: every input read once and
every result written once, forward, then again with the gradients. FLOPs are those of matrix
products, a multiply-add as two, as `microtron/model/accounting.py` counts them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from microtron.accelerator import DEVICE_TYPE

import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from microtron import kernels
from microtron.model import attention_core
from microtron.model.accounting import layer_flops
from microtron.model.args import ModelArgs
from microtron.model.block import Block
from microtron.model.experts import Experts
from microtron.model.head import Head, full_loss
from microtron.model.masks import build_masks, predicate
from microtron.model.mlp import plain_swiglu, swiglu
from microtron.model.moe import MoE
from microtron.model.norms import rms_norm
from microtron.model.rope import RotaryEmbedding, rotate_both

# BlockMask's block, and FlexAttention's kernel options: what is tried besides the default. A mask's
# block must be a multiple of every tile, and of 128: for backward the compiler compares it with its
# own tiles, whatever the options say (torch/_inductor/kernel/flex/flex_attention.py).
TILES = {"BLOCK_M": 64, "BLOCK_N": 64}
BACKWARD_TILES = {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
FLEX = {
    "flex": (128, {}),
    "flex, safe rows": (128, {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True}),
    "flex, prescaled": (128, {"PRESCALE_QK": True}),
    "flex, tiles of 64": (128, TILES | BACKWARD_TILES),
    "flex, tiles of 64, 8 warps": (128, TILES | BACKWARD_TILES | {"num_warps": 8}),
    "flex, tiles of 128": (128, {"BLOCK_M": 128, "BLOCK_N": 128}),
    "flex, tiles of 128 x 32": (128, {"BLOCK_M": 128, "BLOCK_N": 32}),
    "flex, blocks of 256": (256, {}),
    "flex, TMA": (128, {"USE_TMA": True}),
}
LARGEST_SCORES = 16 * 2**30  # bytes in fp32, beyond which eager attention is left out


@dataclass
class Case:
    """One kernel class at one shape.

    Attributes:
        name: what is measured.
        tensors: handed to every body; gradients are taken for those that require them.
        bodies: choice -> body; the first one is the truth.
        moved: least bytes, forward and forward with backward.
        flops: likewise.
        backward: False where there is none (the optimizer).
        autocast: run bodies under autocast, as one device trains: fp32 weights, products in the
            compute dtype.
    """

    name: str
    tensors: list[torch.Tensor]
    bodies: dict[str, Callable]
    moved: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    backward: bool = True
    autocast: bool = False


@dataclass
class Shapes:
    """A micro-batch of a model on a device."""

    args: ModelArgs
    batch: int
    seq_len: int
    device: torch.device
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.batch * self.seq_len

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return self.dtype.itemsize

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers that want a gradient."""
        values = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return values.requires_grad_()


def cases(at: Shapes) -> list[Case]:
    """Every kernel class that the model has."""
    found = [_norm(at, at.dtype)]
    if at.dtype != torch.float32:  # the residual stream of a model that FSDP2 does not wrap
        found.append(_norm(at, torch.float32))
    if at.args.positions == "rope":
        found.append(_rope(at))
    found += [_swiglu(at, clamped=True), _swiglu(at, clamped=False), _loss(at)]
    found += [_attention(at, kind) for kind in ("window", "full")]
    if at.args.moe:
        found += [_experts(at), _routing(at)]
    return [*found, _optimizer(at)]


def _choices(plain: Callable, liger: Callable | None = None) -> dict[str, Callable]:
    bodies = {"torch": plain, "compile": kernels.compiled(plain)}
    if DEVICE_TYPE == "cpu" and plain in kernels.BY_HAND:
        bodies["cpu"] = kernels.BY_HAND[plain]
    return bodies if liger is None else bodies | {"liger": liger}


def _norm(at: Shapes, dtype: torch.dtype) -> Case:
    numbers, eps = at.tokens * at.args.dim, at.args.norm_eps
    bodies = {
        name: functools.partial(lambda body, x, w: body(x, w, eps), body)
        for name, body in _choices(rms_norm, kernels.liger_norm).items()
    }
    weight = at.random(at.args.dim, dtype=torch.float32)
    return Case(
        "norm" if dtype == at.dtype else "norm, fp32",
        [at.random(at.batch, at.seq_len, at.args.dim, dtype=dtype), weight],
        bodies,
        moved=(2 * numbers * dtype.itemsize, 5 * numbers * dtype.itemsize),
    )


def _rope(at: Shapes) -> Case:
    a = at.args
    table = RotaryEmbedding(a)
    table.init_weights(at.device)
    cos, sin = table(torch.arange(at.seq_len, device=at.device).unsqueeze(0))
    q, k = (at.random(at.batch, at.seq_len, n, a.head_dim) for n in (a.n_heads, a.n_kv_heads))
    moved = 2 * (q.numel() + k.numel()) * at.width + 2 * cos.numel() * 4
    bodies = _choices(rotate_both, kernels.liger_rotate)
    return Case("rope", [q, k, cos, sin], bodies, moved=(moved, 2 * moved))


def _swiglu(at: Shapes, clamped: bool) -> Case:
    a = at.args
    rows, width = (at.tokens * a.top_k, a.expert_dim) if a.moe else (at.tokens, a.hidden_dim)
    tensors = [at.random(rows, 2 * width)]
    if not clamped:
        bodies = _choices(plain_swiglu, kernels.liger_swiglu)
    else:
        constants = (a.swiglu_alpha, a.swiglu_limit)
        bodies = {
            name: functools.partial(lambda body, x: body(x, *constants), body)
            for name, body in _choices(swiglu).items()
        }
    moved = (3 * rows * width * at.width, 8 * rows * width * at.width)
    return Case("swiglu" if clamped else "swiglu, plain", tensors, bodies, moved)


def _loss(at: Shapes) -> Case:
    """Head and cross-entropy. Without gradients the loss alone is computed, with them all is."""
    a, n = at.args, at.tokens
    head = Head(a).to(at.device)
    nn.init.normal_(head.weight, std=a.dim**-0.5)
    labels = torch.randint(a.vocab_size, (n,), device=at.device)

    def ours(chunk_loss: Callable) -> Callable:
        def run(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            head.chunk_loss = chunk_loss
            return head(h.unsqueeze(0), labels.unsqueeze(0))

        return run

    plain = head.chunk_loss
    bodies = {"whole logits": lambda h, w: full_loss(h, w, labels, a.logit_softcap, a.z_loss)}
    bodies |= {name: ours(body) for name, body in _choices(plain).items()}
    bodies["liger"] = lambda h, w: kernels.liger_loss(h, w, labels, a.logit_softcap, a.z_loss)
    hidden, table = n * a.dim, a.vocab_size * a.dim
    forward = (hidden + table) * at.width
    product = 2.0 * n * a.dim * a.vocab_size
    return Case(
        "head + loss",
        [at.random(n, a.dim, dtype=torch.float32), head.weight],
        bodies,
        moved=(forward, forward + hidden * at.width + table * 4),
        flops=(product, 3 * product),
        autocast=True,
    )


def _attention(at: Shapes, kind: str) -> Case:
    a = at.args
    q, k, v = (
        at.random(at.batch, at.seq_len, n, a.head_dim)
        for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads)
    )
    sinks = at.random(a.n_heads, dtype=torch.float32) if a.sinks else None
    scale, here = a.head_dim**-0.5, at.device.type

    def body(core: Callable, mask: object) -> Callable:
        return lambda q, k, v, *sink: core(q, k, v, sink[0] if sink else None, mask, scale)

    names = ["eager"] * (q.numel() // a.head_dim * at.seq_len * 4 <= LARGEST_SCORES) + ["sdpa"]
    names += ["blocked"] * (here == "cpu")
    bodies = {}
    for name in names:
        mask = build_masks(name, at.seq_len, a.window, at.device)[kind]
        bodies[name] = body(attention_core.BACKENDS[name], mask)
    if here == "cuda":
        window = a.window if kind == "window" and a.window < at.seq_len else None
        for name, (block, options) in FLEX.items():
            bodies[name] = body(_flex(options), _block_mask(at, window, block))
    once = (2 * q.numel() + k.numel() + v.numel()) * at.width
    layer = a.window_pattern.find("S" if kind == "window" else "L")
    pattern = a if layer >= 0 else a.override({"window_pattern": "S" if kind == "window" else "L"})
    trained = at.tokens * layer_flops(pattern, max(layer, 0), at.seq_len)["scores"]
    tensors = [q, k, v] + ([] if sinks is None else [sinks])
    return Case(
        f"attention, {kind}", tensors, bodies, moved=(once, 3 * once), flops=(trained / 3, trained)
    )


def _block_mask(at: Shapes, window: int | None, block: int) -> object:
    create = torch.compile(create_block_mask)
    may_look = predicate(window, None)
    length = at.seq_len
    return create(may_look, None, None, length, length, device=at.device, BLOCK_SIZE=block)


def _flex(options: dict[str, object]) -> Callable:
    """`attention_core.flex` with other kernel options."""

    def attend(q, k, v, mask, scale):
        return flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options=options,
        )

    run = torch.compile(attend, fullgraph=True, dynamic=False)

    def core(q, k, v, sinks, mask, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, aux = run(q, k, v, mask, scale)
        if sinks is not None:
            kept = torch.sigmoid(aux.lse - sinks.float().view(1, -1, 1))
            out = out * kept.unsqueeze(-1).to(out.dtype)
        return out.transpose(1, 2)

    return core


def _experts(at: Shapes) -> Case:
    """Both products of every expert and what is between, for rows that the router sent at random.

    Weights are fp32 as one device keeps them; their cast to the compute dtype is in the time.
    """
    a, rows = at.args, at.tokens * at.args.top_k
    sent = torch.randint(a.num_experts, (rows,), device=at.device)
    counts = torch.bincount(sent, minlength=a.num_experts)
    slow = Experts(a.override({"experts_backend": "loop"})).to(at.device)
    for parameter in slow.parameters():
        nn.init.normal_(parameter, std=a.dim**-0.5)
    modules = {"loop": slow}
    if a.dim % 8 == a.expert_dim % 8 == 0:
        for name in ("grouped_mm", "grouped_mm, compiled swiglu"):
            modules[name] = Experts(a.override({"experts_backend": "grouped_mm"})).to(at.device)
            for key, parameter in slow.named_parameters():
                setattr(modules[name], key, parameter)  # the same gradients, and no more memory
        modules["grouped_mm, compiled swiglu"].swiglu = kernels.compiled(swiglu)
        if at.device.type == "cpu":  # its operator has a body of its own
            del modules["grouped_mm, compiled swiglu"]
    bodies = {n: functools.partial(lambda m, x, *_: m(x, counts), m) for n, m in modules.items()}
    weights = a.num_experts * 3 * a.dim * a.expert_dim
    product = 6.0 * rows * a.dim * a.expert_dim
    forward = (2 * rows * a.dim + weights) * at.width
    return Case(
        "experts",
        [at.random(rows, a.dim), *slow.parameters()],
        bodies,
        moved=(forward, 2 * forward + rows * a.dim * at.width + weights * 4),
        flops=(product, 3 * product),
        autocast=True,
    )


class _Scale(nn.Module):
    """Experts that only scale each row, so that it matters which row a weight belongs to. (Those of
    a CPU gather and add up by themselves; here they do not.)
    """

    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        self.factors = factors  # [M, 1]

    def permutes(self, x: torch.Tensor) -> bool:
        return False

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return x * self.factors


def _routing(at: Shapes) -> Case:
    """Router, permutation and combination, with one pass over the rows between."""
    a, n = at.args, at.tokens
    moe = MoE(a).to(at.device)
    moe.experts = _Scale(at.random(n * a.top_k, 1).detach())
    moe.init_buffers()
    nn.init.normal_(moe.router.gate.weight, std=a.dim**-0.5)
    nn.init.zeros_(moe.router.gate.bias)

    def plain(x: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        """The slow twin: gathered by indexing, added up row by row."""
        routing = moe.router(x, moe.expert_bias, moe.load_fractions, None)
        order = routing.experts.flatten().argsort(stable=True)
        rows = moe.experts(x[order // a.top_k], routing.counts)
        rows = rows * routing.weights.flatten()[order].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, order // a.top_k, rows)

    def ours(x: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        return moe(x.unsqueeze(0))[0].squeeze(0)

    bodies = {"index_add": plain, "torch": ours, "compile": torch.compile(ours)}
    one, rows = n * a.dim * at.width, n * a.top_k * a.dim * at.width
    return Case(
        "router + permute + combine",
        [at.random(n, a.dim), *moe.router.parameters()],
        bodies,
        moved=(3 * one + 4 * rows, 6 * one + 9 * rows),
        flops=(2.0 * n * a.dim * a.num_experts, 6.0 * n * a.dim * a.num_experts),
    )


def _optimizer(at: Shapes) -> Case:
    """A step of AdamW on the parameters of one block: weight, gradient and both moments read, all
    but the gradient written, fp32.
    """
    block = Block(0, at.args).to(at.device)
    parameters = list(block.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    bodies = {}
    for name in ("for loop", "foreach", "fused"):
        how = {"foreach": name == "foreach", "fused": name == "fused"}
        adam = torch.optim.AdamW(parameters, lr=1e-4, **how)
        bodies[name] = functools.partial(lambda a, *_: a.step(), adam)
    size = sum(p.numel() for p in parameters)
    return Case("optimizer, one block", parameters, bodies, (28 * size, 28 * size), backward=False)
