"""Export: the folder that transformers loads, what is refused before anything is written, and what
becomes of OUT when something goes wrong. The gate has its own file, test_gate.py."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exporting import FAMILIES, args_of, weights_of, write_step

from microtron import checkpoints, dcp
from microtron.errors import UserError
from microtron.hf import gate, to_hf
from microtron.hf.folder import Folder
from microtron.hf.folder import read_into as read_folder
from microtron.hf.keys import claims
from microtron.model.model import Transformer


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A checkpoint of each family."""
    folder = tmp_path_factory.mktemp("steps")
    return {
        family: write_step(folder / family / "checkpoint" / "step-3", args_of(family))
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def exports(steps, tmp_path_factory):
    """Each checkpoint exported through the gate, in several files."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        family: to_hf.export(step, folder / family, max_shard_gib=1e-4)
        for family, step in steps.items()
    }


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_in_shards_reads_back_to_the_bit(steps, exports, family):
    folder = Folder(exports[family])
    index = json.loads((exports[family] / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    assert max((exports[family] / name).stat().st_size for name in files) < 1e-4 * 2**30 + 8192
    weights = weights_of(exports[family])
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    args = checkpoints.architecture(steps[family])
    ours, back = Transformer(args), Transformer(args)
    dcp.read_into(steps[family], ours)
    read_folder(folder, folder.args, back)
    for name, value in ours.named_parameters():
        assert torch.equal(value, back.get_parameter(name)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(steps, exports, tmp_path, dtype):
    out = to_hf.export(steps["gpt_oss"], tmp_path / "out", dtype=dtype)
    wanted = weights_of(exports["gpt_oss"])
    for name, value in weights_of(out).items():
        assert torch.equal(value, wanted[name].to(getattr(torch, dtype))), name
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert sorted(p.name for p in out.glob("model*")) == ["model.safetensors"]


def test_kept_dtypes_may_be_mixed(tmp_path):
    """A bf16 tensor with an odd number of values must not put the next fp32 one off its place."""
    args = args_of(n_layers=1, n_heads=5, n_kv_heads=1)
    step = write_step(tmp_path / "step-1", args)
    state = dcp.read(step, dcp.tensors(step))
    state["layers.0.attention.sinks"] = state["layers.0.attention.sinks"].bfloat16()
    dcp.write_step(step, {n: (v.shape, v.dtype) for n, v in state.items()}, state.__getitem__)
    out = to_hf.export(step, tmp_path / "out", check=False)
    head = (out / "model.safetensors").read_bytes()
    size = int.from_bytes(head[:8], "little")
    for kind in json.loads(head[8 : 8 + size]).values():
        assert kind.get("dtype") != "F32" or (8 + size + kind["data_offsets"][0]) % 4 == 0
    weights = weights_of(out)
    for claim in claims(args):
        for ours, theirs in zip(claim.ours, claim.theirs, strict=False):
            assert torch.equal(weights[theirs], state[ours]) and len(weights) == 20
            assert weights[theirs].dtype == state[ours].dtype


def test_special_ids_and_padding(exports):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exports["gpt_oss"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256] * 3
    assert generation["suppress_tokens"] == list(range(257, 264))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[260] = 100 * torch.randn(40)  # a padded row wins every second step
    reader = AutoTokenizer.from_pretrained(folder)
    prompt = reader("ab", return_tensors="pt")
    assert prompt.input_ids.tolist() == [[256, 97, 98]]
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=True)
    assert int(ids.max()) < 257


def test_context_length(steps, exports):
    """The run's for RoPE, what the factor makes of it for YaRN, the table's where there is one."""
    lengths = {}
    for family, folder in exports.items():
        config = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        lengths[family] = config.get("max_position_embeddings", config.get("n_positions"))
        assert tokenizer["model_max_length"] == lengths[family]
    assert lengths == {"gpt_oss": 256, "gpt2": 64, "llama": 32}


# -- refusals: before anything is written ---------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"qk_norm": True}, "qk_norm = True"),
        ({"logit_softcap": 5.0, "sinks": False}, "logit_softcap = 5.0.*sinks = False"),
    ],
)
def test_an_architecture_without_a_counterpart(tmp_path, overrides, told):
    step = write_step(tmp_path / "step-1", args_of(**overrides))
    fields = told.split(".*")
    with pytest.raises(UserError) as caught:
        to_hf.to_hf(step, tmp_path / "out")
    assert all(field in str(caught.value) for field in fields)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def refused(step, told, **options):
    """Asserts one line and that nothing is left beside the step."""
    out = step.parent / "out"
    with pytest.raises(UserError, match=told) as caught:
        to_hf.export(step, out, **{"check": False} | options)
    assert "\n" not in str(caught.value)
    assert [p.name for p in step.parent.iterdir()] == [step.name]


def test_weights_that_cannot_be_exported(tmp_path):
    biased = args_of(load_balance="bias")
    nudge = {"layers.1.moe.expert_bias": lambda t: t.copy_(torch.tensor([0.0, 0.1, 0.0, 0.0]))}
    rest = {"layers.0.moe.expert_bias": torch.Tensor.zero_}
    step = write_step(tmp_path / "a" / "step-1", biased, change=rest | nudge)
    refused(step, r"layers\.1\.moe\.expert_bias is not zero")
    change = {"layers.1.ffn_norm.weight": lambda t: t[3:5].fill_(float("nan"))}
    step = write_step(tmp_path / "b" / "step-1", args_of(), change=change)
    refused(step, r"layers\.1\.ffn_norm\.weight holds 2 values that are not finite")
    change = {"layers.1.ffn_norm.weight": lambda t: t[3:4].fill_(1e5)}
    step = write_step(tmp_path / "c" / "step-1", args_of(), change=change)
    refused(step, "as float16 holds 1 values that are not finite", dtype="float16")
    refused(step, "max-shard-gib 0", max_shard_gib=0)


def test_a_tokenizer_with_more_ids_than_rows(tmp_path):
    step = write_step(tmp_path / "step-1", args_of(vocab_size=256))
    refused(step, "byte has 257 ids and the model 256 rows")


def test_another_models_identity(tmp_path):
    step = write_step(tmp_path / "step-1", args_of())
    path = step / checkpoints.IDENTITY
    path.write_text(path.read_text().replace('"expert_dim": 24', '"expert_dim": 32'))
    refused(step, "its architecture says")
    whole = json.loads(path.read_text())
    for damaged in ({"tokenizer": {"name": "byte"}}, {"tokenizer": [1]}, {"model_args": []}):
        path.write_text(json.dumps(whole | damaged))
        refused(step, r"cannot read .*microtron.json \(\w+: .*restore the file")


def test_out_is_replaced_only_when_asked_and_only_an_export(steps, tmp_path, monkeypatch):
    step, out = steps["llama"], tmp_path / "out"
    to_hf.export(step, out, check=False)
    (out / "mine").touch()
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        to_hf.export(step, out, check=False)
    with monkeypatch.context() as patched:
        patched.setattr(gate, "TOLERANCE", 0.0)
        with pytest.raises(UserError, match="gate"):
            to_hf.export(step, out, overwrite=True)
    assert (out / "mine").exists()  # as it was
    to_hf.export(step, out, check=False, overwrite=True)
    assert not (out / "mine").exists() and (out / "config.json").exists()
    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "today").touch()
    for end in ("old", "new"):  # a person's own copies of an export
        (tmp_path / f"out.{end}").mkdir()
    to_hf.export(step, out, check=False, overwrite=True)
    with pytest.raises(UserError, match="no export, and is left as it is"):
        to_hf.export(step, diary, check=False, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diary", "out", "out.new", "out.old"]


def test_ctrl_c_leaves_nothing(steps, tmp_path, monkeypatch):
    def interrupted(*_):
        assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr(to_hf, "write_configs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_hf.export(steps["llama"], tmp_path / "out", check=False)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(steps, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf, "os", SimpleNamespace(fsync=full, replace=os.replace))
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        to_hf.export(steps["llama"], tmp_path / "out", check=False)
    assert not list(tmp_path.iterdir())


# -- memory and the command -----------------------------------------------------------------------


def test_one_tensor_at_a_time(steps, tmp_path, monkeypatch):
    """A claim is read, written and dropped before the next is read."""
    import weakref

    held, most = [], []
    reader = dcp.reader

    def counting(step):
        read = reader(step)

        def one(name):
            most.append(sum(ref() is not None for ref in held))
            value = read(name)
            held.append(weakref.ref(value))
            return value

        return one

    monkeypatch.setattr(dcp, "reader", counting)
    to_hf.export(steps["gpt2"], tmp_path / "out", check=False)
    assert len(held) > 20 and max(most) <= 2  # q and k, when v is read


def test_the_command(steps, tmp_path, capfd):
    """On a run's folder, and on a folder that is none: exit codes and streams."""
    from microtron.cli import main

    run, out = steps["gpt_oss"].parents[1], tmp_path / "out"
    assert main(["convert", "to-hf", str(run), str(out), "--dtype", "bfloat16"]) == 0
    told = capfd.readouterr()
    assert told.out.startswith(f"wrote {out}: ") and told.out.count("\n") == 1
    assert "512 positions agree within" in told.out
    assert told.err == f"converting {steps['gpt_oss']}\n"
    assert main(["convert", "to-hf", str(out), str(tmp_path / "x"), "--no-gate"]) == 1
    assert capfd.readouterr().err.startswith(f"error: {out} ")


def test_the_benchmark_compares_equal_weights(tmp_path, monkeypatch):
    """benchmarks/convert.py: what it measures against arrives at the same weights."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import convert

    from microtron.flavors import flavor

    convert.write_step(tmp_path / "step-1", flavor("debug"))
    convert.peer(tmp_path / "step-1", tmp_path / "theirs")
    ours = to_hf.export(tmp_path / "step-1", tmp_path / "ours", dtype="bfloat16", check=False)
    assert convert.check_same(ours, tmp_path / "theirs") == 71
    other = to_hf.export(tmp_path / "step-1", tmp_path / "fp32", check=False)
    with pytest.raises(AssertionError, match="weight"):
        convert.check_same(other, ours)
    told = convert.measured([sys.executable, "-c", "bytes(10**8)"])
    assert told["peak_bytes"] > 10**8 and told["seconds"] > 0
