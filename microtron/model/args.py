"""Every architecture choice, typed and checked: the one source that flavors, `[model.args]`,
`--model.args.*` and `--help` are generated from.

A wrong value is refused when the dataclass is built, in one line that names the field, the value
and the remedy, so that nothing is allocated or written first.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from microtron.errors import UserError


@dataclass
class ModelArgs:
    """A decoder-only transformer, gpt-oss style (arXiv:2508.10925) unless told otherwise; GPT-2's
    and Llama's shapes are choices of its fields.

    Raises:
        UserError: a field is out of range or two fields contradict each other.
    """

    dim: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of transformer blocks."""
    vocab_size: int = 264
    """Rows of the embedding and of the head; at least the tokenizer's size."""
    tie_embeddings: bool = False
    """Let the head share the embedding's weights."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv:1910.07467), or LayerNorm with a bias (arXiv:1607.06450; GPT-2)."""
    norm_eps: float = 1e-5
    """Epsilon of every norm."""

    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int = 2
    """Key/value heads; each serves n_heads / n_kv_heads query heads (GQA, arXiv:2305.13245)."""
    head_dim: int = 32
    """Width of a head; heads x head_dim need not equal dim."""
    attention_bias: bool = True
    """Biases on the q, k, v and o projections."""
    qk_norm: bool = False
    """RMSNorm on queries and keys before RoPE."""
    sinks: bool = True
    """One learned logit a head in the softmax denominator: a head may attend to nothing."""
    window: int = 128
    """Keys a window layer sees, the token itself included."""
    window_pattern: str = "SL"
    """Repeated over the layers: S (short) is a window layer, L (long) a full one."""
    attn_backend: Literal["auto", "eager", "sdpa", "flex", "blocked"] = "auto"
    """eager is the truth; auto takes flex on CUDA and blocked on CPU."""

    positions: Literal["rope", "learned"] = "rope"
    """rope rotates queries and keys; learned adds a table to the embedding (GPT-2)."""
    max_positions: int = 0
    """Rows of the learned table: the longest sequence; 0 with rope."""
    rope_theta: float = 150000.0
    """Base of the rotary frequencies."""
    rope_factor: float = 1.0
    """Context extension; 1 is plain RoPE."""
    rope_scaling: Literal["yarn", "llama3"] = "yarn"
    """How rope_factor extends: YaRN (arXiv:2309.00071), or Llama 3.1's rule (arXiv:2407.21783)."""
    rope_original_len: int = 4096
    """Context length before extension, in tokens."""
    rope_beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is kept; Llama 3.1 has 4."""
    rope_beta_slow: float = 1.0
    """Rotations below which a frequency is divided by rope_factor."""

    activation: Literal["clamped_swiglu", "swiglu", "gelu"] = "clamped_swiglu"
    """Of the feed-forward: gpt-oss's, silu(gate) * up (Llama), or gelu by tanh without a gate
    (GPT-2). Experts have the first alone."""
    hidden_dim: int = 0
    """Width of the dense feed-forward; used when num_experts is 0."""
    num_experts: int = 4
    """Experts of a layer; 0 makes the model dense."""
    top_k: int = 2
    """Experts a token is sent to."""
    expert_dim: int = 128
    """Width of one expert."""
    mlp_bias: bool = True
    """Biases in the experts (or in the dense feed-forward)."""
    swiglu_alpha: float = 1.702
    """clamped_swiglu: sigmoid gain of the gate."""
    swiglu_limit: float = 7.0
    """clamped_swiglu: clamp of gate (above) and up (both sides)."""
    experts_backend: Literal["auto", "loop", "grouped_mm"] = "auto"
    """loop is the truth; auto takes grouped_mm."""

    load_balance: Literal["aux_loss", "bias", "none"] = "aux_loss"
    """How experts are kept busy: Switch loss, selection bias (arXiv:2408.15664), or nothing."""
    aux_loss_coef: float = 0.01
    """Weight of the Switch loss E * sum(f * P), which is 1 at perfect balance."""
    balance_stats: Literal["step", "forward"] = "step"
    """Where the Switch loss takes f from. step: the whole global batch of the step before, the same
    for every rank and micro-batch. forward: the tokens of this very forward pass."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(router logits)^2) (arXiv:2202.08906)."""
    bias_update_rate: float = 1e-3
    """load_balance = bias: step by which an expert's selection bias moves."""

    logit_softcap: float = 0.0
    """Cap logits at c * tanh(logits / c); 0 is off."""
    z_loss: float = 0.0
    """Weight of the z-loss on the vocabulary logits, logsumexp^2 a token; 0 is off."""
    loss_chunk_tokens: int = 2048
    """Tokens whose logits exist at once while the loss is computed."""

    embed_std: float = 1.0
    """Standard deviation of the embedding at initialisation."""
    init_scale: float = 1.0
    """Other matrices start at init_scale / sqrt(fan_in), residual outputs at 1 / sqrt(2 n_layers)
    of that.
    """

    def __post_init__(self) -> None:
        self.validate()

    @property
    def moe(self) -> bool:
        """Whether feed-forwards are mixtures of experts."""
        return self.num_experts > 0

    @property
    def grouped_experts(self) -> bool:
        """Whether experts are grouped products, which want rows of whole multiples of 16 bytes."""
        return self.experts_backend != "loop" and self.dim % 8 == self.expert_dim % 8 == 0

    @property
    def attn_type(self) -> str:
        """The name TorchTitan's helpers ask for."""
        return "flex" if self.attn_backend == "flex" else "sdpa"

    def mask_kind(self, layer: int) -> str:
        """``window`` or ``full`` for a layer index."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        return "window" if letter == "S" else "full"

    def override(self, values: dict[str, Any]) -> "ModelArgs":
        """A checked copy with some fields replaced.

        Raises:
            UserError: a value cannot work, or there is no such field.
        """
        unknown = values.keys() - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise UserError(
                f"model.args.{min(unknown)} does not exist; the fields are those of ModelArgs"
            )
        return dataclasses.replace(self, **values)

    def validate(self) -> None:
        """Checks each field, then what they say together.

        Raises:
            UserError: with the field, the value and the remedy.
        """
        self._check_types()
        for name in (
            "dim",
            "n_layers",
            "vocab_size",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "window",
            "rope_original_len",
            "loss_chunk_tokens",
        ):
            self._require(name, getattr(self, name) >= 1, "give a positive number")
        self._require("rope_theta", self.rope_theta > 1, "give a number above 1")
        for name in (
            "norm_eps",
            "rope_beta_fast",
            "rope_beta_slow",
            "swiglu_alpha",
            "swiglu_limit",
            "embed_std",
            "init_scale",
        ):
            self._require(name, getattr(self, name) > 0, "give a number above 0")
        for name in (
            "num_experts",
            "hidden_dim",
            "max_positions",
            "aux_loss_coef",
            "router_z_loss_coef",
            "bias_update_rate",
            "logit_softcap",
            "z_loss",
        ):
            self._require(name, getattr(self, name) >= 0, "give 0 (off) or a positive number")
        self._check_attention()
        self._check_positions()
        self._check_feed_forward()

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif field.type in (int, float, bool, str):
                self._require(
                    field.name,
                    type(value) is field.type,
                    f"give a value of type {field.type.__name__}",
                )
                if field.type is float:
                    self._require(
                        field.name,
                        value == value and abs(value) != float("inf"),
                        "give a finite number",
                    )
            else:
                choices = field.type.__args__
                self._require(field.name, value in choices, f"choose one of {', '.join(choices)}")

    def _check_attention(self) -> None:
        self._require(
            "head_dim",
            self.head_dim % 8 == 0,
            "give a multiple of 8 (attention kernels and the rotation need it)",
        )
        self._require(
            "n_kv_heads",
            self.n_heads % self.n_kv_heads == 0,
            f"give a divisor of n_heads = {self.n_heads}",
        )
        self._require(
            "window_pattern",
            bool(self.window_pattern) and set(self.window_pattern) <= {"S", "L"},
            "write it with S (window layer) and L (full layer), such as SL or SSSL",
        )

    def _check_positions(self) -> None:
        if self.positions == "learned":
            self._require(
                "max_positions",
                self.max_positions >= 1,
                "positions = learned needs a table: give the longest sequence",
            )
            self._require(
                "rope_factor", self.rope_factor == 1, "positions = learned rotates nothing: give 1"
            )
        else:
            self._require(
                "max_positions",
                self.max_positions == 0,
                "positions = rope has no table: give 0, or set positions = learned",
            )
        self._require("rope_factor", self.rope_factor >= 1, "give 1 (no extension) or more")
        if self.rope_factor > 1 and self.rope_scaling == "yarn":
            shortest = 2 * math.pi * self.rope_beta_slow
            self._require(
                "rope_original_len",
                self.rope_original_len > shortest,
                f"give more than 2 pi rope_beta_slow = {shortest:.1f} tokens",
            )
        self._require(
            "rope_beta_fast",
            self.rope_beta_fast > self.rope_beta_slow,
            f"give more than rope_beta_slow = {self.rope_beta_slow}",
        )

    def _check_feed_forward(self) -> None:
        if not self.moe:
            self._require(
                "hidden_dim",
                self.hidden_dim >= 1,
                "a dense model (num_experts = 0) needs a feed-forward width",
            )
            return
        self._require(
            "activation",
            self.activation == "clamped_swiglu",
            f"experts (num_experts = {self.num_experts}) have clamped_swiglu alone: choose it, or "
            "set num_experts = 0",
        )
        self._require("expert_dim", self.expert_dim >= 1, "give a positive number")
        self._require(
            "top_k",
            1 <= self.top_k <= self.num_experts,
            f"give a number from 1 to num_experts = {self.num_experts}",
        )
        if self.experts_backend == "grouped_mm":
            for name in ("dim", "expert_dim"):
                self._require(
                    name,
                    getattr(self, name) % 8 == 0,
                    "give a multiple of 8 (grouped_mm needs strides of 16 bytes) "
                    "or set experts_backend = loop",
                )

    def _require(self, name: str, ok: bool, remedy: str) -> None:
        if not ok:
            raise UserError(f"model.args.{name} = {getattr(self, name)!r} cannot work: {remedy}")
