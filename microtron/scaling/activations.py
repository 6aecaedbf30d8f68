"""What autograd keeps of a forward, in bytes, counted off the model's code.

N tokens of a microbatch are S/cp of each row; N' = N / tp are this rank's own between products
(sequence parallel). M rows reach this rank's experts. e is the bytes of a compute-dtype number; 4
stands for what is fp32 always. Each term names its tensor. Real forwards hold the counts to account
(`benchmarks/estimate.py`, tests/unit/test_estimate.py).

Three precisions differ in what they copy. fp32: nothing. FSDP2's mixed precision: the residual is
bf16, norms and router copy it to fp32. autocast (bf16 without FSDP2): the residual is fp32, each
product copies its input to bf16.

Compiled blocks keep less: the compiler's min-cut partition computes pointwise steps again in
backward, so there only what goes into and comes out of products is counted.
"""

from microtron.model.attention_core import resolve_backend
from microtron.model.cpu_pointwise import PART
from microtron.model.cpu_product import has_onednn
from microtron.scaling.plan import Plan, Stage

FP32, INT64 = 4, 8
_SINK = 8  # attention_core's sdpa widens heads by this for the sink
_FEW = 64  # keys in sight with which `blocked` hands a layer to sdpa


def kept_bytes(plan: Plan, stage: Stage) -> int:
    """A stage's blocks after the forward of one microbatch, and the rotary tables they share."""
    rows = plan.microbatch if plan.documents else 1
    rotated = plan.args.positions == "rope"
    total = 2 * FP32 * rows * plan.seq_len * plan.args.head_dim * rotated
    for position, layer in enumerate(stage.layers):
        mode = mode_of(plan, position)
        if mode == "none":
            total += block_bytes(plan, layer)
        else:
            total += _hidden(plan)  # the block's input
            total += selective_bytes(plan, layer) if mode == "selective" else 0
    return total


def mode_of(plan: Plan, position: int) -> str:
    """none, full or selective (by operator) for the n-th block of a stage."""
    if plan.checkpointing == "selective" and plan.option.isdecimal():
        return "none" if (position + 1) % int(plan.option) else "full"
    return {"memory_budget": "none"}.get(plan.checkpointing, plan.checkpointing)


def recomputed_bytes(plan: Plan, position: int, layer: int) -> int:
    """What backward makes of one block (the n-th of its stage), while it passes it: all that it
    computes again, and the gradients around a SwiGLU by hand with what a part of it takes.
    """
    mode, args = mode_of(plan, position), plan.args
    gradients = 0
    if not args.moe and _swiglu_by_hand(plan):
        numbers = plan.tokens * args.hidden_dim // plan.layout.tp
        parts = 4 * min(numbers, PART)  # of six, two are where `down` has let go of its input
        gradients = plan.width * (3 * numbers + parts)
    if mode == "none":
        return gradients
    kept = selective_bytes(plan, layer) if mode == "selective" else 0
    return gradients + max(0, block_bytes(plan, layer) - kept)


def boundary_bytes(plan: Plan, stage: Stage, in_flight: int, own: set[int]) -> int:
    """What a pipeline stage has besides: buffers for what each microbatch of a step receives, and
    what it sends. A buffer in use is the first block's input, counted there. Schedules of one
    stage a rank give up what was sent when the next is on its way, the others at the end of the
    step. Stages of the same rank (``own``) hand over without buffers.
    """
    if plan.layout.pp == 1:
        return 0
    m, looped = plan.pipelined, len(plan.stages) > plan.layout.pp
    before = (m - in_flight) * (2 if looped else 1)  # received; gradients sent
    after = m + (m if looped else in_flight)  # gradients to come; outputs
    before *= not stage.first and stage.index - 1 not in own
    after *= not stage.last and stage.index + 1 not in own
    return _hidden(plan) * (before + after + (0 if looped else 2))


