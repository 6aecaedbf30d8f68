"""run_train.sh and the launcher: what the environment says, who starts what, two nodes on one host.

How run_train.sh routes is tested with a python that only says how it was called; the runs are real.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import SMALL, assert_one_line, assert_same_contents, run

from microtron.checkpoints import choose_step
from microtron.launch import log_folder

ROOT = Path(__file__).parents[2]
REMEDY = "; the same command goes on from the newest whole checkpoint"
PLATFORM = ("RANK", "WORLD_SIZE", "NODE", "NNODES", "NGPU", "MASTER", "LOCAL", "SLURM", "MAX_REST")


def environment(**extra):
    """This one, without what a platform has said."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(PLATFORM)}
    return plain | extra


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that setup.sh finds complete, whose python is the text given."""
    folder = tmp_path_factory.mktemp("venv")
    (folder / "bin").mkdir()
    files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "setup.sh").read_bytes()
    stamp = subprocess.run(["cksum"], input=files, capture_output=True, check=True).stdout
    (folder / ".installed").write_bytes(stamp)

    def python(text):
        (folder / "bin" / "python").write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / "python").chmod(0o755)
        return {"MICROTRON_VENV": str(folder)}

    return python


SAY = 'echo "$RANK,$WORLD_SIZE,$LOCAL_RANK,$MASTER_ADDR,$MASTER_PORT" "$@"'
SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "gpu[07-09,12],big1", "SLURM_PROCID": "3"}
LAUNCH = "{} -m microtron.launch --nproc-per-node={} --nnodes={} --node-rank={} --master-addr={} "
LAUNCH += "--master-port={} --max-restarts={} -- --job.config_file=a.toml --x.y=1"
TRAIN = "{} -m microtron.train --job.config_file=a.toml --x.y=1"


@pytest.mark.parametrize(
    "given, called",
    [
        ({}, TRAIN.format(",,,,")),
        ({"NGPU": "2"}, LAUNCH.format(",,,,", 2, 1, "", "", "", 0)),
        ({"NGPU": "1", "MAX_RESTARTS": "2"}, LAUNCH.format(",,,,", 1, 1, "", "", "", 2)),
        (
            {"NGPU": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
            LAUNCH.format(",,,a,7", 8, 2, 1, "a", 7, 0),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h"},
            TRAIN.format("5,8,1,h,29500"),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "NGPU": "4", "MASTER_ADDR": "h"},
            TRAIN.format("5,8,1,h,29500"),
        ),
        (
            SLURM | {"SLURM_NTASKS": "8", "SLURM_NNODES": "4", "SLURM_LOCALID": "1"},
            TRAIN.format("3,8,1,gpu07,20041"),
        ),
        (
            SLURM | {"SLURM_NTASKS": "4", "SLURM_NNODES": "4", "SLURM_NODEID": "3", "NGPU": "8"},
            LAUNCH.format(",,,,", 8, 4, 3, "gpu07", 20041, 0),
        ),
        (
            {**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
            | {"NGPU": "2", "SLURM_JOB_NODELIST": "one,two", "MASTER_PORT": "9"},
            LAUNCH.format(",,,,9", 2, 2, 1, "one", 9, 0),
        ),
    ],
    ids=["one", "ranks", "restarts", "nodes", "rank", "rank of NGPU", "srun", "node", "list"],
)
def test_who_starts_what(installed, given, called):
    env = environment(**{"NGPU": "1", **given}, **installed(SAY))
    told = subprocess.run(
        [ROOT / "run_train.sh", "a.toml", "--x.y=1"], env=env, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == called + "\n"


def test_help_needs_no_launcher(installed):
    env = environment(NGPU="2", **installed(SAY))
    told = subprocess.run(
        [ROOT / "run_train.sh", "--help"], env=env, capture_output=True, text=True
    )
    assert "microtron.train" in told.stdout and told.stdout.endswith("--help\n")


@pytest.mark.parametrize(
    "given, told",
    [
        ({"NGPU": "two"}, ["NGPU='two'", "give a whole number, 1 or more"]),
        ({"NGPU": "0"}, ["NGPU='0'", "1 or more"]),
        ({"NNODES": "x"}, ["NNODES='x' is not a number of nodes"]),
        ({"NNODES": "2", "NODE_RANK": "2"}, ["NODE_RANK=2", "NNODES=2", "from 0 to 1"]),
        ({"NNODES": "2", "NODE_RANK": "0"}, ["NNODES=2 needs MASTER_ADDR", "host name of node 0"]),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, ["NNODES=2 needs NODE_RANK"]),
        ({"NODE_RANK": "1"}, ["NODE_RANK=1 is not below NNODES=1"]),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "nowhere.invalid"},
            ["MASTER_ADDR=nowhere.invalid is no host that this node knows", "address of node 0"],
        ),
        ({"NGPU": "2", "MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
        ({"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS='-1'"]),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            ["RANK=2 is not below WORLD_SIZE=2"],
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["WORLD_SIZE=2 needs MASTER_ADDR"]),
        ({"RANK": "a", "WORLD_SIZE": "2"}, ["RANK='a' is not a number"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values_end_in_one_line(installed, given, told):
    env = environment(NGPU="1", **installed(f'exec {sys.executable} "$@"')) | given
    done = subprocess.run([ROOT / "run_train.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert_one_line(done.stderr, *told)


def test_where_the_logs_go(tmp_path):
    (tmp_path / "a.toml").write_text('[job]\ndump_folder = "there"\n')
    config = f"--job.config_file={tmp_path}/a.toml"
    assert log_folder([config]) == Path("there/log")
    assert log_folder([config, "--job.dump_folder=here"]) == Path("here/log")
    assert log_folder([config, "--job.dump-folder", "here"]) == Path("here/log")
    assert log_folder(["--job.config_file=none.toml"]) == Path("outputs/run/log")


ARGS = [
    *SMALL,
    "--training.steps=60",
    "--metrics.log_freq=20",
    "--checkpoint.interval=10",
    "--checkpoint.keep_latest_k=0",
]


@pytest.fixture(scope="module")
def args(tiny_corpus):
    return [*ARGS, f"--data.dirs={tiny_corpus}"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, args):
    """Two ranks that nothing happened to."""
    return run(args, tmp_path_factory.mktemp("straight"), world_size=2)


class Launched:
    """run_train.sh under way, its console in files."""

    def __init__(self, installed, args, folder, name="node0", **given):
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        self.dump = folder / "dump"
        env = environment(**installed(f'exec {sys.executable} "$@"'), **given)
        with self.out.open("w") as out, self.err.open("w") as err:
            (folder / "plain.toml").touch()  # the defaults, in place of debug.toml
            command = [ROOT / "run_train.sh", folder / "plain.toml", *args]
            command += [f"--job.dump_folder={self.dump}"]
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)

    def rank(self, number):
        """The process of a rank that this launcher has started."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"rank {number} is not there")

    def wait_for_step(self, step):
        end = time.monotonic() + 90
        while not (self.dump / "checkpoint" / f"step-{step}" / ".metadata").exists():
            assert time.monotonic() < end and self.process.poll() is None, self.told
            time.sleep(0.005)

    @property
    def told(self):
        return self.out.read_text() + self.err.read_text()

    def wait(self):
        try:
            return self.process.wait(90)
        finally:
            self.process.kill()


