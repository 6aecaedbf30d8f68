"""benchmarks/kernel_speed.py: formulas against counted bytes and FLOPs, table, a tiny run."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import rel, tiny_args
from torch.nn.attention.flex_attention import FlexKernelOptions
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernel_speed")


@pytest.fixture
def cases(bench):
    """Every class of a tiny model in fp32, by name."""
    args = tiny_args(n_kv_heads=1, window=4, vocab_size=72)
    at = bench.Shapes(args, 2, 16, torch.device("cpu"), torch.float32)
    return {case.name: case for case in bench.cases(at)}


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# Beside what a formula counts: norm weights, sinks, labels, biases of experts and gate.
@pytest.mark.parametrize(
    "name, backward_reads_inputs",
    [
        ("norm", True),
        ("rope", False),
        ("swiglu", True),
        ("swiglu, plain", True),
        ("attention, window", True),
        ("attention, full", True),
        ("experts", True),
    ],
)
def test_bytes_are_those_of_inputs_and_results(cases, name, backward_reads_inputs):
    case = cases[name]
    body = next(iter(case.bodies.values()))
    out = body(*case.tensors)
    results = list(out) if isinstance(out, tuple) else [out]
    once = size(case.tensors) + size(results)
    assert case.moved[0] == pytest.approx(once, rel=0.05)
    leaves = [t for t in case.tensors if t.requires_grad]
    backward = size(results) + size(leaves)  # gradients in, gradients out
    backward += size(case.tensors) if backward_reads_inputs else size(case.tensors) - size(leaves)
    backward += size(results) if name.startswith("attention") else 0  # it reads its output too
    assert case.moved[1] - case.moved[0] == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("name", ["head + loss", "experts"])
def test_flops_are_those_that_torch_counts(cases, name):
    case = cases[name]
    body = next(iter(case.bodies.values()))
    with FlopCounterMode(display=False) as counter:
        out = body(*case.tensors).sum()
        assert counter.get_total_flops() == case.flops[0]
        out.backward()
    assert counter.get_total_flops() == case.flops[1]


def test_attention_counts_what_is_in_sight(cases):
    """16 tokens see 136 pairs in a causal layer, 58 in a window of 4; two products a pair."""
    per_pair = 2 * 2 * 2 * 4 * 16  # multiply-adds, products, batch, heads, head_dim
    assert cases["attention, full"].flops[0] == per_pair * 136
    assert cases["attention, window"].flops[0] == per_pair * 58


def test_all_bodies_agree(bench, cases):
    for case in cases.values():
        if not case.backward:
            continue
        run, truth = bench.Runner(case, torch.float32), None
        for name, body in case.bodies.items():
            if name not in ("compile", "liger"):  # these have their own tests
                found = run.both(body)
                truth = truth or found
                assert bench.error(found, truth) < 1e-5, (case.name, name)


@pytest.mark.parametrize("kind", ["window", "full"])
def test_flex_bodies_agree_uncompiled(bench, cases, kind, monkeypatch):
    """Without the compiler their options play no part; forward alone, as a CPU can."""
    module = sys.modules["kernel_cases"]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = cases[f"attention, {kind}"]
    at = bench.Shapes(tiny_args(), 2, 16, torch.device("cpu"), torch.float32)
    tensors = [t.detach() for t in case.tensors]
    expected = case.bodies["eager"](*tensors)
    for name, (block, options) in module.FLEX.items():
        mask = module._block_mask(at, 4 if kind == "window" else None, block)
        assert (block, block) == mask.BLOCK_SIZE
        out = module._flex(options)(*tensors, mask, 16**-0.5)
        assert rel(out, expected) < 1e-6, name


def test_flex_options_exist_and_fit_their_mask(bench):
    known = FlexKernelOptions.__annotations__
    for name, (block, options) in sys.modules["kernel_cases"].FLEX.items():
        assert set(options) <= set(known), name
        tiles = [128, *(v for k, v in options.items() if k.startswith("BLOCK_"))]
        assert all(block % tile == 0 for tile in tiles), name


def test_error_sees_a_wrong_gradient(bench):
    truth = [torch.ones(4), torch.zeros(3)]
    assert bench.error([torch.ones(4), torch.full((3,), 1e-6)], truth) < 1e-2
    assert bench.error([torch.ones(4), torch.full((3,), 0.1)], truth) > 1


def row(seconds):
    return {"both": {"seconds": {"median": seconds}}}


def test_fastest(bench):
    bodies = {"torch": row(1.0), "compile": row(0.5), "liger": row(0.4)}
    found = {
        "norm": {"bodies": bodies},
        "rope": {"bodies": {"torch": row(1.0), "compile": row(0.99)}},  # not worth it
        "swiglu": {"bodies": {"torch": row(1.0), "compile": {"failed": "no compiler"}}},
        "head + loss": {"bodies": {"whole logits": row(0.1), "torch": row(1.0), "liger": row(2)}},
    }
    plain = {"norm": "torch", "rope": "torch", "swiglu": "torch", "loss": "torch"}
    assert bench.fastest(found, ("torch", "compile", "liger")) == plain | {"norm": "liger"}
    assert bench.fastest(found, ("torch", "compile")) == plain | {"norm": "compile"}
    assert bench.fastest(found, ("torch",)) == plain


def test_a_tiny_run(bench, tmp_path, capsys):
    """Every class has a row; a body that is not there is a row with its reason."""
    out = tmp_path / "kernels_cpu.json"
    bodies = ["torch", "liger", "sdpa", "grouped_mm", "fused"]
    bench.main(["--tiny", "--repeats", "1", "--choices", *bodies, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["device_type"] == "cpu" and set(result["auto"]) == set(bench.KERNELS)
    assert result["ceilings"]["matmul"]["median"] > 1e8
    for name, found in result["classes"].items():
        for body, told in found["bodies"].items():
            if body == "liger":
                assert "liger_kernel" in told["failed"]
                continue
            assert told.get("error", 0.0) < 1e-4, (name, body)
            for kind, floor in found["floor"].items():
                seconds = told[kind]["seconds"]["median"]
                assert told[kind]["share"] == pytest.approx(floor["seconds"] / seconds)
    told = capsys.readouterr().out
    assert "router + permute + combine" in told and "fastest: " in told
