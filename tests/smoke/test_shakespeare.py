"""benchmarks/shakespeare.py and its peer, tiny: where runs end, what counts, the ratio."""

import importlib
import json
from pathlib import Path

import pytest
import runs

TEXT = "to be, or not to be: that is the question.\n" * 60


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("shakespeare")


def test_baseline_is_nanogpts_model_and_split(bench):
    peer = bench.nanogpt_baseline
    run = peer.train(TEXT, target=0.0, every=3, seed=3, steps=4)
    alphabet, width = len(set(TEXT)), 128
    block = 12 * width**2 + 2 * width  # q, k, v, o; four times as wide and back; two norms
    assert run["parameters"] == alphabet * width + 64 * width + 4 * block + width
    assert run["tokens"] == 4 * 12 * 64
    assert run["val_tokens"] == (len(TEXT) // 10 - 1) // 64 * 64
    assert [point["step"] for point in run["curve"]] == [3, 4]
    assert run["reached"] is None and run["end"]["step"] == 4
    assert run["ms_per_step"] == pytest.approx(1e3 * run["end"]["time_s"] / 4)
    assert run["end"]["val_loss"] < run["curve"][0]["val_loss"]
    ends = []
    for seed in (3, 3, 4):
        short = peer.train(TEXT, target=99.0, every=1, seed=seed, steps=4)
        assert short["end"] == short["reached"] and short["end"]["step"] == 1  # ends at the first
        ends.append(short["end"]["val_loss"])
    assert ends[0] == ends[1] != ends[2]  # the seed decides


def test_baselines_schedule(bench):
    rate = bench.nanogpt_baseline.learning_rate
    assert rate(99) == pytest.approx(1e-3 * 100 / 101)  # nanoGPT: lr * (it + 1) / (warm-up + 1)
    assert rate(100) == pytest.approx(1e-3)
    assert rate(1050) == pytest.approx((1e-3 + 1e-4) / 2)
    assert rate(2000) == pytest.approx(1e-4)


def test_ours_runs_the_recipe_to_the_target(bench, monkeypatch, tmp_path, tiny_corpus):
    commands = []

    def run(command, check, cwd):
        assert check
        commands.append(command)
        folder = Path(cwd)
        done = runs.run(command[3:], folder / "forked")
        done.dump.rename(folder / "run")

    monkeypatch.setattr(bench.subprocess, "run", run)
    small = [f"--data.dirs={tiny_corpus}", "--model.args.vocab_size=264"]
    small += [
        "--model.args.n_layers=1",
        "--training.steps=3",
        "--validation.freq=1",
        "--metrics.log_freq=1",
    ]
    told = bench.ours(tmp_path / "text", 5, 5.4, small)
    assert told["seed"] == 5 and "--debug.seed=5" in commands[0]
    assert f"--job.config_file={bench.RECIPE}" in commands[0]
    assert told["reached"] == told["end"] == told["curve"][-1]
    assert all(point["val_loss"] > 5.4 for point in told["curve"][:-1])
    step = told["end"]["step"]
    assert told["tokens"] % step == 0 and told["end"]["time_s"] > 0
    assert told["parameters"] > told["parameters_active"] > 0
    json.dumps(told)


def side(*seconds):
    """Runs that reached the target after so many seconds; None: never."""
    rows = []
    for seed, time_s in enumerate(seconds):
        end = {"step": 10, "time_s": time_s or 9.0, "val_loss": 1.9}
        reached = None if time_s is None else end
        told = {"seed": seed, "reached": reached, "end": end, "tokens": 70, "ms_per_step": 5.0}
        rows.append(told)
    return rows


def test_ratio_is_of_the_medians(bench):
    found = bench.compare({"ours": side(1.0, 3.0, 2.0), "baseline": side(9.0, 8.0, 1.0)})
    assert found["ratio"] == 0.25
    assert found["seconds"]["ours"] == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_no_ratio_when_a_seed_never_got_there(bench):
    runs_of = {"ours": side(1.0, None, 2.0), "baseline": side(9.0, 8.0, 1.0)}
    found = bench.compare(runs_of)
    assert found["ratio"] is None and found["seconds"]["ours"] is None
    assert "target not reached" in bench.table({**runs_of, **found})
