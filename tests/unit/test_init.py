"""Weights at step 0: a function of the seed and of the parameter's name, of nothing else."""

import math

import pytest
import torch
from helpers import GPT2, build, tiny_args, tokens_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from microtron.model.args import ModelArgs
from microtron.model.init import plain_name
from microtron.model.model import Transformer


def weights(model):
    return {plain_name(name): p.detach().clone() for name, p in model.named_parameters()}


def initialised(change, seed=0, **overrides):
    """Weights of a model that was changed before it was initialised."""
    model = Transformer(tiny_args(**overrides))
    change(model)
    model.init_seed = seed
    model.init_weights()
    return weights(model)


def assert_equal(actual, expected):
    assert actual.keys() <= expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def wrap_checkpoint(model):
    for i in model.layers:
        model.layers[i] = checkpoint_wrapper(model.layers[i])


def wrap_compile(model):
    for i in model.layers:
        model.layers[i] = torch.compile(model.layers[i])


def reverse(model):
    model._modules = dict(reversed(model._modules.items()))
    model.layers._modules = dict(reversed(model.layers._modules.items()))


def first_stage(model):
    del model.layers["1"]
    model.norm = model.output = None


def last_stage(model):
    del model.layers["0"]
    model.tok_embeddings = None


@pytest.mark.parametrize("change", [wrap_checkpoint, wrap_compile, reverse])
def test_independent_of_wrappers_and_order(change):
    expected = weights(build(tiny_args()))
    actual = initialised(change)
    assert actual.keys() == expected.keys()
    assert_equal(actual, expected)


@pytest.mark.parametrize("change", [first_stage, last_stage])
def test_a_part_of_the_model_gets_the_same_numbers(change):
    actual = initialised(change)
    assert 0 < len(actual) < len(weights(build(tiny_args())))
    assert_equal(actual, weights(build(tiny_args())))


def test_stages_in_a_row_are_the_model():
    args = tiny_args()
    whole, first, last = (Transformer(args) for _ in range(3))
    first_stage(first)
    last_stage(last)
    for part in (whole, first, last):
        part.init_weights()
    tokens = tokens_of(args)
    torch.testing.assert_close(last(first(tokens)), whole(tokens))


def test_independent_of_the_global_generator():
    torch.manual_seed(1)
    one = weights(build(tiny_args()))
    torch.manual_seed(2)
    assert_equal(weights(build(tiny_args())), one)
    # Building a model draws (nn.Linear's own init); filling it must not.
    model = Transformer(tiny_args())
    state = torch.get_rng_state()
    model.init_weights()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_and_the_name_decide():
    one, two = weights(build(tiny_args(), seed=1)), weights(build(tiny_args(), seed=2))
    for name, tensor in one.items():
        constant = "norm" in name or name.endswith("bias")
        assert torch.equal(tensor, two[name]) == constant, name
    assert not torch.equal(one["layers.0.attention.wq.weight"], one["layers.1.attention.wq.weight"])
    assert not torch.equal(one["layers.0.attention.wk.weight"], one["layers.0.attention.wv.weight"])
    assert not torch.equal(
        one["layers.0.moe.experts.gate_up"][0], one["layers.0.moe.experts.gate_up"][1]
    )


def test_through_meta_and_to_empty():
    with torch.device("meta"):
        model = Transformer(tiny_args(load_balance="bias"))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(77)
    model.init_weights(torch.device("cpu"))
    straight = build(tiny_args(load_balance="bias"))
    assert_equal(weights(model), weights(straight))
    buffers = dict(straight.named_buffers())
    assert len(buffers) > 4
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    tokens = tokens_of(model.model_args)
    assert torch.equal(model(tokens), straight(tokens))


def test_buffers_start_even_and_empty():
    moe = build(tiny_args(load_balance="bias")).layers["0"].moe
    assert moe.expert_bias.tolist() == [0] * 4
    assert moe.load_fractions.tolist() == [0.25] * 4
    assert moe.tokens_per_expert.tolist() == [0] * 4


