"""A rank that is killed, hangs or sees a NaN ends the job in one line that names it.

Afterwards the newest checkpoint is whole, and the same command ends with the same bits as a run that
nothing happened to. The ranks here are processes of their own without a launcher, as a platform
starts them; what the launcher adds is in test_launch.py.
"""

import os
import signal
import sys
import time

import pytest
from runs import SMALL, Run, assert_one_line, assert_same_contents, run

from microtron.checkpoints import choose_step, problem_with
from microtron.watchdog import LOST

ARGS = [
    *SMALL,
    "--training.steps=8",
    "--checkpoint.interval=2",
    "--checkpoint.keep_latest_k=0",
    "--comm.train_timeout_seconds=4",
]


@pytest.fixture(scope="module")
def data(tiny_corpus):
    return [f"--data.dirs={tiny_corpus}"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    return run([*ARGS, *data], tmp_path_factory.mktemp("straight"), world_size=2)


def on_rank_1_at_step_5(fault):
    """Runs ``fault`` on rank 1, in place of the fifth step."""
    from microtron.train import Trainer

    plain = Trainer.train_step

    def step(self, batches):
        if os.environ["RANK"] == "1" and self.step == 5:
            fault(self)
        return plain(self, batches)

    Trainer.train_step = step


def sleep_in_step_5():
    on_rank_1_at_step_5(lambda trainer: time.sleep(600))


def sleep_while_loading():
    """The fifth batch of rank 1 never comes."""
    from microtron.train import Trainer

    plain = Trainer.batch_generator

    def batches(self, loader):
        for number, batch in enumerate(plain(self, loader), start=1):
            if os.environ["RANK"] == "1" and number == 5:
                time.sleep(600)
            yield batch

    Trainer.batch_generator = batches


def freeze_in_step_5():
    on_rank_1_at_step_5(lambda trainer: os.kill(os.getpid(), signal.SIGSTOP))


def die_in_step_5():
    on_rank_1_at_step_5(lambda trainer: os.kill(os.getpid(), signal.SIGKILL))


def rank_0_dies_in_step_5():
    from microtron.train import Trainer

    plain = Trainer.train_step

    def step(self, batches):
        if os.environ["RANK"] == "0" and self.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, batches)

    Trainer.train_step = step


def nan_in_step_5():
    """A weight of rank 1 is NaN from step 5 on."""

    def spoil(trainer):
        parameter = next(trainer.model_parts[0].parameters())
        getattr(parameter, "to_local", lambda: parameter)().data.fill_(float("nan"))

    on_rank_1_at_step_5(spoil)


def fail_in_step_5():
    """Rank 1 cannot use its disk any more: a line of its own, that rank 0 must not drown."""

    def fail(trainer):
        from microtron.errors import UserError

        raise UserError("disk 7 is full: empty it")

    on_rank_1_at_step_5(fail)


def slow_in_step_5():
    """Healthy work that takes longer than the time-out, and a rank that waits for nobody."""

    def work(trainer):
        end = time.monotonic() + 6
        while time.monotonic() < end:
            sum(range(1000))

    from microtron.train import Trainer

    plain = Trainer.train_step

    def step(self, batches):
        if self.step == 5:
            work(self)
        return plain(self, batches)

    Trainer.train_step = step


def codes_of(broken, alive=()):
    """Exit codes, after the end; ``alive`` ranks were frozen and are killed."""
    for number, process in enumerate(broken.ranks):
        if number in alive:
            continue
        process.join(40)
        assert process.exitcode is not None, broken.told
    for number in alive:
        os.kill(broken.ranks[number].pid, signal.SIGKILL)
        broken.ranks[number].join(10)
    return [process.exitcode for process in broken.ranks]


def lines_of(broken):
    """What all ranks told, a line each."""
    files = (broken.folder / f"rank{n}.err" for n in range(len(broken.ranks)))
    return [line for file in files for line in file.read_text().splitlines()]


def assert_resumes_exactly(broken, data, straight):
    folder = broken.dump / "checkpoint"
    assert choose_step(folder) == 4 and problem_with(folder / "step-4") is None
    resumed = run([*ARGS, *data], broken.folder, world_size=2)
    assert "resumed from" in resumed.out and resumed.losses() == straight.losses()
    assert_same_contents(resumed.step(8), straight.step(8))


@pytest.mark.parametrize(
    "fault, told, codes, limit_s",
    [
        (
            sleep_in_step_5,
            [
                "rank 1 hangs: nothing moved for",
                "(step 5, ",
                "train.py",
                "in train; the same command",
            ],
            [LOST, LOST],
            9,
        ),
        (
            sleep_while_loading,
            ["rank 1 hangs", "(step 5, loading data, at watchdog.py"],
            [LOST, LOST],
            9,
        ),
        (
            freeze_in_step_5,
            ["rank 1 does not answer: nothing moved for"],
            [LOST, -signal.SIGKILL],
            9,
        ),
        (die_in_step_5, ["rank 1 is gone (last seen: "], [LOST, -signal.SIGKILL], 6),
        (rank_0_dies_in_step_5, ["rank 0 is gone", "the same command"], [-signal.SIGKILL, LOST], 6),
        (fail_in_step_5, ["(rank 1): disk 7 is full: empty it"], [LOST, 1], 6),
    ],
    ids=["hangs", "hangs loading", "frozen", "killed", "rank 0 killed", "fails alone"],
)
def test_one_line_names_the_rank(tmp_path, data, straight, fault, told, codes, limit_s):
    broken = Run([*ARGS, *data], tmp_path, world_size=2, prepare=fault)
    broken.wait_for("checkpoint-4" if False else "step-4")
    began = time.monotonic()
    frozen = [1] if fault is freeze_in_step_5 else []
    assert codes_of(broken, frozen) == codes, broken.told
    assert time.monotonic() - began < limit_s
    lines = lines_of(broken)
    assert len(lines) == 1 and lines[0].startswith("error"), lines
    for part in told:
        assert part in lines[0], lines
    assert_resumes_exactly(broken, data, straight)


def test_nan_of_one_rank(tmp_path, data, straight):
    broken = Run([*ARGS, *data], tmp_path, world_size=2, prepare=nan_in_step_5).wait()
    assert [rank.exitcode for rank in broken.ranks] == [1, 1], broken.told
    assert_one_line(broken.err, "step 5 is not finite", "rank 1", "Nothing of it was saved")
    assert_resumes_exactly(broken, data, straight)


def test_slow_is_not_hung(tmp_path, data):
    run([*ARGS, "--training.steps=6", *data], tmp_path, world_size=2, prepare=slow_in_step_5)
