"""Bad data, folders, disks, checkpoints and numbers end in one line with a remedy.

Every case runs as a person would run it (`runs.py`), and every file that was there stays as it was.
What the configuration alone shows is in test_bad_config.py, commands in test_bad_commands.py.
"""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import SMALL, Run, assert_one_line, run

from microtron.data.prepare import prepare
from microtron.data.shards import ShardWriter

ROOT = Path(__file__).parents[2]
MOCK = "--data.mock"

ARGS = [*SMALL, "--training.steps=6", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=0"]
OWN = {"log", "comm_traces"}  # what a refused run may leave


def state(folder):
    """Every file of a run, but for logs."""
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not OWN & set(p.relative_to(folder).parts)
    }


def refused(argv, folder, *told, **options):
    """A run that ends in one line and leaves the run's files as they were."""
    dump = folder / "dump"
    before = state(dump) if dump.is_dir() else {}
    ended = Run([*ARGS, *argv], folder, **options).wait()
    assert ended.code == 1, ended.told
    assert_one_line(ended.err, *told)
    assert not dump.is_dir() or state(dump) == before
    return ended


@pytest.fixture(scope="module")
def char_data(tmp_path_factory, tiny_corpus):
    folder = tmp_path_factory.mktemp("char") / "data"
    prepare(source=f"text:{tiny_corpus.parent}/*.txt", tokenizer="char", out=folder, workers=1)
    return folder


@pytest.fixture
def data(tmp_path, tiny_corpus):
    """A dataset folder of its own, to be damaged."""
    shutil.copytree(tiny_corpus, tmp_path / "data")
    (tmp_path / "data" / "dataset.verified.json").unlink(missing_ok=True)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_corpus):
    """A run of 6 steps with checkpoints 2, 4 and 6."""
    return run([*ARGS, f"--data.dirs={tiny_corpus}"], tmp_path_factory.mktemp("finished"))


@pytest.fixture
def longer(tmp_path, finished, tiny_corpus):
    """Goes on with a copy of the finished run, to 8 steps, after ``damage``; it must be refused."""

    def check(*told, argv=(), damage=None):
        shutil.copytree(finished.folder, tmp_path / "run")
        if damage is not None:
            damage(tmp_path / "run" / "dump" / "checkpoint" / "step-6")
        argv = [f"--data.dirs={tiny_corpus}", "--training.steps=8", *argv]
        return refused(argv, tmp_path / "run", *told)

    return check


def flip_a_byte(shard):
    raw = bytearray(shard.read_bytes())
    raw[1500] ^= 1
    shard.write_bytes(raw)


def name_a_missing_shard(shard):
    sidecar = shard.parent / "dataset.json"
    info = json.loads(sidecar.read_text())
    info["splits"]["train"].append(info["splits"]["train"][0] | {"file": "train_000001.bin"})
    sidecar.write_text(json.dumps(info))


@pytest.mark.parametrize(
    "damage, told",
    [
        (flip_a_byte, ["train_000000.bin is corrupt: sha256", "copy it again"]),
        (lambda shard: os.truncate(shard, 5000), ["is truncated: 5000 bytes", "copy it again"]),
        (lambda shard: shard.unlink(), ["train_000000.bin cannot be read", "copy it again"]),
        (name_a_missing_shard, ["train_000001.bin cannot be read", "copy it again"]),
        (
            lambda shard: (shard.parent / "dataset.json").write_text("{"),
            ["dataset.json cannot be read", "run `microtron prepare` again"],
        ),
    ],
    ids=["corrupt", "truncated", "gone", "listed but missing", "sidecar"],
)
def test_damaged_data(tmp_path, data, damage, told):
    damage(data / "train_000000.bin")
    refused([f"--data.dirs={data}"], tmp_path, *told)