def end_bytes(plan: Plan) -> int:
    """After the blocks: the last norm's input, and the gradients that the loss has made already
    (`model/head.py`): of the hidden states, gathered over tp, and of the head's weight.
    """
    args = plan.args
    columns = -(-args.vocab_size // plan.layout.tp)
    weight = plan.width if plan.wrapped else FP32
    of_hidden = plan.residual * plan.tokens * args.dim
    return _norm_input(plan) + of_hidden + weight * columns * args.dim


def block_bytes(plan: Plan, layer: int) -> int:
    """One block of which nothing is computed again (but by the compiler)."""
    if plan.compiled:
        return compiled_bytes(plan, layer)
    after = moe_bytes(plan) if plan.args.moe else feed_forward_bytes(plan)
    return attention_bytes(plan, layer) + after


def _hidden(plan: Plan) -> int:
    """Hidden states between blocks: N' dim."""
    return plan.residual * plan.own_tokens * plan.args.dim


def _norm_input(plan: Plan) -> int:
    """RMSNorm: x in fp32 and 1/rms. LayerNorm: the mean too."""
    layer = plan.args.norm == "layer"
    copies = 1 if layer else _norm_copies(plan)
    return FP32 * plan.own_tokens * (copies * plan.args.dim + 1 + layer)


def _norm_copies(plan: Plan) -> int:
    """x, and x/rms where nothing fuses them: torch's RMSNorm on a CPU."""
    return 1 if plan.kind == "cuda" or "norm" in plan.by_hand else 2


def _product_input(plan: Plan) -> int:
    """The norm's output, gathered over tp, in the compute dtype: N dim."""
    return plan.width * plan.tokens * plan.args.dim


def attention_bytes(plan: Plan, layer: int) -> int:
    """The first half of a block."""
    args, n, e = plan.args, plan.tokens, plan.width
    heads, kv = _heads(plan)
    q = n * heads * args.head_dim
    total = _norm_input(plan) + _product_input(plan)
    if args.qk_norm:  # as above, on heads
        vectors = n * (heads + args.n_kv_heads // plan.layout.tp)
        total += FP32 * vectors * (_norm_copies(plan) * args.head_dim + 1)
    total += _core_bytes(plan, layer)
    if plan.layout.cp > 1:
        if args.positions == "rope":  # v lies in one tensor with q and k, as they came
            total += e * (q + n * kv * args.head_dim)
        backend = resolve_backend(args.attn_backend, plan.kind)
        total += 0 if backend == "flex" else e * q  # what goes back, beside what `wo` gets
    return total


def _heads(plan: Plan) -> tuple[int, int]:
    """Query and kv heads of this rank while it attends, times cp: it then has all of S."""
    tp = plan.layout.tp
    return plan.args.n_heads // tp, max(plan.args.n_kv_heads // tp, plan.layout.cp)


def _core_bytes(plan: Plan, layer: int) -> int:
    """Rotated q and k, v, the output (which `wo` keeps), and what the backend makes."""
    args, n, s = plan.args, plan.tokens, plan.seq_len
    heads, kv = _heads(plan)
    d, e = args.head_dim, plan.width
    window = args.mask_kind(layer) == "window" and args.window < s
    backend = resolve_backend(args.attn_backend, plan.kind)
    keys = args.window if window else s
    if backend == "blocked" and (plan.documents or s <= _FEW <= keys):
        backend = "sdpa"
    masked = plan.documents or window
    square = s * s * (plan.microbatch if plan.documents else 1)
    if backend == "flex":  # q, k, v, out, logarithm; for the sink: gated out, its factor twice
        sink = args.sinks * heads * (e * d + FP32 + e)
        return n * (e * d * (2 * heads + 2 * kv) + heads * FP32 + sink)
    if backend == "blocked":  # q, k, v, out, logarithm
        return n * (e * d * (2 * heads + 2 * kv) + FP32 * heads)
    if backend == "sdpa":  # q, k, v, out widened for the sink; out again; the mask as numbers
        wide = d + _SINK * args.sinks
        again = e * heads * d if args.sinks else 0
        core = n * (e * wide * (2 * heads + 2 * kv) + FP32 * heads + again)
        return core + (e * square if masked else 0)
    # eager: softmax [S, S + 1] in fp32 (and in bf16), q, repeated k and v, out
    scores = n * heads * (s + 1) * (FP32 + (e if e < FP32 else 0))
    return scores + n * heads * d * 4 * e + square


def feed_forward_bytes(plan: Plan) -> int:
    """The second half of a dense block: the norm, and some widths of the activation."""
    width = plan.args.hidden_dim // plan.layout.tp
    activation = _widths(plan) * width * plan.tokens * plan.width
    return _norm_input(plan) + _product_input(plan) + activation


# clamped_swiglu: gate, up; clamped gate; up + 1; sigmoid; gate * sigmoid; the product, which `down`
# keeps. swiglu: gate, up; silu; the product. gelu: what goes in, what comes out.
_WIDTHS = {"clamped_swiglu": 7, "swiglu": 4, "gelu": 2}


def _widths(plan: Plan) -> int:
    """The above; by hand (`cpu_pointwise.py`) gate, up and the product are enough."""
    return 3 if _swiglu_by_hand(plan) else _WIDTHS[plan.args.activation]


def _swiglu_by_hand(plan: Plan) -> bool:
    clamped = plan.args.activation == "clamped_swiglu"
    in_graph = plan.compiled and plan.layout.ep == 1
    return clamped and "swiglu" in plan.by_hand and not in_graph


def _by_operator(plan: Plan) -> bool:
    """Whether experts are the operator of `cpu_experts.py`."""
    return plan.kind == "cpu" and plan.args.grouped_experts


def _inward(plan: Plan) -> int:
    """Width of the first product of a dense feed-forward, on this rank: gate and up, or up."""
    gated = plan.args.activation != "gelu"
    return (1 + gated) * plan.args.hidden_dim // plan.layout.tp


def expert_rows(plan: Plan) -> tuple[int, int]:
    """(tokens that this rank hands to experts, rows that its experts get). Evenly loaded, the rows
    that come are as many as those that go: tokens x top_k.
    """
    tokens = plan.tokens if plan.expert_split > 1 else plan.own_tokens
    return tokens, tokens * plan.args.top_k


def moe_bytes(plan: Plan) -> int:
    """The second half of a block with experts."""
    args, e = plan.args, plan.width
    tokens, rows = expert_rows(plan)
    width = args.expert_dim // plan.expert_split
    total = _norm_input(plan) + FP32 * plan.own_tokens * args.dim  # the router's input
    total += plan.own_tokens * (2 * FP32 * args.num_experts + (FP32 + INT64) * args.top_k)
    total += 2 * INT64 * rows  # order, slots
    operator = _by_operator(plan)
    if operator and plan.layout.ep == 1:  # it takes rows from tokens by itself, and adds them up
        shared = e == FP32 and plan.expert_split == 1  # with the router
        total += 0 if shared else e * tokens * args.dim
    else:
        total += e * rows * args.dim  # what the experts get
        total += e * tokens * args.top_k * args.dim  # what they gave, for the routing weights
    if operator:
        total += 2 * e * rows * width  # gate and up; the operator makes the rest again
        total += FP32 * rows  # routing weights by row
        total += INT64 * rows if plan.layout.ep > 1 else 0  # which row is whose
    else:
        total += _widths(plan) * e * rows * width
    if plan.layout.ep > 1:
        total += 2 * INT64 * rows  # sorting what came, and back
    return total


def selective_bytes(plan: Plan, layer: int) -> int:
    """Results that `SAVED_OPS` of parallel/apply.py keeps: products with bias and every second one
    without, attention, experts, reduce-scatters and all-to-alls.
    """
    args, n, own, e = plan.args, plan.tokens, plan.own_tokens, plan.width
    tp, (heads, kv) = plan.layout.tp, _heads(plan)
    q, kv_width = heads * args.head_dim, args.n_kv_heads // tp * args.head_dim
    alone = 0  # products without bias so far: TorchTitan keeps the 1st, 3rd, ..
    by_onednn = plan.kind == "cpu" and e == FP32 and has_onednn()

    def product(numbers: int, bias: bool) -> int:
        nonlocal alone
        alone += not bias
        return e * numbers if bias or alone % 2 or by_onednn else 0

    total = sum(product(n * w, args.attention_bias) for w in (q, kv_width, kv_width))
    total += n * heads * (args.head_dim * e + FP32)
    if plan.layout.cp > 1:
        total += e * n * (2 * q + 2 * kv * args.head_dim)
    total += product(n * args.dim, args.attention_bias and tp == 1)
    scattered = e * own * args.dim
    total += scattered if tp > 1 else 0
    if not args.moe:
        total += product(n * _inward(plan), args.mlp_bias)
        total += product(n * args.dim, args.mlp_bias and tp == 1)
        return total + (scattered if tp > 1 else 0)
    tokens, rows = expert_rows(plan)
    total += FP32 * own * args.num_experts
    made = tokens if _by_operator(plan) and plan.layout.ep == 1 else rows
    total += e * (rows * 2 * args.expert_dim // plan.expert_split + made * args.dim)
    total += scattered if plan.expert_split > 1 else 0
    if plan.layout.ep > 1:
        total += e * (rows + tokens * args.top_k) * args.dim
    return total


def compiled_bytes(plan: Plan, layer: int) -> int:
    """One compiled block: its input, the output of `wo`, each norm's 1/rms and output, what
    attention keeps, what goes into and comes out of the feed-forward's products.
    """
    args, e = plan.args, plan.width
    own, gathered = plan.own_tokens * args.dim, plan.tokens * args.dim
    numbers = 4 if args.norm == "layer" else 2  # 1/rms of each norm, or mean and 1/std
    total = _hidden(plan) + e * own + e * gathered + numbers * FP32 * plan.own_tokens
    total += _core_bytes(plan, layer)
    if not args.moe:
        width = args.hidden_dim // plan.layout.tp
        return total + e * (gathered + plan.tokens * (_inward(plan) + width))
    tokens, rows = expert_rows(plan)
    total += FP32 * own  # the router's input
    total += plan.own_tokens * (FP32 * args.num_experts + (FP32 + INT64) * args.top_k)
    if _by_operator(plan) and plan.layout.ep == 1:
        width = args.expert_dim // plan.expert_split
        return total + 2 * INT64 * rows + FP32 * rows + 2 * e * rows * width
    # gate and up, and the product; with expert parallel the experts are not in the graph
    widths = 3 if plan.layout.ep == 1 else _widths(plan)
    total += e * rows * (args.dim + widths * args.expert_dim // plan.expert_split)
    return total + e * tokens * args.top_k * args.dim + 3 * INT64 * rows
