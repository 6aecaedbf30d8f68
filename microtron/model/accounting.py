"""What a model costs: parameters by part, and FLOPs a token by part.

FLOPs count multiply-adds of matrix products as two, forward and backward as three forwards, and
only what is computed by design: a causal layer sees (S + 1) / 2 keys on average, a window layer at
most W, and a token its top-k experts. (PaLM, arXiv:2204.02311 appendix B, with these three
corrected.)
"""

from dataclasses import dataclass

from torch import nn

from microtron.model.args import ModelArgs


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; ``active`` counts top-k experts only and leaves the embedding look-up
    out.
    """

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int
    feed_forward_active: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.non_embedding + self.head

    @property
    def non_embedding(self) -> int:
        """Without embedding and head."""
        return self.attention + self.feed_forward + self.norms

    @property
    def active(self) -> int:
        """Those a token is multiplied with."""
        return self.attention + self.feed_forward_active + self.norms + self.head


def count_parameters(args: ModelArgs) -> Parameters:
    """Parameters by formula; `check` compares them with a real module."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention = args.dim * (2 * q + 2 * kv)
    attention += (q + 2 * kv + args.dim) * args.attention_bias + args.n_heads * args.sinks
    norm = norm_parameters(args)
    norms = 2 * norm + 2 * args.head_dim * args.qk_norm
    width, inward = args.expert_dim if args.moe else args.hidden_dim, _products(args) - 1
    one = (inward + 1) * args.dim * width + (inward * width + args.dim) * args.mlp_bias
    router = (args.dim + 1) * args.num_experts
    everything, active = (
        (router + args.num_experts * one, router + args.top_k * one) if args.moe else (one, one)
    )
    table = args.vocab_size * args.dim
    return Parameters(
        embedding=table + args.max_positions * args.dim,
        attention=args.n_layers * attention,
        feed_forward=args.n_layers * everything,
        norms=args.n_layers * norms + norm,
        head=0 if args.tie_embeddings else table,
        feed_forward_active=args.n_layers * active,
    )


def norm_parameters(args: ModelArgs) -> int:
    """Of one norm of the residual stream: a weight, and for LayerNorm a bias."""
    return args.dim * (2 if args.norm == "layer" else 1)


def _products(args: ModelArgs) -> int:
    """Products of a feed-forward: gate, up and down, or without a gate."""
    return 2 if args.activation == "gelu" else 3


def flops_per_token(args: ModelArgs, seq_len: int) -> dict[str, float]:
    """Training FLOPs a token by part (forward + backward): projections, scores, experts, router,
    head.
    """
    layers = [layer_flops(args, layer, seq_len) for layer in range(args.n_layers)]
    parts = {part: sum(layer[part] for layer in layers) for part in layers[0]}
    return parts | {"head": 6.0 * args.dim * args.vocab_size}


def layer_flops(args: ModelArgs, layer: int, seq_len: int) -> dict[str, float]:
    """The same of one layer, which has no head; window layers see fewer keys than full ones."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    width = args.top_k * args.expert_dim if args.moe else args.hidden_dim
    multiply_adds = {
        "projections": args.dim * (2 * q + 2 * kv),
        "scores": 2 * q * mean_keys(args, layer, seq_len),
        "feed_forward": _products(args) * args.dim * width,
        "router": args.dim * args.num_experts,
    }
    return {part: 6.0 * n for part, n in multiply_adds.items()}


def mean_keys(args: ModelArgs, layer: int, seq_len: int) -> float:
    """Keys a query sees on average in this layer, itself included."""
    window = min(args.window, seq_len) if args.mask_kind(layer) == "window" else seq_len
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def check(model: nn.Module, args: ModelArgs) -> Parameters:
    """Counts, asserted against the module tree.

    Raises:
        AssertionError: the formulas and the modules disagree.
    """
    counted = count_parameters(args)
    real = sum(p.numel() for p in model.parameters())
    assert counted.total == real, (
        f"accounting says {counted.total:,} parameters, modules hold {real:,}"
    )
    return counted