def test_data_that_is_not_there(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    refused([f"--data.dirs={missing}"], tmp_path, f"{missing} does not exist", "microtron prepare")
    refused([f"--data.dirs={empty}"], tmp_path, f"{empty} has neither", "run `microtron prepare`")


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--data.source=text:{0}/none/*.txt"], ["none/*.txt matches no file", "correct the path"]),
        (["--data.source=xml:{0}"], ["'xml:{0}' is not one of: stdlib, text:GLOB"]),
        (
            ["--data.source=text:{1}/*.txt", "--data.tokenizer=bytes"],
            ["'bytes' is not one of byte, char", "name a tokenizer.json"],
        ),
    ],
    ids=["glob", "kind", "tokenizer"],
)
def test_source_that_cannot_be_prepared(tmp_path, tiny_corpus, argv, told):
    places = tmp_path, tiny_corpus.parent
    refused(
        [f"--data.dirs={tmp_path}/new", *(a.format(*places) for a in argv)],
        tmp_path,
        *(part.format(*places) for part in told),
    )
    assert not (tmp_path / "new").exists()


def test_data_that_does_not_fit_the_run(tmp_path, tiny_corpus, char_data):
    own = f"--data.dirs={tiny_corpus}"
    refused(
        [f"--data.dirs={char_data},{tiny_corpus}"],
        tmp_path,
        "'byte'",
        "fingerprint",
        "choose that tokenizer or run `microtron prepare`",
    )
    refused(
        [own, "--model.args.vocab_size=200"],
        tmp_path,
        "vocab_size = 200",
        "257 tokens",
        "--model.args.vocab_size=264",
    )
    refused([own, "--training.seq_len=50000"], tmp_path, "seq_len 50000", "lower seq_len")
    refused(
        [own, "--training.local_batch_size=5000"], tmp_path, "global batch of 5000", "prepare more"
    )
    refused(
        [own, "--data.document_mask", "--data.eot_id=3"], tmp_path, "eot_id 3", "leave eot_id out"
    )
    refused(
        [f"--data.dirs={char_data}", "--sample.freq=5", "--sample.prompt=€"],
        tmp_path,
        "sample.prompt = '€'",
        "U+20AC",
        "leave it out",
    )


def test_foreign_shards_with_other_ids_or_without_validation(tmp_path):
    (tmp_path / "data").mkdir()
    with ShardWriter(tmp_path / "data" / "train_000000.bin", "uint16") as shard:
        shard.write(np.arange(2000) % 300)
    own = f"--data.dirs={tmp_path}/data"
    refused([own], tmp_path, "token id 299", "vocab_size 264", "raise vocab_size to 300")
    refused(
        [own, "--model.args.vocab_size=304", "--validation.enable"],
        tmp_path,
        "no shards of split 'val'",
        "prepare the dataset with this split",
    )


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "a" / "dump").mkdir(parents=True)
    (tmp_path / "a" / "dump" / "checkpoint").write_text("mine")
    refused([MOCK], tmp_path / "a", "dump/checkpoint is a file", "move it away")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "dump").write_text("mine")
    refused([MOCK], tmp_path / "b", "job.dump_folder", f"{tmp_path}/b/dump", "choose another")
    (tmp_path / "c" / "dump" / "metrics.jsonl").mkdir(parents=True)
    refused([MOCK], tmp_path / "c", "metrics.jsonl", "Is a directory", "name another")


def test_a_model_too_large_for_the_machine(tmp_path):
    refused(
        [MOCK, "--model.args.vocab_size=99999999999999"],
        tmp_path,
        "out of memory",
        "allocate 6399999999999936 bytes",
        "choose a smaller model",
    )


def overwrite(step):
    (step / "__0_0.distcp").write_bytes(b"\xff" * (step / "__0_0.distcp").stat().st_size)


@pytest.mark.parametrize(
    "damage, told",
    [
        (
            lambda step: (step / "microtron.json").write_text("garbage"),
            ["step-6/microtron.json", "JSONDecodeError", "move the step away"],
        ),
        (
            lambda step: (step / "microtron.json").write_text('{"model_args": 3}'),
            ["step-6/microtron.json", "TypeError", "move the step away"],
        ),
        (overwrite, ["cannot load the checkpoint", "step-6", "move it away"]),
    ],
    ids=["identity", "identity of another kind", "shard"],
)
def test_unreadable_checkpoint(longer, damage, told):
    longer(*told, damage=damage)


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--checkpoint.load_step=5"], ["load_step = 5", "is not there", "name one of 2, 4, 6"]),
        (["--training.seq_len=17"], ["seq_len 17", "choose one that does"]),
        (["--model.args.load_balance=bias"], ["expert_bias", "set them back"]),
        ([MOCK, "--data.dirs="], ["other data", "name the same datasets"]),
        (["--model.args.dim=32"], ["dim 16 there, 32 here", "set these fields back"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_checkpoint_that_does_not_fit(longer, argv, told):
    longer(*told, argv=argv)


def test_initial_weights_that_are_not_there(tmp_path, finished):
    option = "--checkpoint.initial_load_path"
    steps = finished.step(6).parent
    for path, why in ((tmp_path / "none", "is not there"), (steps, "half-written")):
        refused([MOCK, f"{option}={path}"], tmp_path, str(path), why, "checkpoint/step-N folder")
    refused([MOCK, "--checkpoint.load_step=3"], tmp_path, "load_step = 3", "leave it out")


def test_two_ranks_are_refused_as_one(tmp_path):
    refused_run = refused(
        [MOCK, "--training.global_batch_size=13"],
        tmp_path,
        "global_batch_size = 13",
        "ranks = 2: use 12",
        world_size=2,
    )
    assert [rank.exitcode for rank in refused_run.ranks] == [1, 1]
    first, second = tmp_path / "rank0.err", tmp_path / "rank1.err"
    assert second.read_text() == refused_run.err.replace("error:", "error (rank 1):")
    # Rank 0 is heard first: a launcher ends the others as soon as one has failed.
    assert second.stat().st_mtime > first.stat().st_mtime + 1


def no_space_for_step_4():
    """The disk is full when the shard of step 4 is written."""
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms as Transforms

    plain = Transforms.transform_save_stream

    def full(self, item, stream):
        if "step-4" in str(getattr(stream, "name", "")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(self, item, stream)

    Transforms.transform_save_stream = full


def small_files_from_step_4():
    """The system refuses to let files grow past 8 KiB when step 4 is written."""
    from microtron import checkpoints

    plain = checkpoints.write_identity

    def limited(folder, *rest):
        if folder.name == "step-4":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        plain(folder, *rest)

    checkpoints.write_identity = limited


@pytest.mark.parametrize(
    "full, cause, mode",
    [
        (no_space_for_step_4, "No space left on device", "disabled"),
        (no_space_for_step_4, "No space left on device", "async"),
        (small_files_from_step_4, "File too large", "disabled"),
    ],
)
def test_full_disk_while_saving(tmp_path, tiny_corpus, finished, full, cause, mode):
    argv = [*ARGS, f"--data.dirs={tiny_corpus}", f"--checkpoint.async_mode={mode}"]
    ended = Run(argv, tmp_path, prepare=full).wait()
    assert ended.code == 1, ended.told
    assert_one_line(
        ended.err, "could not save", cause, "free the disk", f"newest whole step: {ended.step(2)}"
    )
    assert not (ended.step(4) / ".metadata").exists()
    again = run(argv, tmp_path)
    assert "resumed from" in again.out and "step-2 " in again.out
    assert again.losses() == finished.losses()


def no_more_metrics():
    """Metrics cannot be written from step 3 on."""
    from microtron.metrics import RunMetrics

    plain = RunMetrics.write

    def write(self, entry):
        if entry["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, entry)

    RunMetrics.write = write


def poison():
    """A weight turns into NaN before step 3."""
    import torch

    from microtron.train import Trainer

    plain = Trainer.train_step

    def step(self, batches):
        if self.step == 3:
            with torch.no_grad():
                self.model_parts[0].layers["1"].attention.wq.weight[0, 0] = float("nan")
        return plain(self, batches)

    Trainer.train_step = step


@pytest.mark.parametrize(
    "broken, told",
    [
        (no_more_metrics, ["No space left on device", "goes on from the newest whole step"]),
        (
            poison,
            [
                "step 3 is not finite",
                "weights layers.1.attention.wq.weight;",
                "first bad output of layers.1.attention.wq;",
                "lower optimizer.lr",
            ],
        ),
    ],
)
def test_a_run_that_breaks_at_step_3(tmp_path, tiny_corpus, finished, broken, told):
    ended = Run([*ARGS, f"--data.dirs={tiny_corpus}"], tmp_path, prepare=broken).wait()
    assert ended.code == 1, ended.told
    assert_one_line(ended.err, *told)
    assert list(ended.losses()) == [1, 2]
    assert [p.name for p in (ended.dump / "checkpoint").iterdir()] == ["step-2"]
    assert run([*ARGS, f"--data.dirs={tiny_corpus}"], tmp_path).losses() == finished.losses()


def test_a_learning_rate_that_blows_up(tmp_path):
    ended = Run([*ARGS, MOCK, "--optimizer.lr=1e30"], tmp_path).wait()
    assert ended.code == 1, ended.told
    assert_one_line(ended.err, "step 2 is not finite", "gradients", "lower optimizer.lr")
    assert list(ended.losses()) == [1] and not (ended.dump / "checkpoint").exists()


# -- the commands ---------------------------------------------------------------------------------
