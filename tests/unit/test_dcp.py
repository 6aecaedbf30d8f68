"""Steps read and written without a process group: as torch's own, safe, one tensor at a time."""

import os
import pickle
import weakref

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from helpers import build, build_random, tiny_args
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from microtron import dcp, dcp_metadata
from microtron.checkpoints import problem_with
from microtron.errors import UserError
from microtron.model.model import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def specs_of(tensors):
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


@pytest.fixture
def weights():
    """A model's weights and buffers, in bf16 and fp32."""
    found = build_random(tiny_args()).state_dict()
    found["output.weight"] = found["output.weight"].bfloat16()
    return found


@pytest.fixture
def step(tmp_path, weights):
    dcp.write(tmp_path / "step-0", specs_of(weights), weights.__getitem__)
    return tmp_path / "step-0"


def test_what_is_written_is_read_again_and_by_torch(tmp_path, step, weights):
    assert dcp.tensors(step) == specs_of(weights) and problem_with(step) is None
    for name, value in dcp.read(step, weights).items():
        assert torch.equal(value, weights[name]), name
    into = {name: torch.full_like(t, 7) for name, t in weights.items()}
    torch_dcp.load(into, checkpoint_id=step)
    for name, value in into.items():
        assert torch.equal(value, weights[name]), name
    wider = {"output.weight": torch.empty(weights["output.weight"].shape)}
    torch_dcp.load(wider, checkpoint_id=step)  # a run has fp32 master weights
    assert torch.equal(wider["output.weight"], weights["output.weight"].float())


def test_what_torch_wrote_is_read(tmp_path, weights):
    state = weights | {"train_state": {"step": 3}, "optimizer": {"state": torch.ones(2)}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "theirs")
    assert dcp.tensors(tmp_path / "theirs") == specs_of(weights)
    for name, value in dcp.read(tmp_path / "theirs", weights).items():
        assert torch.equal(value, weights[name]), name
    dcp.check_bytes(tmp_path / "theirs")
    dcp_to_torch_save(tmp_path / "theirs", tmp_path / "one.pt")  # and torch still reads its own


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_read_into(step, weights, dtype):
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Transformer(tiny_args())
        dcp.read_into(step, model, dtype)
        for name, value in model.state_dict().items():
            kind = dtype or torch.float32
            assert value.dtype == kind and torch.equal(value, weights[name].to(kind)), name


def test_tied_weights_stay_one(tmp_path):
    args = tiny_args(tie_embeddings=True)
    held = build_random(args).state_dict()
    dcp.write(tmp_path / "tied", specs_of(held), held.__getitem__)
    with torch.device("meta"):
        model = Transformer(args)
    dcp.read_into(tmp_path / "tied", model, torch.bfloat16)
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.equal(model.output.weight, held["output.weight"].bfloat16())


def test_another_architecture_is_refused(step):
    for told, args in {
        "lacks layers.0.attention.k_norm.weight": tiny_args(qk_norm=True),
        "has layers.0.attention.sinks": tiny_args(sinks=False),
        "tok_embeddings.weight is [61, 40], and the model's is [61, 48]": tiny_args(dim=48),
    }.items():
        model = build(args)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError) as refused:
            dcp.read_into(step, model)
        assert told in str(refused.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_tensor_in_memory(tmp_path):
    alive, model = [], build(tiny_args())

    def produce(name):
        assert not [ref for ref in alive if ref() is not None], "an earlier tensor is still held"
        value = torch.full(specs[name][0], 1.0)
        alive.append(weakref.ref(value))
        return value

    specs = {name: (t.shape, torch.float32) for name, t in model.state_dict().items()}
    dcp.write(tmp_path / "step-0", specs, produce)
    dcp.fill(model, specs, produce, None, tmp_path)
    assert len(alive) == 2 * len(specs)


def test_a_view_is_written_without_what_is_behind_it(tmp_path):
    part = torch.arange(100_000.0)[500:600]
    dcp.write(tmp_path / "step-0", {"a": (part.shape, part.dtype)}, lambda name: part)
    assert (tmp_path / "step-0" / "__0_0.distcp").stat().st_size < 4000
    assert torch.equal(dcp.read(tmp_path / "step-0", ["a"])["a"], part)


def test_nothing_half_written(tmp_path, weights):
    def fails(name):
        if name == "norm.weight":
            raise UserError("no such weight")
        return weights[name]

    out = tmp_path / "step-0"
    (tmp_path / "step-0.partial").mkdir()  # of a run that was killed
    for produce in (fails, lambda name: weights[name].half(), lambda name: weights[name][:1]):
        with pytest.raises(UserError):
            dcp.write(out, specs_of(weights), produce)
        assert not list(tmp_path.iterdir())
    dcp.write(out, specs_of(weights), weights.__getitem__)
    with pytest.raises(UserError, match="exists already"):
        dcp.write(out, specs_of(weights), weights.__getitem__)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0"] and problem_with(out) is None


def rewrite(step, change):
    """Changes the metadata of a step."""
    path = step / ".metadata"
    found = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(found) or found))


def in_parts(found):
    """norm.weight as two parts in two shards, as two ranks would save it."""
    held = found.state_dict_metadata["norm.weight"]
    held.chunks = [
        ChunkStorageMetadata(torch.Size([o]), torch.Size([n])) for o, n in ((0, 30), (30, 10))
    ]
    found.storage_data.pop(MetadataIndex("norm.weight", torch.Size([0])))
    for number, chunk in enumerate(held.chunks):
        place = _StorageInfo(f"__{number}_1.distcp", 0, 1)
        found.storage_data[MetadataIndex("norm.weight", chunk.offsets)] = place