@pytest.mark.parametrize("meta", [False, True], ids=["direct", "meta"])
def test_tied_embeddings_are_one_parameter(meta):
    args = tiny_args(tie_embeddings=True)
    with torch.device("meta" if meta else "cpu"):
        model = Transformer(args)
    if meta:
        model.to_empty(device="cpu")
    model.init_weights(torch.device("cpu"))
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
    model(tokens_of(args), labels=tokens_of(args, seed=1)).backward()
    assert model.tok_embeddings.weight.grad.norm() > 0


def test_untied_embeddings_are_two():
    model = build(tiny_args())
    assert not torch.equal(model.output.weight, model.tok_embeddings.weight)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_embeddings": True},
        {"num_experts": 0, "hidden_dim": 256},
        {"n_layers": 8},
        {"dim": 64, "vocab_size": 2000},
        {"qk_norm": True, "sinks": False},
        {"init_scale": 0.5},
        GPT2 | {"hidden_dim": 256},
    ],
    ids=str,
)
def test_the_first_loss_is_ln_v(overrides):
    args = ModelArgs(**overrides)
    model, tokens = build(args), tokens_of(args, batch=4, seq_len=64)
    labels = tokens_of(args, batch=4, seq_len=64, seed=1)
    loss = model(tokens, labels=labels).item() / labels.numel()
    assert abs(loss - math.log(args.vocab_size)) < 0.1


def test_standard_deviations():
    args = ModelArgs(dim=256, expert_dim=192, n_heads=6, init_scale=1.5, n_layers=3, hidden_dim=192)
    residual = math.sqrt(2 * 3)
    expected = {
        "tok_embeddings.weight": 1.0,
        "layers.0.attention.wq.weight": 1.5 / math.sqrt(256),
        "layers.0.attention.wo.weight": 1.5 / math.sqrt(192) / residual,
        "layers.0.moe.router.gate.weight": 1.5 / math.sqrt(256),
        "layers.0.moe.experts.gate_up": 1.5 / math.sqrt(256),
        "layers.0.moe.experts.down": 1.5 / math.sqrt(192) / residual,
        "output.weight": 1 / 256,
    }
    actual = weights(build(args))
    for name, std in expected.items():
        assert actual[name].std().item() == pytest.approx(std, rel=0.05), name
    dense = weights(build(args.override({"num_experts": 0})))
    for name, std in (("gate_up", 1.5 / 16), ("down", 1.5 / math.sqrt(192) / residual)):
        assert dense[f"layers.0.feed_forward.{name}.weight"].std().item() == pytest.approx(
            std, rel=0.05
        )


def test_gpt2s_tables_and_norms():
    actual = weights(build(tiny_args(**(GPT2 | {"dim": 256, "hidden_dim": 256}))))
    for name in ("tok_embeddings.weight", "pos_embeddings.weight"):
        assert actual[name].std().item() == pytest.approx(0.02, rel=0.05), name
    up, down = (actual[f"layers.1.feed_forward.{n}.weight"].std().item() for n in ("up", "down"))
    assert up == pytest.approx(1 / 16, rel=0.05) and down == pytest.approx(1 / 32, rel=0.05)
    for norm in ("norm", "layers.0.attention_norm", "layers.1.ffn_norm"):
        assert actual[f"{norm}.weight"].eq(1).all() and actual[f"{norm}.bias"].eq(0).all()


def test_place_receives_every_parameter_in_full():
    model, seen = Transformer(tiny_args()), {}

    def place(parameter, full):
        seen[id(parameter)] = full
        assert isinstance(parameter, nn.Parameter) and full.dtype == torch.float32

    model.place_parameter = place
    model.init_weights()
    expected = weights(build(tiny_args()))
    assert_equal({name: seen[id(p)] for name, p in model.named_parameters()}, expected)
