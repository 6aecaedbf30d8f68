"""Loading for inference: a step or a Hugging Face folder, any dtype, and refusals of one line."""

import json

import pytest
import torch
from helpers import build_random, tiny_args

from microtron import checkpoints, dcp
from microtron.data.tokenizers import load_tokenizer
from microtron.errors import UserError
from microtron.infer.load import choose, load

BYTES = load_tokenizer("byte")


def write_step(path, tokenizer=BYTES, **fields):
    """A saved step of a random tiny model; returns the model."""
    args = tiny_args(**{"vocab_size": 264, "load_balance": "aux_loss"} | fields)
    model = build_random(args).eval()
    held = model.state_dict()
    dcp.write(path, {n: (t.shape, t.dtype) for n, t in held.items()}, held.__getitem__)
    checkpoints.write_identity(path, args, tokenizer, {"step": 3, "seq_len": 64})
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two steps, the newer one of the model returned."""
    folder = tmp_path_factory.mktemp("run")
    write_step(folder / "checkpoint/step-2", n_layers=1)
    return folder, write_step(folder / "checkpoint/step-10")


@pytest.mark.parametrize("place", ["checkpoint/step-10", "checkpoint", "."])
def test_step_and_run(run, place):
    folder, model = run
    loaded = load(folder / place)
    assert (loaded.kind, loaded.path.name, loaded.max_tokens) == ("dcp", "step-10", 64)
    assert loaded.prefix_ids == [256] and loaded.stop_ids == (256,)
    assert loaded.tokenizer.name == "byte" and not loaded.model.training
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(tokens), model(tokens), atol=1e-5)


def test_backends_are_those_of_this_device(run):
    args = load(run[0]).args
    assert run[1].model_args.attn_backend == "eager" and args.attn_backend == "auto"


@pytest.mark.parametrize(
    "fields",
    [
        {"load_balance": "bias"},
        {"num_experts": 0, "tie_embeddings": True},
        {"num_experts": 0, "positions": "learned", "max_positions": 32, "norm": "layer"},
    ],
    ids=["bias", "tied", "learned"],
)
def test_bfloat16(tmp_path, fields):
    model = write_step(tmp_path / "step-1", **fields)
    loaded = load(tmp_path / "step-1", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.max_tokens == fields.get("max_positions", 64)
    for (name, got), (_, expected) in zip(
        loaded.model.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(got, expected.bfloat16()), name
    for name, buffer in loaded.model.named_buffers():  # frequencies and selection biases
        assert buffer.dtype != torch.bfloat16, name
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        expected = model(tokens)
        assert (loaded.model(tokens).float() - expected).norm() < 0.05 * expected.norm()


def test_hugging_face_folder(run, tmp_path):
    from microtron.hf.to_hf import export

    folder = export(run[0] / "checkpoint/step-10", tmp_path / "hf", check=False)
    loaded = load(folder)
    assert loaded.kind == "hf" and loaded.prefix_ids == [256] and 256 in loaded.stop_ids
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(tokens), run[1](tokens), atol=1e-5)
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": [9, 256]}))
    assert load(folder).stop_ids == (256, 9)
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).unlink()
    assert load(folder).tokenizer is None
    assert load(folder, tokenizer="byte").prefix_ids == [256]


def test_no_tokenizer(tmp_path):
    write_step(tmp_path / "step-1", tokenizer=None)
    loaded = load(tmp_path / "step-1")
    assert loaded.tokenizer is None and loaded.prefix_ids == []
    with pytest.raises(UserError, match="brings no tokenizer: .* --tokenizer"):
        loaded.need_tokenizer()
    assert load(tmp_path / "step-1", tokenizer="byte").need_tokenizer().name == "byte"


def test_weights_that_compute_nothing(tmp_path):
    model = build_random(tiny_args(vocab_size=264, load_balance="aux_loss"))
    with torch.no_grad():
        model.layers["1"].attention.wo.weight[3, 5] = float("nan")
    held = model.state_dict()
    step = tmp_path / "step-1"
    dcp.write(step, {n: (t.shape, t.dtype) for n, t in held.items()}, held.__getitem__)
    checkpoints.write_identity(step, model.model_args, BYTES, {"step": 1, "seq_len": 64})
    with pytest.raises(UserError, match="layers.1.attention.wo.weight holds 1 .*not finite"):
        load(step)


def test_a_tokenizer_too_large(tmp_path):
    write_step(tmp_path / "step-1", vocab_size=100)
    with pytest.raises(UserError, match=r"byte has 257 tokens, and the model in .* knows 100"):
        load(tmp_path / "step-1")


@pytest.mark.parametrize("place", ["", "nothing"])
def test_no_checkpoint(tmp_path, place):
    with pytest.raises(UserError) as error:
        load(tmp_path / place)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["xpu", "mps", "cuda:99", ""])
def test_no_such_device(run, device):
    with pytest.raises(UserError, match="device '.*' (is not known|was asked for)"):
        load(run[0], device=device)


def test_what_auto_means(monkeypatch):
    assert choose("cuda", "auto") == ("cuda", torch.bfloat16)
    monkeypatch.setattr("microtron.infer.load.pick_threads", lambda: "one thread")
    assert choose("cpu", "auto") == ("cpu", torch.float32)
    assert choose("cpu", "bfloat16") == ("cpu", torch.bfloat16)
    with pytest.raises(UserError, match="--dtype int8 is not known"):
        choose("cuda", "int8")
