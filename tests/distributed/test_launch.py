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

from microtron.launch import log_folder

ROOT = Path(__file__).parents[2]
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