def test_parts_in_several_shards_are_joined(step, weights):
    def save(found):
        in_parts(found)
        for number, part in enumerate(weights["norm.weight"].split([30, 10])):
            torch.save(part.clone(), shard := step / f"__{number}_1.distcp")
            place = _StorageInfo(shard.name, 0, shard.stat().st_size)
            offset = torch.Size([number * 30])
            found.storage_data[MetadataIndex("norm.weight", offset)] = place

    rewrite(step, save)
    assert problem_with(step) is None
    assert torch.equal(dcp.read(step, ["norm.weight"])["norm.weight"], weights["norm.weight"])
    (step / "__1_1.distcp").unlink()
    assert problem_with(step) == "shard __1_1.distcp is missing"


def entry(found, name="norm.weight"):
    return next(info for index, info in found.storage_data.items() if index.fqn == name)


def less_of(found):
    in_parts(found)
    found.state_dict_metadata["norm.weight"].chunks.pop()


def twice(found):
    """Both halves of a tensor at its beginning: the count is right, and half of it unset."""
    held = found.state_dict_metadata["norm.weight"]
    held.chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([20]))] * 2


def outside(found):
    held = found.state_dict_metadata["norm.weight"]
    held.chunks = [ChunkStorageMetadata(torch.Size([-40]), held.size)]


def no_dtype(found):
    found.state_dict_metadata["norm.weight"].properties.dtype = "float32"


def test_parts_that_overlap_are_found_among_many():
    grid = [
        ChunkStorageMetadata(torch.Size([row, column]), torch.Size([3, 5]))
        for row in range(0, 12, 3)
        for column in range(0, 20, 5)
    ]
    assert not dcp_metadata._overlap(grid)
    for moved in ([3, 4], [5, 10], [9, 14]):
        odd = ChunkStorageMetadata(torch.Size(moved), torch.Size([1, 2]))
        assert dcp_metadata._overlap([odd, *grid]) and dcp_metadata._overlap([*grid, odd])
    empty = ChunkStorageMetadata(torch.Size([5, 5]), torch.Size([0, 5]))
    assert not dcp_metadata._overlap([*grid, empty])


@pytest.mark.parametrize(
    "change, told",
    [
        (twice, "two parts of norm.weight overlap"),
        (outside, "a part of norm.weight lies outside of it"),
        (no_dtype, "norm.weight has no dtype"),
        (lambda f: setattr(entry(f), "relative_path", "../other.distcp"), "out of the folder"),
        (lambda f: setattr(entry(f), "relative_path", "/etc/passwd"), "out of the folder"),
        (lambda f: setattr(entry(f), "relative_path", "link.distcp"), "out of the folder"),
        (lambda f: setattr(entry(f), "relative_path", "gone.distcp"), "gone.distcp is missing"),
        (lambda f: setattr(entry(f), "offset", 10**9), "is truncated"),
        (lambda f: setattr(entry(f), "offset", -1), "not known here"),
        (lambda f: f.storage_data.clear(), "a part of tok_embeddings.weight is not stored"),
        (less_of, "stored with 30 of its 40 values"),
        (lambda f: f.state_dict_metadata.__delitem__("norm.weight"), "stored and not described"),
        (lambda f: [1, 2], "it holds a list"),
        (lambda f: Metadata({}, storage_data=None), "unreadable .metadata"),
    ],
)
def test_metadata_that_does_not_hold(tmp_path, step, change, told):
    (tmp_path / "other.distcp").write_bytes((step / "__0_0.distcp").read_bytes())
    (step / "link.distcp").symlink_to("../other.distcp")
    rewrite(step, change)
    assert told in problem_with(step), problem_with(step)


def test_damaged_bytes_are_told_in_a_line(step):
    with open(step / "__0_0.distcp", "r+b") as shard:
        shard.seek(200)
        shard.write(b"x" * 3000)
    name = next(iter(dcp.tensors(step)))
    with pytest.raises(UserError, match=f"{name} cannot be read from __0_0.distcp"):
        dcp.read(step, [name])
    with pytest.raises(UserError, match="has no tensor lm_head"):
        dcp.read(step, ["lm_head"])


def test_a_tensor_that_is_not_what_the_metadata_says(step):
    def other(found):
        entry(found).__dict__.update(entry(found, "layers.0.moe.router.gate.bias").__dict__)

    rewrite(step, other)
    with pytest.raises(UserError, match=r"norm.weight holds \[4\].*metadata says \[40\]"):
        dcp.read(step, ["norm.weight"])


class Evil:
    """Unpickled, it makes a file: whoever reads it carelessly leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_metadata_that_would_run_code(tmp_path, step):
    trace = tmp_path / "ran"
    rewrite(step, lambda found: setattr(found, "planner_data", Evil(trace)))
    assert "posix.system" in problem_with(step)
    for reader in (dcp.tensors, dcp.check_bytes, lambda s: dcp.read(s, ["norm.weight"])):
        with pytest.raises(UserError, match=r"names posix.system, which no checkpoint needs"):
            reader(step)
    assert not trace.exists()
    pickle.loads((step / ".metadata").read_bytes())
    assert trace.exists(), "the test is blind: this pickle does nothing"


def test_entries_that_would_run_code(tmp_path):
    trace, step = tmp_path / "ran", tmp_path / "step-1"
    torch_dcp.save({"a": torch.ones(2), "b": {"c": 3, "d": Evil(trace)}}, checkpoint_id=step)
    assert problem_with(step) is None and not trace.exists()
    with pytest.raises(UserError, match=r"entry b.d is not plain data \(it names posix.system\)"):
        dcp.check_bytes(step)
    assert not trace.exists()
    torch_dcp.load({"b": {"d": 0}}, checkpoint_id=step)
    assert trace.exists(), "the test is blind: this entry does nothing"
