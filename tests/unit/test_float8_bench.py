"""benchmarks/float8.py: what it refuses, what it compares, and (with torchao) a tiny run."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = [
    f"--job.config_file={BENCHMARKS.parent}/train_configs/debug.toml",
    "--model.args.dim=32",
    "--model.args.n_layers=1",
    "--model.args.n_heads=2",
    "--model.args.n_kv_heads=1",
    "--model.args.head_dim=16",
    "--model.args.expert_dim=32",
    "--model.args.num_experts=16",  # or the router is left alone for its width
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.global_batch_size=1",
]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("float8")


def test_what_is_lacking_is_told_in_a_line(bench, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install torchao" in bench.lacking(emulate=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert bench.lacking(emulate=True) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is none" in bench.lacking(emulate=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "not 8.6" in bench.lacking(emulate=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert bench.lacking(emulate=False) is None


def test_the_curves_are_compared_step_by_step(bench):
    rows = {
        "bf16": {"loss": [5.0] * 20, "tokens_per_s": 100.0},
        "float8": {"loss": [5.0] * 10 + [4.0] + [5.0] * 7 + [5.25, 5.75], "tokens_per_s": 150.0},
    }
    told = bench.compared(rows)
    assert told == {
        "speed_to_bf16": 1.5,
        "largest_difference": -1.0,
        "difference_at_the_end": 0.5,  # the last two of twenty
    }


@pytest.mark.slow
def test_attention_is_converted_and_the_loss_stays_near(bench):
    pytest.importorskip("torchao")
    plain, float8 = (bench.run(f, TINY, 2, None, True) for f in (False, True))
    assert plain["converted_layers"] == 0
    assert float8["converted_layers"] == 4  # not the head, not the router
    for exact, rounded in zip(plain["loss"], float8["loss"], strict=True):
        assert exact != rounded and abs(exact - rounded) < 0.05
