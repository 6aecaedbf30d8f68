"""benchmarks/compile.py: what it counts, sums up and prints, and one tiny run of it."""

import importlib
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compile")


@pytest.fixture
def fresh():
    """Nothing compiled, nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def row(seconds, peak=2**30, **more):
    """What a process hands back."""
    seen = {"graphs": 2, "graph_breaks": {}, "recompiles": [], "cuda_graphs_skipped": 0}
    return (
        {"seconds": seconds, "tokens": 100, "peak_bytes": peak, "late_recompiles": 0} | seen | more
    )


def test_the_first_step_less_the_later_ones_is_what_compiling_costs(bench):
    rounds = [row([9.0, 5.0, 1.0, 1.0, 2.0]), row([11.0, 5.0, 2.0, 2.0, 2.0])]
    told = bench.summed_up(rounds)
    assert told["compile_s"] == {"median": 8.5, "min": 8.0, "max": 9.0}
    assert told["step_s"] == {"median": 2.0, "min": 1.0, "max": 2.0}  # warm-up left out
    assert told["step_s_of_repeats"] == [1.0, 2.0]
    assert told["tokens_per_s"] == 50


def test_a_row_that_fails_is_a_row_with_its_reason(bench):
    rows = {
        "eager": bench.summed_up([row([2.0, 2.0, 2.0])]),
        "blocks": bench.summed_up([row([3.0, 1.0, 1.0]), {"failed": "OutOfMemory: 9 GiB"}]),
        "model": bench.summed_up(
            [row([3.0, 1.0, 1.0], graph_breaks={"a call": 3}, recompiles=["why"])]
        ),
    }
    lines = bench.table(rows).splitlines()
    assert lines[2] == "blocks  failed: OutOfMemory: 9 GiB"
    assert lines[3].split() == ["model", "100", "2.00", "2.0", "1.00", "2", "3", "1", "(0)"]
    assert lines[4] == "break in model (3): a call"


def test_breaks_and_recompilations_are_seen(bench, fresh):
    def breaks(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    run = torch.compile(breaks, backend="eager", dynamic=False)
    run(torch.ones(3))
    before = bench.seen_by_the_compiler()
    assert before["graphs"] == 2 and sum(before["graph_breaks"].values()) == 1
    assert before["recompiles"] == []
    run(torch.ones(4))
    (why, *_) = bench.seen_by_the_compiler()["recompiles"]
    assert "size" in why


def test_reasons_tell_no_places_of_this_machine(bench):
    why = """0/0: mask == 64  # in a: # me/ann/microtron/microtron/model/core.py:138 in blocked
    User stack trace: File "/home/ann/x.py", line 1"""
    assert bench.in_a_line(why) == (
        "0/0: mask == 64 # in a: # microtron/model/core.py:138 in blocked"
    )
    assert bench.in_a_line('at "/home/ann/lib/torch/nn/f.py"') == 'at "torch/nn/f.py"'


TINY = [
    f"--job.config_file={BENCHMARKS.parent}/train_configs/debug.toml",
    "--model.args.dim=32",
    "--model.args.n_layers=1",
    "--model.args.n_heads=2",
    "--model.args.n_kv_heads=1",
    "--model.args.expert_dim=32",
    "--model.args.attn_backend=sdpa",
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--compile.backend=eager",  # traced, not generated: seconds instead of minutes
]


@pytest.mark.parametrize(
    "variant, graphs", [("eager", 0), pytest.param("blocks", 1, marks=pytest.mark.slow)]
)
def test_a_tiny_run(bench, fresh, variant, graphs):
    other = "--compile.enable" if variant == "eager" else "--compile.no-enable"
    told = bench.measured(variant, [*TINY, other], steps=1)  # whatever the TOML says
    assert "failed" not in told, told
    assert told["graphs"] == graphs and told["graph_breaks"] == {} and told["recompiles"] == []
    assert len(told["seconds"]) == bench.WARM_UP + 1 and told["tokens"] == 16
    assert 1 < told["loss"] < 10 and told["peak_bytes"] > 2**20


def test_a_wrong_option_is_told(bench):
    told = bench.measured("eager", [*TINY, "--training.seq_len=-1"], steps=1)
    assert told["failed"].startswith("UserError: training.seq_len = -1")
