"""Hugging Face folder -> step: the same bits and tokenizer, a recipe that trains, or nothing."""

import json
import tomllib
import weakref

import pytest
import torch
from exports import FAMILIES, family, theirs, write_folder
from runs import run
from safetensors.torch import load_file, save_file

from microtron import checkpoints, cli, dcp
from microtron.data.tokenizers import load_tokenizer
from microtron.data.train_bpe import train_bpe
from microtron.errors import UserError
from microtron.hf.folder import Folder
from microtron.hf.from_hf import from_hf
from microtron.hf.to_hf import export


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of short documents, and a tokenizer trained on them in BPE."""
    home = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (home / f"{i}.txt").write_text(f"document {i}: the same words, and {i * i} others. " * 20)
    train_bpe(source=f"text:{home}/*.txt", vocab_size=300, out=home / "bpe")
    return home


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, texts):
    """A Hugging Face folder with a tokenizer, as a person would download it."""
    folder = tmp_path_factory.mktemp("spoken") / "model"
    write_folder(folder, family("gpt_oss", vocab_size=304))
    fields = json.loads((texts / "bpe" / "tokenizer.json").read_text())
    bare = fields | {"post_processor": None}  # as GPT-2's: nothing is put before a text
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    config = (texts / "bpe" / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_to_the_same_bits(tmp_path, name):
    args = family(name)
    model = write_folder(tmp_path / "in", args)
    from_hf(tmp_path / "in", tmp_path / "step")
    held = model.state_dict()
    assert dcp.tensors(tmp_path / "step") == {k: (v.shape, v.dtype) for k, v in held.items()}
    for key, value in dcp.read(tmp_path / "step", held).items():
        assert torch.equal(value, held[key]), key
    told = checkpoints.architecture(tmp_path / "step")
    assert not checkpoints.differing(vars(told), args)
    export(tmp_path / "step", tmp_path / "out", check=False)
    before, after = theirs(model, args), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_dtype(tmp_path, capsys, kind):
    args = family("gpt_oss")
    model = write_folder(tmp_path / "in", args)
    stored = {k: v.bfloat16() for k, v in theirs(model, args).items()}
    write_folder(tmp_path / "in", args, tensors=stored)
    name = str(kind).removeprefix("torch.")
    words = ["convert", "from-hf", f"{tmp_path / 'in'}", f"{tmp_path / 'step'}", "--dtype", name]
    assert cli.main(words) == 0
    assert f"parameters as {name}" in capsys.readouterr().out
    found = dcp.read(tmp_path / "step", ["norm.weight"])["norm.weight"]
    assert found.dtype == kind and torch.equal(found, model.norm.weight.bfloat16().to(kind))
    from_hf(tmp_path / "in", tmp_path / "kept")
    assert dcp.tensors(tmp_path / "kept")["norm.weight"][1] == torch.bfloat16


def test_one_tensor_in_memory(tmp_path, monkeypatch):
    write_folder(tmp_path / "in", family("gpt2"))
    alive, most, plain = [], [], Folder.tensor

    def watched(self, name):
        value = plain(self, name).clone()
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Folder, "tensor", watched)
    from_hf(tmp_path / "in", tmp_path / "step")
    # GPT-2 keeps q, k and v in one tensor: weight and bias are split and wait for their turns.
    assert len(alive) > 20 and max(most) <= 2


def test_the_recipe_trains_and_its_steps_know_the_tokenizer(tmp_path, spoken, texts, capsys):
    step = tmp_path / "step"
    from_hf(spoken, step)
    assert f"next: ./run_train.sh {step / 'train.toml'}" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copied = step / checkpoints.TOKENIZER / name
        assert copied.read_bytes() == (spoken / name).read_bytes()
    recipe = tomllib.loads((step / "train.toml").read_text())
    assert recipe["data"]["source"] == "stdlib" and recipe["validation"]["enable"]
    done = run(
        [
            f"--job.config_file={step / 'train.toml'}",
            f"--data.source=text:{texts}/*.txt",
            f"--data.dirs={tmp_path / 'data'}",
            "--training.steps=2",
            "--training.seq_len=32",
            "--validation.val_tokens=64",
        ],
        tmp_path / "run",
    )
    assert f"started from the weights in {step}" in done.out
    saved = checkpoints.find_step(done.dump)
    assert saved == done.step(2) == checkpoints.find_step(done.dump / "checkpoint")
    expected = load_tokenizer(str(spoken)).encode("the same words")
    for found in (step, saved):
        tokenizer = checkpoints.load_step_tokenizer(found)
        assert tokenizer.encode("the same words") == expected
        assert checkpoints.identity(found)["tokenizer"]["vocab_size"] == 300
    assert checkpoints.identity(saved)["step"] == 2 and checkpoints.identity(saved)["tokens"] > 0
    file = saved / checkpoints.TOKENIZER / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(UserError, match="is not the one it was trained with"):
        checkpoints.load_step_tokenizer(saved)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda t: t["model.layers.1.self_attn.q_proj.weight"].fill_(float("inf")), "not finite"),
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "lacks model.layers.1.self"),
    ],
)
def test_nothing_is_left_of_a_refused_folder(tmp_path, capsys, damage, told):
    args = family("gpt_oss")
    model = write_folder(tmp_path / "in", args)
    damage(tensors := theirs(model, args))
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    assert cli.main(["convert", "from-hf", f"{tmp_path / 'in'}", f"{tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_out_is_not_overwritten_and_its_tokenizer_must_fit(tmp_path, spoken):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        from_hf(spoken, tmp_path / "out")
    small = tmp_path / "small"
    write_folder(small, family("gpt_oss", vocab_size=256))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((spoken / name).read_bytes())
    with pytest.raises(UserError, match="has 300 tokens, the model 256 rows"):
        from_hf(small, tmp_path / "step")


def test_finding_a_step(tmp_path, spoken):
    from_hf(spoken, tmp_path / "a")
    assert checkpoints.find_step(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "a").rename(tmp_path / "run" / "checkpoint" / "step-5")
    (tmp_path / "run" / "checkpoint" / "step-7").mkdir()  # half-written
    whole = tmp_path / "run" / "checkpoint" / "step-5"
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint", whole):
        assert checkpoints.find_step(path) == whole
    for path, told in {
        whole.with_name("step-7"): "half-written",
        whole.with_name("step-9"): "not there",
        tmp_path / "nothing": "does not exist",
        tmp_path: "holds no whole checkpoint",
        spoken: "it is a Hugging Face folder; .*convert from-hf",
    }.items():
        with pytest.raises(UserError, match=told):
            checkpoints.find_step(path)
    (whole / checkpoints.IDENTITY).unlink()
    with pytest.raises(UserError, match=f"has no {checkpoints.IDENTITY}"):
        checkpoints.architecture(whole)
    (whole / checkpoints.IDENTITY).write_text('{"model_args": {"dim": 32, "colour": 3}}')
    with pytest.raises(UserError, match="colour"):
        checkpoints.architecture(whole)
