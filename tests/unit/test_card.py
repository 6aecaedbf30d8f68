"""The model card: front matter that the hub reads, and figures that come from the run alone."""

import json

import pytest
from exporting import GPT2, LLAMA
from helpers import tiny_args

from microtron.data.tokenizers import load_tokenizer
from microtron.flavors import flavor
from microtron.hf.card import last_validation, model_card
from microtron.model.accounting import count_parameters


@pytest.fixture
def run(tmp_path):
    """A run's folder; returns its step 200."""
    entries = [
        {"step": 100, "val_loss": 3.0, "val_bpb": 2.0},
        {"step": 150, "loss": 1.0},
        {"step": 200, "val_loss": 2.5, "val_bpb": 1.75},
        {"step": 300, "val_loss": 2.0, "val_bpb": 1.5},
    ]
    text = "\n".join(map(json.dumps, entries)) + '\n{"step": 310, "val_lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    data = tmp_path / "books"
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps({"source": "stdlib"}))
    return tmp_path / "checkpoint" / "step-200"


def card(args, run, tokenizer="byte", passed="gate: logits agree", **about):
    about = {"step": 200, "tokens": 409600, "seq_len": 128} | about
    tokenizer = load_tokenizer(tokenizer) if tokenizer else None
    return model_card("mine", args, tokenizer, about, "bfloat16", run, passed)


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ") and line != "| | |"]
    return dict(line.strip("| ").split(" | ", 1) for line in lines)


def test_front_matter(run):
    import yaml

    text = card(flavor("debug"), run)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["microtron", "gpt-oss", "mixture-of-experts"],
    }
    assert "license" not in text.lower() and text.startswith("---\n")


def test_figures(run):
    args = flavor("debug")
    counted = count_parameters(args)
    rows = rows_of(card(args, run, data=[str(run.parents[1] / "books"), "/no/such/crawl"]))
    assert rows["step"] == "200" and rows["tokens trained on"] == "409,600"
    assert rows["validation loss (step 200)"] == "2.5000"
    assert rows["validation bits per byte"] == "1.7500"
    assert rows["parameters"].startswith(f"{counted.total:,} ({counted.active:,} active")
    assert rows["data"] == "`crawl`"  # the second row; no path of the machine
    assert rows["window"] == "64 tokens, layers `SL` repeated"
    assert rows["tokenizer"] == "byte, 257 ids" and rows["weights"] == "bfloat16"
    text = card(args, run, data=[str(run.parents[1] / "books")])
    assert "| data | `books` (stdlib) |" in text and str(run.parents[2]) not in text
    assert "Checked when it was exported (logits agree)." in text


def test_the_last_validation_that_is_not_beyond_the_step(run):
    metrics = run.parents[1] / "metrics.jsonl"
    assert last_validation(metrics, 199)["val_loss"] == 3.0
    assert last_validation(metrics, 1000)["val_loss"] == 2.0
    assert last_validation(metrics, 99) == last_validation(run / "none", 500) == {}
    with open(metrics, "a") as file:  # resumed from an earlier step: what came last counts
        file.write('\n{"step": 200, "val_loss": 2.25}\n')
    assert last_validation(metrics, 200)["val_loss"] == 2.25


def test_what_is_not_there_is_left_out(run, tmp_path):
    text = card(flavor("debug"), tmp_path / "a/b/step-1", tokenizer=None, passed=None, tokens=0)
    rows = rows_of(text)
    assert not {"tokens trained on", "data", "tokenizer"} & rows.keys() and "validation" not in text
    assert "No tokenizer came" in text and "without comparing" in text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (LLAMA, {"feed-forward": "24 wide, swiglu", "positions": "RoPE, base 150,000"}),
        (GPT2, {"feed-forward": "24 wide, gelu", "positions": "learned, 64"}),
        ({"rope_factor": 8.0}, {"positions": "RoPE, base 150,000, yarn factor 8"}),
    ],
)
def test_other_shapes(run, fields, told):
    text = card(tiny_args(**fields), run)
    rows = rows_of(text)
    assert ("- mixture-of-experts\n" in text) == ("rope_factor" in fields)
    assert told.items() <= rows.items()
    assert ("window" in rows) == ("rope_factor" in fields) == ("experts" in rows)


def test_a_converted_model_is_not_called_ours(run):
    text = card(flavor("debug"), run, step=0, tokens=0, source="/downloads/their-model")
    assert "Converted with microtron from `their-model`" in text and "pretrained with" not in text
    assert "/downloads" not in text


def test_what_vllm_would_get_wrong_is_told(run):
    """It takes even layers for windows, whatever layer_types says."""
    assert "vLLM" not in card(tiny_args(n_layers=4), run)
    assert "vLLM" not in card(tiny_args(**LLAMA), run)
    for wrong in ({"window_pattern": "SSL"}, {"window_pattern": "L"}, {"norm_eps": 1e-6}):
        (name,) = wrong
        told = card(tiny_args(n_layers=4, **wrong), run)
        assert "vLLM does not read all" in told and f"{name} {wrong[name]!r}" in told
