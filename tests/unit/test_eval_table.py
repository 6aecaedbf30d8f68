"""The tables of `microtron eval`."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from microtron.evals import asked
from microtron.evals.harness import scores_of
from microtron.evals.table import REFERENCE, text

FOUND = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag",
            "sample_len": 9,
            "acc,none": 0.25,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.3094,
            "acc_norm_stderr,none": 0.02,
        },
        "lambada_openai": {"perplexity,none": 40.5, "perplexity_stderr,none": "N/A"},
        "sums": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1},
    },
    "groups": {"all": {"acc,none": 0.4}},
    "n-samples": {"hellaswag": {"original": 10_042, "effective": 1_000}},
    "n-shot": {"hellaswag": 0, "lambada_openai": 0, "sums": 5},
}


def rows(table):
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_scores_of_the_harness():
    scores = {(s["task"], s["metric"]): s for s in scores_of(FOUND)}
    assert scores.keys() == {
        ("hellaswag", "acc"),
        ("hellaswag", "acc_norm"),
        ("lambada_openai", "perplexity"),
        ("sums", "exact_match,strict"),
        ("all", "acc"),
    }
    assert scores["hellaswag", "acc"] == {
        "task": "hellaswag",
        "metric": "acc",
        "value": 0.25,
        "stderr": 0.01,
        "examples": 1000,
        "shots": 0,
    }
    assert scores["lambada_openai", "perplexity"]["stderr"] is None
    assert scores["sums", "exact_match,strict"]["shots"] == 5


def test_ours_stands_below_gpt2():
    found, beside = text("mine (step 3)", scores_of(FOUND)).split("\n\n")
    assert ["hellaswag", "acc_norm", "0.3094", "0.02", "1,000 examples"] in rows(found)
    assert rows(beside)[2:] == [
        ["GPT-2 124M", "0.1139", "30.9", "32.3"],
        ["GPT-2 355M", "0.1849", "39.0", "42.6"],
        ["GPT-2 774M", "0.2146", "44.0", "48.8"],
        ["GPT-2 1558M", "0.2565", "50.2", "52.3"],
        ["mine (step 3)", "-", "30.9", "-"],  # of LAMBADA there is no accuracy
    ]
    assert len(set(map(len, beside.splitlines()))) == 1 and len(REFERENCE) == 4
    limited = rows(text("mine", scores_of(FOUND), 1000))
    assert limited[-1] == ["mine", "-", "30.9 (first 1000)", "-"]


def test_figures_of_other_conditions_stay_out_of_the_comparison():
    score = {"task": "hellaswag", "metric": "acc_norm", "value": 0.5, "shots": 10}
    assert rows(text("mine", [score]))[-1] == ["mine", "-", "-", "-"]
    local = {"task": "hellaswag file", "metric": "acc_norm", "value": 0.25, "shots": 0}
    assert rows(text("mine", [score, local]))[-1] == ["mine", "-", "25.0", "-"]
    lambada = {"task": "lambada_openai", "metric": "acc", "value": 1, "shots": 0, "tokens": 5000}
    assert rows(text("mine", [lambada]))[-1] == ["mine", "-", "-", "100.0"]
    assert "5,000 tokens" in text("mine", [lambada])


def test_facts_of_a_clone_that_was_never_installed(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    loaded = SimpleNamespace(kind="hf", path=Path("x"), tokenizer=None, model=nn.Linear(1, 1))
    assert "microtron" in asked.facts(loaded)["versions"]
    monkeypatch.setattr(asked, "version", version)
    assert asked.facts(loaded)["versions"].keys() == {"python", "torch"}
