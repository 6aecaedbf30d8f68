"""The table of parameter groups, and the balancing of experts."""

from microtron.accelerator import DEVICE_TYPE  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import GPT2, build, tiny_args, tokens_of
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Optimizer as OptimizerConfig

from microtron.optim.balance import ExpertBalance
from microtron.optim.build import GroupedOptimizers
from microtron.optim.groups import RULES, parameter_groups

SHAPES = {"gpt-oss": {"qk_norm": True}, "gpt2": GPT2 | {"tie_embeddings": False}}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_is_claimed_once(shape):
    model = build(tiny_args(**SHAPES[shape]))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    claimed = [id(p) for g in groups for p in g["params"]]
    assert sorted(claimed) == sorted(id(p) for p in model.parameters())
    assert {g["name"] for g in groups} == {r.name for r in RULES}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_has_no_scale_is_not_decayed(shape):
    model = build(tiny_args(**SHAPES[shape]))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in parameter_groups(model, lr=1.0, weight_decay=0.1):
        for parameter in group["params"]:
            name = names[id(parameter)]
            vector = "norm" in name or "bias" in name or name.endswith("sinks")
            table = name.startswith(("tok_embeddings", "pos_embeddings"))
            expected = 0.0 if vector or table else 0.1
            assert group["weight_decay"] == expected, name


def test_an_unknown_parameter_is_an_error():
    model = build(tiny_args())
    model.surprise = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="claims the parameter surprise"):
        parameter_groups(model, lr=1.0, weight_decay=0.1)


def stepped(**options):
    """Optimizers of a tiny model after one step, and the model."""
    model = build(tiny_args())
    config = OptimizerConfig(implementation="for-loop", **options)
    config.decay_embeddings = False
    optimizers = GroupedOptimizers([model], config)
    tokens = tokens_of(tiny_args(), batch=2, seq_len=8)
    (model(tokens, labels=tokens) / tokens.numel()).backward()
    optimizers.step()
    return optimizers, model


def test_a_saved_state_is_steps_and_moments_of_every_parameter():
    optimizers, model = stepped()
    names = [name for name, _ in model.named_parameters()]
    parts = ("step", "exp_avg", "exp_avg_sq")
    assert set(optimizers.state_dict()) == {f"state.{n}.{p}" for n in names for p in parts}


@pytest.mark.parametrize("older", [False, True], ids=["ours", "with torch's options"])
def test_loading_a_state_keeps_this_runs_options(older):
    saved, model = stepped(lr=1e-3, weight_decay=0.3, beta2=0.9)
    state = OptimizersContainer.state_dict(saved) if older else saved.state_dict()
    assert older == ("param_groups.norm.weight.lr" in state)
    other, its_model = stepped(lr=2e-4, weight_decay=0.2, beta2=0.95, eps=1e-6)
    before = [
        {k: v for k, v in g.items() if k != "params"} for g in other.optimizers[0].param_groups
    ]
    for values in other.optimizers[0].state.values():
        values["exp_avg"].fill_(7)
    other.load_state_dict(state)
    after = [
        {k: v for k, v in g.items() if k != "params"} for g in other.optimizers[0].param_groups
    ]
    assert after == before
    for theirs, ours in zip(model.parameters(), its_model.parameters(), strict=True):
        for key, value in saved.optimizers[0].state[theirs].items():
            torch.testing.assert_close(other.optimizers[0].state[ours][key], value, rtol=0, atol=0)


def steps(mode, count=40, **overrides):
    """Max/mean load over a short training of a model whose router starts lopsided."""
    args = tiny_args(load_balance=mode, num_experts=8, top_k=2, **overrides)
    model = build(args)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.moe.router.gate.bias.copy_(torch.linspace(1.0, -1.0, 8))
    balance = ExpertBalance([model])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loads = []
    for i in range(count):
        tokens = tokens_of(args, batch=4, seq_len=32, seed=i)
        optimizer.zero_grad()
        (model(tokens, labels=tokens) / tokens.numel()).backward()
        balance.step()
        optimizer.step()
        loads.append(max(balance.metrics()["expert_load_max_mean"]))
    return loads


@pytest.mark.parametrize(
    "mode, options",
    [
        ("aux_loss", {"aux_loss_coef": 0.1}),
        ("aux_loss", {"aux_loss_coef": 0.1, "balance_stats": "forward"}),
        ("bias", {"bias_update_rate": 0.1}),
    ],
)
def test_each_mode_evens_out_a_lopsided_router(mode, options):
    idle, balanced = steps("none"), steps(mode, **options)
    assert idle[0] > 2 and balanced[0] == idle[0]
    assert sum(balanced[-10:]) < 0.8 * sum(idle[-10:])


def test_metrics_of_known_counts():
    model = build(tiny_args())
    for layer, counts in zip(model.layers.values(), ([4, 4, 4, 4], [16, 0, 0, 0]), strict=True):
        layer.moe.tokens_per_expert.copy_(torch.tensor(counts))
    balance = ExpertBalance([model])
    assert balance.metrics() == {}
    balance.step()
    assert balance.metrics() == {
        "expert_load_max_mean": [1.0, 4.0],
        "expert_entropy": [1.0, 0.0],
        "dead_experts": [0, 3],
    }
    for layer in model.layers.values():
        assert layer.moe.tokens_per_expert.sum() == 0
        assert layer.moe.load_fractions.sum() == 1


def test_counts_of_all_ranks_are_summed_in_one_call():
    model = build(tiny_args())
    for layer in model.layers.values():
        layer.moe.tokens_per_expert.fill_(3)
    seen = []
    ExpertBalance([model], lambda counts: (seen.append(counts.shape), counts.mul_(2))).step()
    assert seen == [torch.Size([2, 4])]


def test_a_dense_model_has_nothing_to_balance():
    balance = ExpertBalance([build(tiny_args(num_experts=0))])
    balance.step()
    assert balance.metrics() == {}
