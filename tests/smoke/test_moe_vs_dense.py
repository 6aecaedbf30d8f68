"""benchmarks/moe_vs_dense.py: the comparison of the curves, the order of the runs, a tiny run."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import runs

from microtron.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("moe_vs_dense")


@pytest.fixture
def curves(bench):
    """The module of the curves."""
    return sys.modules["moe_vs_dense_curves"]


def run_of(arm, points, seed=0):
    """A run with a validation at each (seconds, loss); a second is 10 tokens."""
    curve = [
        {"seconds": s, "tokens": 10 * s, "flops": 1e3 * s, "val_loss": y, "val_bpb": y}
        for s, y in points
    ]
    return {"arm": arm, "seed": seed, "lr": 1.0, "steps": 2, "curve": curve}


@pytest.mark.parametrize(
    "one, at",
    [
        ([3, 1, 0, 0], 0.5),  # from above to below between the first two points
        ([1, 1, 0, 0], 0.0),  # below from the start
        ([3, 3, 3, 3], None),  # never
        ([1, 3, 0, 0], 1.5 - 1 / 6),  # below, above, below for good
        ([3, 0, 0, 3], None),  # below, but not at the end
        ([3, 2, 2, 0], 2.0),  # level with the other does not count as below
    ],
)
def test_crossover(curves, one, at):
    grid, other = np.arange(4.0), np.full(4, 2.0)
    found = curves.crossover(grid, np.array(one, dtype=float), other)
    assert found == (at if at is None else pytest.approx(at))


def test_compare_takes_the_mean_over_seeds_within_the_common_range(curves):
    # Each mixture falls by 1 a second from 8 and 10: by their mean, 9 - s against 7 - s / 2.
    moe = [run_of("moe", [(0, y), (8, y - 8)]) for y in (8, 10)]
    dense = [run_of("dense", [(1, 6.5), (6, 4)])]
    found = curves.compare(moe, dense, "seconds")
    assert (found["from"], found["to"]) == (1, 6)
    assert found["below_at_the_end"] == "moe"
    assert found["crossover"] == pytest.approx(4)
    assert found["gap"] == pytest.approx(1.0)
    assert curves.compare(moe, dense, "tokens")["crossover"] == pytest.approx(40)
    assert "crossover at 4 s, from there mixture" in curves.told(found, "seconds")


def test_compare_without_a_crossover(curves):
    moe, dense = run_of("moe", [(0, 3), (4, 2)]), run_of("dense", [(0, 2), (4, 1.5)])
    found = curves.compare([moe], [dense], "seconds")
    assert found["below_at_the_end"] == "dense" and found["crossover"] is None
    assert found["gap"] == pytest.approx(-0.5)
    assert "no crossover: dense twin below throughout" in curves.told(found, "seconds")


def test_twins_need_the_same_flops(bench):
    told = bench.twins(bench.PLAN)
    moe, dense = (told[m]["flops_per_token"] for m in ("moe", "dense"))
    assert moe - told["moe"]["router_flops_per_token"] == dense
    assert told["dense"]["router_flops_per_token"] == 0 < told["moe"]["router_flops_per_token"]
    assert told["moe"]["parameters"] > 2 * told["dense"]["parameters"]


def test_twins_apart_are_refused(bench, monkeypatch):
    wider = {**bench.PLAN.fields("dense"), "hidden_dim": 300}
    fields = bench.Plan.fields
    monkeypatch.setattr(
        bench.Plan, "fields", lambda self, m: wider if m == "dense" else fields(self, m)
    )
    with pytest.raises(UserError, match="give the dense one hidden_dim"):
        bench.twins(bench.PLAN)


def test_the_rate_is_chosen_for_each_and_an_edge_is_told(bench):
    swept = []
    for arm, losses in (("moe", [3, 1, 2]), ("dense", [3, 2, 1])):
        for lr, loss in zip((0.1, 0.2, 0.3), losses, strict=True):
            swept.append({**run_of(arm, [(1, loss)]), "lr": lr})
    chosen = bench.choose(swept)
    assert (chosen["moe"]["lr"], chosen["moe"]["at_the_edge"]) == (0.2, False)
    assert (chosen["dense"]["lr"], chosen["dense"]["at_the_edge"]) == (0.3, True)


def test_steps_of_equal_seconds(bench):
    swept = [run_of("moe", [(s, 1)]) for s in (4, 6, 60)]
    swept += [run_of("dense", [(s, 1)]) for s in (3, 4, 5)]
    assert bench.equal_seconds(swept, 100) == 150  # by the medians, 6 against 4


def test_pairs_keep_twins_together_and_swap_cores(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "together", lambda pair, *_: seen.append(pair) or pair)
    jobs = [bench.Run(arm, s, 0.1, 5) for s in range(2) for arm in ("moe", "dense")]
    jobs.append(bench.Run("dense", 2, 0.1, 5))
    done = bench.train_all(jobs, bench.TINY_PLAN, Path("data"), {}, [4, 7])
    assert [[r.core for r in pair] for pair in seen] == [[4, 7], [7, 4], [4]]
    assert [(r.arm, r.seed) for r in done] == [(r.arm, r.seed) for r in jobs]
    argv = bench.command(done[0], bench.TINY_PLAN, Path("data"), Path("x"))
    assert argv[:3] == ["taskset", "--cpu-list", "4"]


def test_one_core_cannot_run_pairs(bench, monkeypatch):
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(UserError, match="needs two cores"):
        bench.cores_for_pairs()


class Started:
    """What `start` returns, of a run in the tests' fork server."""

    def __init__(self, argv, folder):
        self.run = runs.Run(argv[argv.index("microtron.train") + 1 :], folder)

    def wait(self):
        """The exit code."""
        return self.run.wait().code


