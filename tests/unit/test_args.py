"""Every field refuses what cannot work, in one line that names the field and the value."""

import dataclasses
import typing

import pytest
from helpers import tiny_args

from microtron.errors import UserError
from microtron.model.args import ModelArgs

NAN, INFINITE = float("nan"), float("inf")
BAD = {
    "dim": [0, -8, 2.5, "128", True],
    "n_layers": [0, 1.0],
    "vocab_size": [0, -1],
    "tie_embeddings": ["yes", 1],
    "norm": ["batch", None],
    "norm_eps": [0.0, -1e-5, NAN],
    "n_heads": [0, -4],
    "n_kv_heads": [0, 3, 8],
    "head_dim": [0, 12],
    "attention_bias": [1, "true"],
    "qk_norm": [0],
    "sinks": [None, 1],
    "window": [0, -1],
    "window_pattern": ["", "sl", "SLX", 3],
    "attn_backend": ["flash", "", None],
    "positions": ["alibi", True],
    "max_positions": [-1, 64, 8.0],
    "rope_theta": [0.0, -1.0, INFINITE],
    "rope_factor": [0.5, 0.0, NAN],
    "rope_scaling": ["linear"],
    "rope_original_len": [0],
    "rope_beta_fast": [0.0, 0.5],
    "rope_beta_slow": [0.0, -1.0],
    "activation": ["relu", "gelu", "swiglu"],
    "hidden_dim": [-1, 2.0],
    "num_experts": [-1, 4.0],
    "top_k": [0, 5, -1],
    "expert_dim": [0, -8],
    "mlp_bias": [1],
    "swiglu_alpha": [0.0, INFINITE],
    "swiglu_limit": [0.0, -7.0],
    "experts_backend": ["triton"],
    "load_balance": ["switch"],
    "aux_loss_coef": [-0.1, NAN],
    "balance_stats": ["batch"],
    "router_z_loss_coef": [-1e-3],
    "bias_update_rate": [-1e-3],
    "logit_softcap": [-30.0, "30"],
    "z_loss": [-1e-4],
    "loss_chunk_tokens": [0],
    "embed_std": [0.0, -1.0],
    "init_scale": [0.0],
}
NEEDED = {  # what a choice asks of other fields
    "learned": {"max_positions": 8},
    "gelu": {"num_experts": 0},
    "swiglu": {"num_experts": 0},
}
FIELDS = [field.name for field in dataclasses.fields(ModelArgs)]


def refusal(**overrides):
    """The message a wrong value ends in."""
    with pytest.raises(UserError) as caught:
        tiny_args(**overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_a_bad_value(name):
    assert BAD.get(name), f"{name} is new: give it a check in ModelArgs and bad values here"
    for value in BAD[name]:
        message = refusal(**{name: value})
        assert "\n" not in message
        assert f"model.args.{name} = {value!r} " in message
        assert len(message.split(": ", 1)[1]) > 5, "no remedy"


def test_the_table_has_no_stale_field():
    assert set(BAD) == set(FIELDS)


@pytest.mark.parametrize(
    "name",
    [f.name for f in dataclasses.fields(ModelArgs) if typing.get_origin(f.type) is typing.Literal],
)
def test_choices_are_listed_and_accepted(name):
    choices = typing.get_args(ModelArgs.__dataclass_fields__[name].type)
    message = refusal(**{name: "nonsense"})
    for choice in choices:
        assert choice in message
        assert getattr(tiny_args(**{name: choice}, **NEEDED.get(choice, {})), name) == choice


def test_fields_that_contradict_each_other():
    assert "divisor of n_heads = 6" in refusal(n_heads=6, n_kv_heads=4)
    assert "from 1 to num_experts = 2" in refusal(num_experts=2, top_k=3)
    assert "hidden_dim = 0" in refusal(num_experts=0, hidden_dim=0)
    assert "rope_beta_slow = 40.0" in refusal(rope_beta_slow=40.0)
    assert "model.args.dim = 44" in refusal(dim=44, experts_backend="grouped_mm")
    assert "model.args.expert_dim = 12" in refusal(expert_dim=12, experts_backend="grouped_mm")
    assert tiny_args(dim=44, expert_dim=12, experts_backend="loop").dim == 44
    assert "positions = learned needs a table" in refusal(positions="learned")
    assert "give 0, or set positions = learned" in refusal(max_positions=64)
    learned = {"positions": "learned", "max_positions": 8}
    assert "rope_factor = 2.0 cannot work: positions = learned rotates nothing" in refusal(
        rope_factor=2.0, **learned
    )
    assert "(num_experts = 4) have clamped_swiglu alone" in refusal(activation="gelu")


def test_the_shortest_original_context_is_yarns_alone():
    short = {"rope_factor": 2.0, "rope_original_len": 6}
    assert "more than 2 pi rope_beta_slow = 6.3" in refusal(**short)
    assert tiny_args(rope_scaling="llama3", **short).rope_original_len == 6


def test_a_dense_model_does_not_look_at_expert_fields():
    args = tiny_args(num_experts=0, hidden_dim=24, top_k=9)
    assert not args.moe
    assert tiny_args().moe


def test_whole_numbers_may_stand_for_floats():
    """TOML writes 10000 and 1 where a float is meant."""
    args = tiny_args(rope_theta=10000, z_loss=0)
    assert type(args.rope_theta) is float and type(args.z_loss) is float


def test_override_is_a_checked_copy():
    args = tiny_args()
    other = args.override({"dim": 48, "top_k": 1})
    assert (other.dim, other.top_k, other.n_layers) == (48, 1, args.n_layers)
    assert (args.dim, args.top_k) == (40, 2)
    with pytest.raises(UserError, match=r"model\.args\.top_k = 99 "):
        args.override({"top_k": 99})


def test_window_pattern_repeats():
    args = tiny_args(window_pattern="SSL", n_layers=5)
    assert [args.mask_kind(i) for i in range(5)] == ["window", "window", "full", "window", "window"]
    assert ModelArgs().mask_kind(0) == "window", "gpt-oss starts with a window layer"


def test_the_name_titan_asks_for():
    assert tiny_args(attn_backend="flex").attn_type == "flex"
    assert tiny_args(attn_backend="eager").attn_type == "sdpa"


def test_every_field_is_documented():
    """`--help` and the README's table are made of these strings."""
    import inspect

    lines = inspect.getsource(ModelArgs).splitlines()
    for name in FIELDS:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}: "))
        assert lines[at + 1].strip().startswith('"""'), name
