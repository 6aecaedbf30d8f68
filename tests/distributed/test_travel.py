"""The whole journey: text -> BPE -> training on tp2 x dp2 -> Hugging Face -> the same words.

What a person would do, by the functions behind the commands. The 300 steps of the slow one make a
model that has learned something; 20 are enough to see every file in its place.
"""

import json

import pytest
import torch
from runs import Run

from microtron.data.prepare import prepare
from microtron.data.train_bpe import train_bpe
from microtron.hf.from_hf import from_hf
from microtron.hf.to_hf import to_hf
from microtron.infer.generate import generate
from microtron.infer.load import load

PROMPT = "def __init__(self, "
SHAPE = [
    "--model.args.dim=64",
    "--model.args.n_layers=2",
    "--model.args.n_heads=4",
    "--model.args.n_kv_heads=2",
    "--model.args.head_dim=16",
    "--model.args.vocab_size=1024",
    "--model.args.num_experts=4",
    "--model.args.expert_dim=48",
    "--model.args.window=16",
    "--training.seq_len=64",
    "--training.global_batch_size=8",
    "--training.local_batch_size=4",
    "--lr_scheduler.warmup_steps=5",
    "--optimizer.lr=3e-3",
    "--metrics.log_freq=10",
]
MESH = ["--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=2"]


@pytest.fixture(scope="module", params=[20, pytest.param(300, marks=pytest.mark.slow)])
def journey(request, tmp_path_factory):
    """(step folder trained on 4 ranks, exported folder)."""
    home = tmp_path_factory.mktemp("journey")
    train_bpe(source="stdlib", vocab_size=1000, out=home / "bpe", max_bytes=2_000_000)
    prepare(source="stdlib", tokenizer=str(home / "bpe"), out=home / "data", max_bytes=4_000_000)
    argv = [*SHAPE, *MESH, f"--data.dirs={home / 'data'}", f"--training.steps={request.param}"]
    trained = Run(argv, home / "run", world_size=4).wait(240)
    assert trained.code == 0, trained.told
    losses = trained.losses()
    assert losses[request.param] < losses[1] - request.param / 150, losses
    to_hf(trained.step(request.param), home / "hf")
    return trained.step(request.param), home / "hf"


def test_transformers_loads_it_and_has_the_same_logits(journey):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step, exported = journey
    ours, tokenizer = load(step), AutoTokenizer.from_pretrained(exported)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert type(theirs).__name__ == "GptOssForCausalLM"
    text = "import os\n\nclass Reader:\n    '''Reads a fileé, \U0001f409 and all.'''\n" * 4
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == [*ours.prefix_ids, *ours.tokenizer.encode(text)]
    assert tokenizer.decode(ids[0, 1:]) == text
    with torch.no_grad():
        assert (ours.model(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_both_speak_the_same_words(journey, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step, exported = journey
    tokenizer = AutoTokenizer.from_pretrained(exported)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = theirs.generate(**inputs, max_new_tokens=48, do_sample=False)
    expected = tokenizer.decode(out[0], skip_special_tokens=True)
    assert len(expected) > len(PROMPT) + 20
    for checkpoint in (step, exported):
        generate(checkpoint=checkpoint, prompt=(PROMPT,), max_new_tokens=48, temperature=0)
        assert capsys.readouterr().out.strip() == expected.strip()


def test_it_comes_back_to_the_same_bits(journey, tmp_path):
    from microtron import dcp

    step, exported = journey
    from_hf(exported, tmp_path / "back")
    names = [n for n in dcp.tensors(step) if not n.endswith("load_fractions")]
    there, back = dcp.read(step, names), dcp.read(tmp_path / "back", names)
    assert len(names) == 37
    for name in names:
        assert torch.equal(there[name], back[name]), name
    saved = json.loads((step / "microtron.json").read_text())["tokenizer"]
    assert saved, "the step does not know its tokenizer"
