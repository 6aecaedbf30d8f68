"""Named sizes. Each look-up returns a fresh copy, so that a run may change its own."""

from collections.abc import Callable

from microtron.errors import UserError
from microtron.model.args import ModelArgs

GPT2_VOCAB = 50304  # 50257 rounded up to a multiple of 64
O200K_HARMONY_VOCAB = 201088


def _debug() -> ModelArgs:
    """Learns text on a laptop CPU in a minute: 1.1M parameters, 0.6M active."""
    return ModelArgs(window=64)


def _gpt_oss_656m() -> ModelArgs:
    """A quarter of a gpt-oss-20b layer's width squared, 8 experts: 651M without embeddings."""
    return ModelArgs(
        dim=1440,
        n_layers=12,
        n_heads=16,
        n_kv_heads=8,
        head_dim=64,
        vocab_size=GPT2_VOCAB,
        num_experts=8,
        top_k=4,
        expert_dim=1440,
        window=128,
        embed_std=0.02,
    )


def _gpt_oss_656m_dense() -> ModelArgs:
    """The dense twin: the same FLOPs a token, one feed-forward as wide as the active experts."""
    return _gpt_oss_656m().override({"num_experts": 0, "hidden_dim": 4 * 1440})


def _gpt_oss(n_layers: int, num_experts: int) -> ModelArgs:
    return ModelArgs(
        dim=2880,
        n_layers=n_layers,
        n_heads=64,
        n_kv_heads=8,
        head_dim=64,
        vocab_size=O200K_HARMONY_VOCAB,
        num_experts=num_experts,
        top_k=4,
        expert_dim=2880,
        window=128,
        rope_theta=150000.0,
        rope_factor=32.0,
        rope_original_len=4096,
        embed_std=0.02,
    )


def _gpt_oss_20b() -> ModelArgs:
    """gpt-oss-20b as published (arXiv:2508.10925, table 1): 20.91B parameters."""
    return _gpt_oss(n_layers=24, num_experts=32)


def _gpt_oss_120b() -> ModelArgs:
    """gpt-oss-120b as published: 116.83B parameters."""
    return _gpt_oss(n_layers=36, num_experts=128)


def _gpt2(n_layers: int, n_heads: int) -> ModelArgs:
    """As published (Radford et al. 2019); a vocabulary of GPT2_VOCAB can be split over ranks."""
    dim = 64 * n_heads
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=64,
        vocab_size=50257,
        tie_embeddings=True,
        norm="layer",
        positions="learned",
        max_positions=1024,
        activation="gelu",
        sinks=False,
        window_pattern="L",
        num_experts=0,
        hidden_dim=4 * dim,
        embed_std=0.02,
    )


def _gpt2_124m() -> ModelArgs:
    """GPT-2 (small): 124.4M parameters, a tied head counted once."""
    return _gpt2(n_layers=12, n_heads=12)


def _gpt2_355m() -> ModelArgs:
    """GPT-2 Medium: 354.8M parameters."""
    return _gpt2(n_layers=24, n_heads=16)


def _gpt2_774m() -> ModelArgs:
    """GPT-2 Large, the baseline to beat: 774.0M parameters."""
    return _gpt2(n_layers=36, n_heads=20)


def _gpt2_1558m() -> ModelArgs:
    """GPT-2 XL: 1,557.6M parameters."""
    return _gpt2(n_layers=48, n_heads=25)


FLAVORS: dict[str, Callable[[], ModelArgs]] = {
    "debug": _debug,
    "gpt_oss_656m": _gpt_oss_656m,
    "gpt_oss_656m_dense": _gpt_oss_656m_dense,
    "gpt_oss_20b": _gpt_oss_20b,
    "gpt_oss_120b": _gpt_oss_120b,
    "gpt2_124m": _gpt2_124m,
    "gpt2_355m": _gpt2_355m,
    "gpt2_774m": _gpt2_774m,
    "gpt2_1558m": _gpt2_1558m,
}


def flavor(name: str) -> ModelArgs:
    """A fresh copy of a flavor.

    Raises:
        UserError: there is no such flavor.
    """
    if name not in FLAVORS:
        raise UserError(f"model.flavor = {name!r} is unknown: choose one of {', '.join(FLAVORS)}")
    return FLAVORS[name]()