@pytest.mark.slow  # test_faults and test_resume do the same without the launcher
def test_killed_then_stopped_then_finished(installed, tmp_path, args, straight):
    """One line and a whole checkpoint after SIGKILL; SIGTERM saves; the end is the same bits."""
    killed = Launched(installed, args, tmp_path, NGPU="2")
    killed.wait_for_step(10)
    killed.rank(1).kill()
    began = time.monotonic()
    assert killed.wait() == 1 and time.monotonic() - began < 10
    log = killed.dump / "log" / "rank1.log"
    assert (
        killed.err.read_text() == f"error: rank 1 was killed (SIGKILL); its log is {log}{REMEDY}\n"
    )
    assert log.exists()
    first = choose_step(killed.dump / "checkpoint")
    assert first % 10 == 0 and 10 <= first < 60

    stopped = Launched(installed, args, tmp_path, NGPU="2")
    stopped.wait_for_step(first + 10)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 128 + signal.SIGTERM and not stopped.err.read_text()
    step = choose_step(killed.dump / "checkpoint")
    assert f"stopped by SIGTERM: step {step}," in stopped.out.read_text() and step < 60

    finished = run(args, tmp_path, world_size=2)
    assert f"step-{step} (" in finished.out
    assert_same_contents(finished.step(60), straight.step(60))


def test_two_nodes_and_a_restart(installed, tmp_path, args, straight):
    """Two launchers on one machine; a rank of the second is killed; both begin again together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"NGPU": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given["MAX_RESTARTS"] = "1"
    nodes = [
        Launched(installed, args, tmp_path, f"node{n}", NODE_RANK=str(n), **given) for n in (0, 1)
    ]
    nodes[0].wait_for_step(10)
    nodes[1].rank(1).kill()
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].told
    log = nodes[0].dump / "log" / "rank1.log"
    line = f"rank 1 was killed (SIGKILL); its log is {log}; restart 1 of 1\n"
    assert nodes[1].err.read_text() == line
    there = f"node 1 of 2 joins 127.0.0.1:{port}; rank 0 speaks on node 0 (up to 15 min)\n"
    assert nodes[1].out.read_text() == there
    assert nodes[0].err.read_text() == f"node 1 ended the job: {line}"
    assert "resumed from" in nodes[0].out.read_text()
    assert_same_contents(nodes[0].dump / "checkpoint" / "step-60", straight.step(60))
