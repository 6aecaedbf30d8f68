"""A rank that is killed, hangs or sees a NaN ends the job in one line that names it.

Afterwards the newest checkpoint is whole, and the same command ends with the same bits as a run
that nothing happened to. The ranks here are processes of their own without a launcher, as some
platforms start them; what the launcher adds is in test_launch.py.
"""

import os
import signal
import time

import pytest
from runs import SMALL, Run, assert_one_line, assert_same_contents, run

from microtron.agent import _LIBRARY
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


def on_rank_at_step_5(rank, fault, method="train_step"):
    """Runs ``fault`` on that rank before ``method`` of its fifth step."""
    from microtron.train import Trainer

    plain = getattr(Trainer, method)

    def faulty(self, *args, **named):
        if os.environ["RANK"] == str(rank) and self.step == 5:
            fault(self)
        return plain(self, *args, **named)

    setattr(Trainer, method, faulty)


def sleep_in_step_5():
    """As far in the step as the other rank, which waits for this one in the forward pass."""
    on_rank_at_step_5(1, lambda trainer: time.sleep(600), "forward_backward_step")


def all_sleep_in_step_5():
    """No collective is under way that could time out."""
    for rank in (0, 1):
        on_rank_at_step_5(rank, lambda trainer: time.sleep(600))


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
    on_rank_at_step_5(1, lambda trainer: os.kill(os.getpid(), signal.SIGSTOP))


def die_in_step_5():
    on_rank_at_step_5(1, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))


def rank_0_dies_in_step_5():
    on_rank_at_step_5(0, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))


def rank_0_freezes_in_step_5():
    """And the store with it, which it keeps."""
    on_rank_at_step_5(0, lambda trainer: os.kill(os.getpid(), signal.SIGSTOP))


def nan_in_step_5():
    """What the last layer of rank 1 makes is NaN from step 5 on."""

    def spoil(trainer):
        layer = trainer.model_parts[0].layers["1"]
        layer.register_forward_hook(
            lambda module, given, made: (
                tuple(x * float("nan") if x.is_floating_point() else x for x in made)
                if isinstance(made, tuple)
                else made * float("nan")
            )
        )

    on_rank_at_step_5(1, spoil)


def fail_in_step_5():
    """Rank 1 cannot use its disk any more: a line of its own, that rank 0 must not drown."""

    def fail(trainer):
        from microtron.errors import UserError

        raise UserError("disk 7 is full: empty it")

    on_rank_at_step_5(1, fail)


def slow_in_step_5():
    """Healthy work that takes longer than the time-out, and a rank that waits for nobody."""

    def work(trainer):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            sum(range(1000))

    from microtron.train import Trainer

    plain = Trainer.train_step

    def step(self, batches):
        if self.step == 5:
            work(self)
        return plain(self, batches)

    Trainer.train_step = step


def codes_of(broken, frozen=()):
    """Exit codes, after the end; those that do not end are killed, ``frozen`` ones at once."""
    for number, process in enumerate(broken.ranks):
        if number not in frozen:
            process.join(15)
    for process in broken.ranks:
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in broken.ranks]


def lines_of(broken):
    """What all ranks told, a line each."""
    files = (broken.folder / f"rank{n}.err" for n in range(len(broken.ranks)))
    lines = [line for file in files for line in file.read_bytes().splitlines()]
    return [line.decode() for line in lines if line and not _LIBRARY.match(line)]


def assert_resumes_exactly(broken, data, straight):
    resumed = run([*ARGS, *data], broken.folder, world_size=2)
    assert "resumed from" in resumed.out and resumed.losses() == straight.losses()
    assert_same_contents(resumed.step(8), straight.step(8))


@pytest.mark.parametrize(
    "fault, told, codes, limit_s",
    [
        (
            sleep_in_step_5,
            ["rank 1 hangs: nothing moved for", "(step 5, computing, at step.py:"],
            [LOST, LOST],
            9,
        ),
        (all_sleep_in_step_5, ["ranks 0, 1 hang: nothing moved for"], [LOST, LOST], 9),
        (
            sleep_while_loading,
            ["rank 1 hangs", "(step 5, loading data, at watchdog.py"],
            [LOST, LOST],
            9,
        ),
        (freeze_in_step_5, ["rank 1 does not answer"], [LOST, -signal.SIGKILL], 9),
        (die_in_step_5, ["rank 1 is gone (last seen: "], [LOST, -signal.SIGKILL], 6),
        (
            rank_0_dies_in_step_5,
            ["(rank 1): rank 0", "is gone", "the same command"],
            [-signal.SIGKILL, LOST],
            6,
        ),
        (
            rank_0_freezes_in_step_5,
            ["(rank 1): rank 0, which keeps the job's store, is gone or does not answer"],
            [-signal.SIGKILL, LOST],
            12,
        ),
        (fail_in_step_5, ["(rank 1): disk 7 is full: empty it"], [LOST, 1], 6),
    ],
    ids=[
        "hangs",
        "all hang",
        "hangs loading",
        "frozen",
        "killed",
        "rank 0 killed",
        "rank 0 frozen",
        "fails alone",
    ],
)
def test_one_line_names_the_rank(tmp_path, data, straight, fault, told, codes, limit_s):
    broken = Run([*ARGS, *data], tmp_path, world_size=2, prepare=fault)
    broken.wait_for("step-4")
    began = time.monotonic()
    frozen = {freeze_in_step_5: [1], rank_0_freezes_in_step_5: [0]}.get(fault, [])
    assert codes_of(broken, frozen) == codes, broken.told
    assert time.monotonic() - began < limit_s
    lines = lines_of(broken)
    assert len(lines) == 1 and lines[0].startswith("error"), lines
    for part in told:
        assert part in lines[0], lines
    folder = broken.dump / "checkpoint"
    assert choose_step(folder) == 4 and problem_with(folder / "step-4") is None
    if fault in (sleep_in_step_5, die_in_step_5):
        assert_resumes_exactly(broken, data, straight)


def test_nan_of_one_rank(tmp_path, data, straight):
    broken = Run([*ARGS, *data], tmp_path, world_size=2, prepare=nan_in_step_5).wait()
    assert [rank.exitcode for rank in broken.ranks] == [1, 1], broken.told
    assert choose_step(broken.dump / "checkpoint") == 4
    assert_one_line(broken.err, "step 5 is not finite", "rank 1", "Nothing of it was saved")
    assert_resumes_exactly(broken, data, straight)


def test_slow_is_not_hung(tmp_path, data):
    run([*ARGS, "--training.steps=6", *data], tmp_path, world_size=2, prepare=slow_in_step_5)
