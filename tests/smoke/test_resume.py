"""Nothing is lost: kills at any moment, signals, damaged checkpoints, another architecture."""

import json
import os
import pickle
import random
import shutil
import signal
import time

import pytest
import torch
from runs import SMALL, Run, assert_one_line, assert_same_contents, run

ARGS = [
    *SMALL,
    "--training.steps=8",
    "--checkpoint.interval=2",
    "--checkpoint.keep_latest_k=0",
    "--training.global_batch_size=8",
]


@pytest.fixture(scope="module")
def data(tiny_corpus):
    return [f"--data.dirs={tiny_corpus}"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    return run([*ARGS, *data], tmp_path_factory.mktemp("straight"))


def slow_steps():
    """Steps long enough for a signal to arrive within one."""
    from microtron.train import Trainer

    plain = Trainer.train_step
    Trainer.train_step = lambda *a: (time.sleep(0.15), plain(*a))[1]


def die_while_saving_step_4():
    """Kills the process when the shard of step 4 is written and its metadata is not."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    plain = FileSystemWriter.finish

    def finish(self, *args, **named):
        if str(self.path).endswith("step-4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **named)

    FileSystemWriter.finish = finish


def continue_and_compare(folder, data, straight):
    resumed = run([*ARGS, *data], folder)
    assert_same_contents(resumed.step(8), straight.step(8))
    assert resumed.losses() == straight.losses()
    return resumed


@pytest.mark.parametrize("seed", range(3))
def test_kill_at_a_random_moment(tmp_path, data, straight, seed):
    first = Run([*ARGS, *data], tmp_path, prepare=slow_steps).wait_for("step 1/8")
    time.sleep(random.Random(seed).uniform(0.0, 1.1))
    first.signal(signal.SIGKILL)
    first.wait()
    assert first.code == -signal.SIGKILL, first.told
    continue_and_compare(tmp_path, data, straight)


def test_kill_in_the_middle_of_a_save(tmp_path, data, straight):
    first = Run([*ARGS, *data], tmp_path, prepare=die_while_saving_step_4).wait()
    assert first.code == -signal.SIGKILL, first.told
    assert first.step(4).is_dir() and not (first.step(4) / ".metadata").exists()
    resumed = continue_and_compare(tmp_path, data, straight)
    assert "skipping checkpoint step-4: half-written" in resumed.out
    assert "resumed from" in resumed.out and "step-2" in resumed.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(tmp_path, data, straight, number):
    first = Run([*ARGS, *data], tmp_path, prepare=slow_steps).wait_for("step 3/8")
    first.signal(number)
    first.wait()
    assert first.code == 128 + number, first.told
    saved = max(int(p.name[5:]) for p in (first.dump / "checkpoint").iterdir())
    assert saved >= 3 and f"stopped by {number.name}" in first.out
    resumed = continue_and_compare(tmp_path, data, straight)
    assert f"step-{saved} " in resumed.out


def test_last_step_is_resumable_and_a_finished_run_says_so(tmp_path, data, straight):
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    again = run([*ARGS, *data], tmp_path)
    assert "nothing to do: step 8 of 8" in again.out
    assert again.losses() == straight.losses()
    longer = run([*ARGS, *data, "--training.steps=10"], tmp_path)
    assert list(longer.losses()) == list(range(1, 11))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda step: (step / ".metadata").unlink(), "half-written"),
        (lambda step: (step / ".metadata").write_bytes(b"\x80\x04garbage"), "unreadable .metadata"),
        (lambda step: os.truncate(step / "__0_0.distcp", 1000), "truncated"),
        (lambda step: (step / "__0_0.distcp").unlink(), "is missing"),
    ],
)
def test_damaged_step_is_skipped(tmp_path, data, straight, damage, told):
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    damage(straight_step := tmp_path / "dump" / "checkpoint" / "step-8")
    resumed = continue_and_compare(tmp_path, data, straight)
    assert f"skipping checkpoint {straight_step.name}: " in resumed.out and told in resumed.out
    assert "step-6 " in resumed.out


def test_resuming_from_an_earlier_step_sets_later_ones_aside(tmp_path, data, straight):
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    resumed = run([*ARGS, *data, "--checkpoint.load_step=4", "--checkpoint.interval=100"], tmp_path)
    assert_same_contents(resumed.step(8), straight.step(8))
    assert resumed.losses() == straight.losses()
    kept = sorted(p.name.split("-", 2)[2] for p in (resumed.dump / "discarded").iterdir())
    assert kept == ["step-6", "step-8"]


def test_another_architecture_is_refused(tmp_path, data, straight):
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    refused = Run(
        [*ARGS, *data, "--model.args.n_heads=4", "--model.args.window=4"], tmp_path
    ).wait()
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert "n_heads 2 there, 4 here" in refused.err and "window 8 there, 4 here" in refused.err
    assert (refused.step(8) / ".metadata").exists()


def test_asynchronous_saves_resume_to_the_same_bits(tmp_path, data, straight):
    options = [*ARGS, *data, "--checkpoint.async_mode=async"]
    first = Run(options, tmp_path, prepare=slow_steps).wait_for("step 7/8")
    first.signal(signal.SIGKILL)
    first.wait()
    resumed = run(options, tmp_path)
    assert "resumed from" in resumed.out
    assert_same_contents(resumed.step(8), straight.step(8))


def test_keep_latest_k(tmp_path, data):
    argv = [
        *SMALL,
        *data,
        "--training.steps=6",
        "--checkpoint.interval=1",
        "--checkpoint.keep_latest_k=2",
    ]
    done = run(argv, tmp_path)
    left = sorted(p.name for p in (done.dump / "checkpoint").iterdir())
    assert left == ["step-5", "step-6"]


def test_unwritten_lines_of_a_killed_run_do_not_stay(tmp_path, data, straight):
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "dump" / "checkpoint" / "step-8")
    with open(tmp_path / "dump" / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    resumed = run([*ARGS, *data], tmp_path)
    lines = (resumed.dump / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def run_code(trace):
    """An object that makes a file when it is unpickled."""
    return type("Evil", (), {"__reduce__": lambda self: (os.system, (f"touch {trace}",))})()


def evil_metadata(step, trace):
    path = step / ".metadata"
    found = pickle.loads(path.read_bytes())
    found.planner_data = run_code(trace)
    path.write_bytes(pickle.dumps(found))


def evil_entry(step, trace):
    """An archive of torch.save in place of the step's number, at the end of the shard."""
    path = step / ".metadata"
    found = pickle.loads(path.read_bytes())
    (info,) = (v for k, v in found.storage_data.items() if k.fqn == "train_state.step")
    with open(step / info.relative_path, "ab") as shard:
        info.offset = shard.tell()
        torch.save(run_code(trace), shard)
        info.length = shard.tell() - info.offset
    path.write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("damage", [evil_metadata, evil_entry])
def test_a_checkpoint_that_would_run_code_runs_none(tmp_path, data, straight, damage):
    trace = tmp_path / "ran"
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "dump" / "checkpoint" / "step-8"
    damage(step, trace)
    argv = [*ARGS, *data]
    if damage is evil_metadata:  # as good as damaged: the step before it is whole
        resumed = run(argv, tmp_path)
        assert "skipping checkpoint step-8: unreadable .metadata" in resumed.out
        assert "posix.system" in resumed.out and "step-6 " in resumed.out
    else:
        refused = Run(argv, tmp_path).wait()
        assert refused.code == 1
        assert_one_line(refused.err, "step-8: entry train_state.step is not plain data")
        load = f"--checkpoint.initial_load_path={step}"
        refused = Run([*argv, load], tmp_path / "other").wait()
        assert refused.code == 1
        assert_one_line(refused.err, "step-8: entry train_state.step is not plain data")
    assert not trace.exists()


def test_a_step_carries_its_tokenizer(straight):
    from microtron import checkpoints

    told = checkpoints.identity(straight.step(8))
    assert told["tokenizer"]["name"] == "byte" and told["step"] == 8 and told["tokens"] > 0
    assert checkpoints.load_step_tokenizer(straight.step(8)).encode("ab") == [97, 98]
    assert checkpoints.architecture(straight.step(8)).dim == 16