def test_tiny(bench, monkeypatch, tmp_path, tiny_corpus):
    monkeypatch.setattr(bench, "start", Started)
    data = tmp_path / "data"
    shutil.copytree(tiny_corpus, data)
    plan = dataclasses.replace(bench.TINY_PLAN, rates=(3e-3,), seeds=1)
    result = bench.measure(plan, data, [])
    assert [r["arm"] for r in result["runs"]] == ["moe", "dense_longer", "dense"]
    moe, longer, dense = result["runs"]
    end = moe["curve"][-1]
    assert end["step"] == plan.steps and end["tokens"] == plan.steps * plan.batch * plan.seq_len
    assert end["flops"] == end["tokens"] * result["twins"]["moe"]["flops_per_token"]
    assert dense["curve"][-1]["tokens"] == end["tokens"]
    assert longer["steps"] == bench.equal_seconds(result["swept"], plan.steps)
    assert longer["curve"][-1]["step"] == longer["steps"]
    assert moe["curve"][0]["val_loss"] > end["val_loss"] > 1  # it learned
    assert result["compared"]["tokens"]["to"] == end["tokens"]
    assert result["ends"]["moe"]["val_loss"]["median"] == end["val_loss"]
    assert "dense_longer" in bench.table(result)
    assert "moe: 0.003 is at the edge of the rates tried" in bench.table(result)  # of one
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    pytest.importorskip("matplotlib")
    bench.main(["--redraw", str(path)])
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_told_before_anything_runs(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        bench.main(["--tiny", "--out", "x.json"])
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


def test_a_run_that_fails_is_told(bench, monkeypatch, tmp_path):
    def start(argv, folder):
        (folder / "console").write_text("first\nerror: the reason\n")
        return type("Failed", (), {"wait": lambda self: 3})()

    monkeypatch.setattr(bench, "start", start)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="dense ended with code 3: error: the reason"):
        bench.together([bench.Run("dense", 0, 0.1, 2)], bench.TINY_PLAN, tmp_path / "data", {})
