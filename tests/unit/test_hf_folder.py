"""Hugging Face folders: read right, and refused in one line where something is wrong."""

import json
import os
import shutil

import pytest
import torch
from exports import FAMILIES, family, theirs, write_folder
from helpers import build, rel, tokens_of
from safetensors.torch import save_file
from test_mxfp4 import packed

from microtron.errors import UserError
from microtron.hf.folder import INDEX, Folder, as_ours, read_into

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shards(folder, tensors):
    """Two shards and their index; returns its weight_map."""
    names = sorted(tensors)
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a sharded folder of a tiny gpt-oss, its weights, its weight_map); not to be written to."""
    folder, args = tmp_path_factory.mktemp("whole") / "tiny", family("gpt_oss")
    tensors = theirs(write_folder(folder, args), args)
    (folder / "model.safetensors").unlink()
    return folder, tensors, shards(folder, tensors)


@pytest.fixture
def copy(tmp_path, whole):
    """The same to break."""
    shutil.copytree(whole[0], tmp_path / "tiny")
    return tmp_path / "tiny", whole[1], dict(whole[2])


def load(path):
    folder = Folder(path)
    model = build(folder.args, seed=9)
    read_into(folder, folder.args, model)
    return model


def refusal(path):
    with pytest.raises(UserError) as refused:
        load(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_transformers_saved(tmp_path, name):
    """Written by save_pretrained, in one file and in several; logits are those of transformers."""
    from transformers import AutoModelForCausalLM

    args = family(name)
    write_folder(tmp_path / "ours", args)
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    there.save_pretrained(tmp_path / "one")
    there.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    tokens = tokens_of(args)
    for saved in ("one", "many"):
        assert (tmp_path / saved / INDEX).exists() == (saved == "many")
        with torch.no_grad():
            assert rel(load(tmp_path / saved).eval()(tokens), there(tokens).logits) < 1e-5


def test_names_and_tensors(whole):
    path, tensors, _ = whole
    folder = Folder(path)
    assert folder.names == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    for name, value in tensors.items():
        assert torch.equal(folder.tensor(name), value), name
    name = "model.layers.1.mlp.experts.down_proj"
    part = folder.part(name, (1, 3, 2), (2, 5, 7))
    assert torch.equal(part, tensors[name][1:3, 3:8, 2:9])
    bf16 = build(folder.args)
    read_into(folder, folder.args, bf16, torch.bfloat16)
    assert torch.equal(bf16.norm.weight, tensors["model.norm.weight"].bfloat16())


def test_bare_gpt2_with_its_buffers_and_a_stored_head(tmp_path):
    """As openai-community/gpt2 is published: no prefix, causal masks among the weights."""
    args = family("gpt2")
    model = write_folder(tmp_path / "bare", args)
    bare = {k.removeprefix("transformer."): v for k, v in theirs(model, args).items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(args.n_layers)}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    write_folder(tmp_path / "bare", args, tensors=bare)
    loaded = load(tmp_path / "bare")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    bare["lm_head.weight"][3] += 1
    write_folder(tmp_path / "bare", args, tensors=bare)
    assert "ties the head to the embedding, and lm_head.weight is not wte" in refusal(
        tmp_path / "bare"
    )


def test_mxfp4_stands_for_bf16(tmp_path):
    from microtron.hf.mxfp4 import dequantise

    args = family("gpt_oss", dim=64, expert_dim=32)
    model = write_folder(tmp_path / "q", args)
    tensors, expected = theirs(model, args), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = packed(experts, outputs, inputs // 32)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = dequantise(blocks, scales)
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    write_folder(tmp_path / "q", args, tensors=tensors, **quantised)
    folder = Folder(tmp_path / "q")
    for name, value in expected.items():
        assert folder.names[name] == (value.shape, torch.bfloat16)
        assert torch.equal(folder.tensor(name), value)
        assert torch.equal(folder.part(name, (1, 2, 3), (2, 4, 5)), value[1:3, 2:6, 3:8])
    loaded = load(tmp_path / "q")
    down = loaded.layers["1"].moe.experts.down
    assert torch.equal(down, expected["model.layers.1.mlp.experts.down_proj"].float())
    tensors.pop("model.layers.0.mlp.experts.down_proj_scales")
    write_folder(tmp_path / "q", args, tensors=tensors, **quantised)
    assert "down_proj_blocks has no scales beside it" in refusal(tmp_path / "q")


def test_the_hubs_cache_layout(tmp_path, whole):
    """snapshots/REVISION/file -> ../../blobs/HASH; no other link may leave the folder."""
    path, tensors, _ = whole
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path.iterdir())):
        shutil.copyfile(file, blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    assert torch.equal(Folder(snapshot).tensor("model.norm.weight"), tensors["model.norm.weight"])
    linked = tmp_path / "linked"  # the folder itself may be a link
    linked.symlink_to(snapshot)
    Folder(linked)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(snapshot, elsewhere, symlinks=False)
    (elsewhere / FIRST).unlink()
    (elsewhere / FIRST).symlink_to(path / FIRST)
    assert f"'{FIRST}' leads out of the folder, to {path / FIRST}" in refusal(elsewhere)


def edit(change):
    def apply(path, tensors, weight_map):
        change(weight_map)
        write_index(path, weight_map)

    return apply


def again(change):
    def apply(path, tensors, weight_map):
        tensors = {name: t.clone() for name, t in tensors.items()}
        change(tensors)
        shards(path, tensors)

    return apply


def twice(path, tensors, weight_map):
    held = {k: tensors[k] for k, file in weight_map.items() if file == SECOND}
    save_file(held | {"model.embed_tokens.weight": tensors["lm_head.weight"]}, path / SECOND)


def not_finite(tensors):
    tensors["model.norm.weight"][3:5] = float("nan")


def wrong_shape(tensors):
    tensors["model.norm.weight"] = torch.ones(41)


@pytest.mark.parametrize(
    "damage, told",
    [
        (edit(lambda m: m.update(a="../other.safetensors")), "'../other.safetensors' leads out"),
        (edit(lambda m: m.update(a="/etc/passwd")), "'/etc/passwd' leads out of the folder"),
        (edit(lambda m: m.update(a="more.safetensors")), "more.safetensors is missing"),
        (edit(lambda m: m.update(a=3)), "has no weight_map of names"),
        (edit(lambda m: m.update(a="x\0")), "has no weight_map of names"),
        (edit(lambda m: m.update(a=FIRST)), f"a should be in {FIRST} by the index, and is not"),
        (edit(lambda m: m.pop("model.norm.weight")), "the index does not know it"),
        (edit(lambda m: m.update({"model.norm.weight": FIRST})), f"{FIRST} has it too"),
        (twice, f"{FIRST} has it too"),
        (again(lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
        (again(lambda t: t.update(extra=torch.ones(2))), "has unknown extra"),
        (again(wrong_shape), "model.norm.weight is [41], and by config.json it is [40]"),
        (again(not_finite), "model.norm.weight holds 2 values that are not finite"),
        (again(lambda t: t.update(extra=torch.ones(2).to(torch.float8_e5m2))), "is F8_E5M2"),
        (lambda path, *_: (path / INDEX).write_text("{"), f"cannot read {{path}}/{INDEX}"),
        (lambda path, *_: (path / INDEX).write_text("[]"), "is no table of fields"),
        (lambda path, *_: (path / SECOND).unlink(), f"{SECOND} is missing"),
        (lambda path, *_: os.truncate(path / FIRST, 5000), f"{FIRST} cannot be read"),
        (lambda path, *_: os.truncate(path / FIRST, 3), f"{FIRST} cannot be read"),
        (lambda path, *_: (path / "config.json").unlink(), "has no config.json"),
        (lambda path, *_: (path / "config.json").write_text("3"), "is no table of fields"),
        (lambda path, *_: shutil.rmtree(path), "is no folder"),
    ],
)
def test_what_is_wrong_is_told(copy, damage, told):
    load(copy[0])
    damage(*copy)
    assert told.format(path=copy[0]) in refusal(copy[0])


def test_pickles_are_not_read(tmp_path, copy):
    path = copy[0]
    for file in (*path.glob("*.safetensors"), path / INDEX):
        file.unlink()
    assert "has no model.safetensors and no" in refusal(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert "weights in pytorch_model.bin, a pickle, which may run code" in refusal(path)


def test_nothing_is_read_before_the_folder_is_known_to_fit(copy):
    path, tensors, _ = copy
    again(wrong_shape)(*copy)
    folder = Folder(path)
    folder.tensor = folder.part = None
    with pytest.raises(UserError, match="by config.json it is"):
        as_ours(folder, folder.args)
