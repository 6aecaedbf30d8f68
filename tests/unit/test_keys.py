"""The table of names: transformers agrees with each row, and each key is claimed exactly once."""

import dataclasses

import pytest
import torch
from exports import FAMILIES, family, theirs
from helpers import build_random, tiny_args

from microtron.errors import UserError
from microtron.flavors import FLAVORS
from microtron.hf import keys
from microtron.hf.config import to_config

CASES = {
    **{name: family(name) for name in FAMILIES},
    "gpt_oss tied, without attention bias, with a selection bias": family(
        "gpt_oss", tie_embeddings=True, attention_bias=False, load_balance="bias"
    ),
    "gpt2 untied": family("gpt2", tie_embeddings=False),
    "llama tied, with biases": family(
        "llama", tie_embeddings=True, attention_bias=True, mlp_bias=True
    ),
}
cases = pytest.mark.parametrize("args", CASES.values(), ids=CASES.keys())


def hf_model(args):
    """The model of transformers for an architecture, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    told = to_config(args, max_positions=64)
    config = AutoConfig.for_model(**told)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@cases
def test_every_key_of_both_sides_and_every_shape(args):
    claims = keys.claims(args)
    there = hf_model(args).state_dict()
    if args.tie_embeddings:
        there.pop("lm_head.weight")
    keys.match(claims, ours=keys.shapes(args), theirs=there)
    shapes = keys.shapes(args)
    for claim in claims:
        ours = [torch.empty(shapes[name], device="meta") for name in claim.ours]
        for name, value in zip(claim.theirs, claim.to_hf(ours), strict=True):
            assert value.shape == there[name].shape, name


@cases
def test_there_and_back_to_the_same_bits(args):
    model = build_random(args)
    ours, stored = model.state_dict(), theirs(model, args)
    for claim in keys.claims(args):
        back = claim.from_hf([stored[name] for name in claim.theirs])
        for name, value in zip(claim.ours, back, strict=True):
            assert torch.equal(value, ours[name]), name


def test_the_ways_with_numbers():
    q, k, v = (torch.full((2, 3), float(i)) + torch.arange(3) for i in (10, 20, 30))
    (c_attn,) = keys.JOINED_TURNED[0]([q, k, v])
    assert c_attn.shape == (3, 6)
    assert c_attn[1].tolist() == [11, 11, 21, 21, 31, 31]  # Conv1D: x @ w
    gate_up = torch.tensor([[0.0], [10.0], [1.0], [11.0]])  # gate0, up0, gate1, up1
    gate, up = keys.INTERLEAVED[0]([gate_up])
    assert gate.flatten().tolist() == [0, 1] and up.flatten().tolist() == [10, 11]


def test_a_selection_bias_passes_as_zeros_alone():
    args = family("gpt_oss", load_balance="bias")
    claim = next(c for c in keys.claims(args) if c.ours[0].endswith("expert_bias"))
    assert claim.ours in [c.ours for c in keys.claims(args)[:4]], "asked after the weights"
    assert claim.to_hf([torch.zeros(4)]) == []
    with pytest.raises(UserError, match="layers.0.moe.expert_bias is not zero"):
        claim.to_hf([torch.tensor([0.0, 1e-3, 0.0, 0.0])])
    (fractions,) = next(c for c in keys.claims(args) if "fractions" in c.ours[0]).from_hf([])
    assert fractions.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda names: names.remove("model.norm.weight"), "lacks model.norm.weight"),
        (lambda names: names.append("model.extra"), "has unknown model.extra"),
        (lambda names: names.append(names[0]), f"has twice {'model.embed_tokens.weight'}"),
    ],
)
def test_keys_that_do_not_match(change, told):
    claims = keys.claims(family("gpt_oss"))
    names = [name for claim in claims for name in claim.theirs]
    keys.match(claims, theirs=names)
    change(names)
    with pytest.raises(UserError, match=told):
        keys.match(claims, theirs=names)
    with pytest.raises(UserError, match="claims twice"):
        keys.match([*claims, claims[-1]], ours=[n for c in claims for n in c.ours])


def test_an_architecture_that_a_table_does_not_know_is_not_passed_over():
    args = tiny_args(qk_norm=True)
    with pytest.raises(UserError, match="has unknown layers.0.attention.k_norm.weight"):
        keys.match(keys.claims(args), ours=keys.shapes(args))


@pytest.mark.parametrize(
    "args, told",
    [
        (family("gpt_oss", qk_norm=True, logit_softcap=30.0), ["qk_norm = True", "logit_softcap"]),
        (family("gpt_oss", sinks=False), ["gpt_oss", "sinks = False (True there)"]),
        (family("gpt_oss", mlp_bias=False), ["mlp_bias = False"]),
        (family("gpt_oss", swiglu_limit=5.0), ["swiglu_limit = 5.0 (7.0 there)"]),
        (family("gpt_oss", swiglu_alpha=1.0), ["swiglu_alpha = 1.0"]),
        (family("gpt_oss", norm="layer"), ["norm = 'layer' ('rms' there)"]),
        (family("gpt_oss", positions="learned", max_positions=9), ["positions = 'learned'"]),
        (tiny_args(num_experts=0), ["num_experts = 0"]),
        (family("gpt2", n_kv_heads=2), ["gpt2", "n_kv_heads = 2"]),
        (family("gpt2", head_dim=8), ["head_dim = 8"]),
        (family("gpt2", mlp_bias=False), ["mlp_bias = False"]),
        (family("gpt2", positions="rope", max_positions=0), ["positions = 'rope'"]),
        (family("llama", window_pattern="SL"), ["llama", "window_pattern = 'SL' ('L' there)"]),
        (family("llama", n_heads=6, n_kv_heads=3), ["n_heads = 6"]),
        (family("llama", sinks=True), ["sinks = True"]),
    ],
)
def test_what_has_no_counterpart_is_named(args, told):
    with pytest.raises(UserError) as refused:
        keys.architecture(args)
    assert all(part in str(refused.value) for part in told), refused.value
    assert "\n" not in str(refused.value)


def test_every_field_of_the_architecture_is_decided():
    """A new field must be either carried by a config, or held to one value, or neither on purpose.

    `test_hf_config.py` changes each field that a config carries and sees it come back.
    """
    from test_hf_config import CARRIED

    from microtron.checkpoints import NOT_ARCHITECTURE

    known = CARRIED | NOT_ARCHITECTURE | {k for fixed in keys.FIXED.values() for k in fixed}
    fields = {f.name for f in dataclasses.fields(CASES["gpt2"])}
    assert fields <= known, fields - known


def test_flavors_that_can_be_exported():
    found = {}
    for name in FLAVORS:
        try:
            found[name] = keys.architecture(FLAVORS[name]())
        except UserError:
            found[name] = None
    assert found.pop("gpt_oss_656m_dense") is None  # gpt-oss has no dense model
    assert all(family == name[: len(family)] for name, family in found.items() if name != "debug")
    assert found["debug"] == "gpt_oss"


def test_names_in_the_wild():
    args = family("gpt2")
    table = {name for claim in keys.claims(args) for name in claim.theirs}
    bare = {name.removeprefix("transformer.") for name in table}
    bare |= {"h.0.attn.bias", "h.1.attn.masked_bias", "lm_head.weight"}
    known = keys.canonical(bare, args)
    assert known.keys() == table and known["transformer.wte.weight"] == "wte.weight"
    same = keys.canonical({*table, "transformer.h.0.attn.bias"}, args)
    assert same == {name: name for name in table}
    llama = family("llama")
    names = [name for claim in keys.claims(llama) for name in claim.theirs]
    old = [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert list(keys.canonical(old, llama)) == names
