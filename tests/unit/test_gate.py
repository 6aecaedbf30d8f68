"""The gate: an export that differs from its checkpoint is refused, and where they part is told."""

import json
import sys

import pytest
import torch
from exporting import FAMILIES, args_of, weights_of, write_step
from helpers import tiny_args

from microtron.data.tokenizers import EOT, CharTokenizer, load_tokenizer
from microtron.errors import UserError
from microtron.hf import gate, to_hf
from microtron.hf.tokenizer_files import write_tokenizer


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A checkpoint of each family."""
    folder = tmp_path_factory.mktemp("steps")
    return {name: write_step(folder / name / "step-3", args_of(name)) for name in FAMILIES}


def spoil(folder, name, change):
    """Rewrites one tensor of an export."""
    from safetensors.torch import save_file

    weights = weights_of(folder)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **fields):
    """Rewrites fields of an export's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def swapped(gate_up):
    return gate_up.view(*gate_up.shape[:-1], -1, 2).flip(-1).flatten(-2)


BROKEN = {
    "a transposed weight": ("gpt_oss", "model.layers.1.self_attn.o_proj.weight"),
    "gate and up swapped": ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj"),
    "sinks": ("gpt_oss", "model.layers.1.self_attn.sinks"),
    "window": ("gpt_oss", {"sliding_window": 6}),
    "layer types": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
    "experts a token": ("gpt_oss", {"num_experts_per_tok": 3}),
    "norm epsilon": ("gpt_oss", {"rms_norm_eps": 1e-2}),
    "rope theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "activation": ("gpt2", {"activation_function": "relu"}),
    "token ids": ("gpt2", "tokenizer.json"),
}


def break_it(folder, what):
    """Applies one row of BROKEN to an export."""
    if isinstance(what, dict):
        return configure(folder, **what)
    if what == "tokenizer.json":
        text = (folder / what).read_text()
        text = text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97', 1)
        return (folder / what).write_text(text)
    change = {"gate_up_proj": swapped, "sinks": torch.neg}.get(what.split(".")[-1])
    return spoil(folder, what, change or (lambda w: w.t().reshape(w.shape)))


@pytest.mark.parametrize("row", BROKEN)
def test_the_gate_sees(steps, tmp_path, monkeypatch, row):
    family, what = BROKEN[row]
    write = to_hf.write_configs

    def broken(folder, *rest):
        write(folder, *rest)
        break_it(folder, what)

    monkeypatch.setattr(to_hf, "write_configs", broken)
    told = "tokens? " if row == "token ids" else r"position.*logit \d+ is .* in transformers"
    with pytest.raises(UserError, match=f"^gate: .*{told}") as caught:
        to_hf.export(steps[family], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_gate_names_the_first_position_that_differs(steps, tmp_path, monkeypatch):
    """A window that is one too long shows at the first token beyond it, and not before."""
    write = to_hf.write_configs

    def broken(folder, *rest):
        write(folder, *rest)
        configure(folder, sliding_window=6)

    monkeypatch.setattr(to_hf, "write_configs", broken)
    with pytest.raises(UserError, match=r"the first being 5 \(token \d+ '.'\)"):
        to_hf.export(steps["gpt_oss"], tmp_path / "out")


def test_missing_and_unknown_weights_do_not_pass(steps, tmp_path, monkeypatch):
    """transformers would draw a missing weight at random and only warn."""
    write = to_hf.write_configs

    def broken(folder, *rest):
        write(folder, *rest)
        configure(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)

    monkeypatch.setattr(to_hf, "write_configs", broken)
    with pytest.raises(UserError, match="gate: transformers lacks.*model.layers.2"):
        to_hf.export(steps["llama"], tmp_path / "out")


def test_the_gate_without_a_tokenizer_and_with_few_characters(tmp_path):
    plain = write_step(tmp_path / "step-1", args_of(), tokenizer=None)
    out = to_hf.export(plain, tmp_path / "plain")
    assert not (out / "tokenizer.json").exists()
    assert "No tokenizer" in (out / "README.md").read_text()
    few = write_step(tmp_path / "step-2", args_of(vocab_size=8), CharTokenizer("a 四\n!"))
    to_hf.export(few, tmp_path / "few")


def json_tokenizer(folder, **config):
    """A tokenizer.json that knows eot, and a tokenizer_config.json."""
    write_tokenizer(load_tokenizer("byte"), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT} | config))
    return load_tokenizer(str(folder))


def test_a_tokenizer_of_a_chat_model(tmp_path):
    """As gpt-oss is published: eot in a text is a token in transformers, and text here."""
    tokenizer = json_tokenizer(tmp_path / "in", chat_template="{{ messages[0].content }}")
    step = write_step(tmp_path / "step-1", args_of("llama"), tokenizer)
    out = to_hf.export(step, tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["split_special_tokens"] is False and EOT in gate.TEXT


def test_code_that_a_tokenizer_names_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    step = write_step(
        tmp_path / "step-1", args_of("llama"), json_tokenizer(tmp_path / "in", **code)
    )
    out = to_hf.export(step, tmp_path / "out")
    assert "auto_map" not in (out / "tokenizer_config.json").read_text()


def test_a_tokenizer_that_transformers_cannot_load(tmp_path):
    """T5's class wants another kind of vocabulary, and says so by whatever exception."""
    tokenizer = json_tokenizer(tmp_path / "in", tokenizer_class="T5Tokenizer")
    step = write_step(tmp_path / "step-1", args_of("llama"), tokenizer)
    with pytest.raises(UserError, match="gate: transformers cannot load the export") as caught:
        to_hf.export(step, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_text_reaches_beyond_the_window():
    assert gate._length(tiny_args(window=128)) == 512
    assert gate._length(tiny_args(window=700)) == 764
    assert gate._length(tiny_args(window=5000)) == gate.MOST_TOKENS
    assert gate._length(args_of("gpt2")) == 64


def test_no_transformers_and_no_memory_are_told_first(steps, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers, or pass --no-gate"):
        to_hf.export(steps["llama"], tmp_path / "out")
    to_hf.export(steps["llama"], tmp_path / "out", check=False)
    monkeypatch.undo()
    monkeypatch.setattr(gate, "bytes_available", lambda: 10**6)
    with pytest.raises(UserError, match="about 0.3 GiB of memory and 0.0 are free.*--no-gate"):
        to_hf.export(steps["llama"], tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_memory_needed_is_that_of_one_model():
    from microtron.flavors import flavor

    assert gate.bytes_available() > 10**8
    assert 83.6 * 1e9 < gate.bytes_needed(flavor("gpt_oss_20b")) < 95e9  # 20.9B in fp32
