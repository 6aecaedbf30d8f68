"""Starts the ranks of this node, keeps them together, and tells in one line how a job failed.

    python -m microtron.launch --nproc-per-node 2 -- --job.config_file=train_configs/debug.toml

run_train.sh calls it. It is torchrun's agent (torch.distributed.elastic) with other manners: the
first rank that failed is named in one line and no table follows; ranks that only lost a peer are
not heard; a signal is handed to the ranks once, and they may take their time to save; restarts
(--max-restarts) begin anew in a store of their own. Nodes meet at --master-addr, --master-port,
where node 0 keeps a store: a failure on one is known to all at once.

Rank 0 writes to the console. What the others write goes to log/rankN.err in the run's folder.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

from microtron.errors import UserError


def log_folder(argv: list[str]) -> Path:
    """Where the run that ``argv`` describes keeps its logs."""
    given = {}
    for name, following in zip(argv, [*argv[1:], ""], strict=True):
        key, equals, value = name.partition("=")
        given[key.replace("-", "_")] = value if equals else following
    dump = given.get("__job.dump_folder")
    if dump is None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            table = tomllib.loads(Path(given["__job.config_file"]).read_text())
            dump = str(table["job"]["dump_folder"])
    return Path(dump or "outputs/run") / "log"


def _number(name: str, value: str, least: int, what: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise UserError(f"{name}={value!r} is not {what}: give a whole number, {least} or more")
    return int(value)


def check(given: argparse.Namespace) -> tuple[int, int, tuple[int, int, str, int]]:
    """Ranks on this node, restarts, and the meeting: nodes, this one, address and port.

    Raises:
        UserError: a value cannot work.
    """
    ranks = _number("NGPU", given.nproc_per_node, 1, "a number of processes")
    nodes = _number("NNODES", given.nnodes, 1, "a number of nodes")
    node = _number("NODE_RANK", given.node_rank or "0", 0, "the number of this node")
    restarts = _number("MAX_RESTARTS", given.max_restarts, 0, "a number of restarts")
    port = _number("MASTER_PORT", given.master_port or "29500", 1, "a port")
    if node >= nodes:
        raise UserError(
            f"NODE_RANK={node} is not below NNODES={nodes}: number the nodes from 0 to {nodes - 1}"
        )
    if port > 65535:
        raise UserError(f"MASTER_PORT={port} is no port: give one from 1024 to 65535")
    if nodes == 1:
        return ranks, restarts, (1, 0, "127.0.0.1", 0)
    for name, value in (("NODE_RANK", given.node_rank), ("MASTER_ADDR", given.master_addr)):
        if not value:
            raise UserError(
                f"NNODES={nodes} needs {name}: give every node its number in NODE_RANK, and all "
                "of them the host name of node 0 in MASTER_ADDR"
            )
    return ranks, restarts, (nodes, node, given.master_addr, port)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m microtron.launch --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m microtron.launch", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--nproc-per-node", default="1", help="ranks on this node (NGPU)")
    parser.add_argument("--nnodes", default="1", help="nodes (NNODES)")
    parser.add_argument("--node-rank", default="", help="number of this one (NODE_RANK)")
    parser.add_argument("--master-addr", default="", help="host name of node 0 (MASTER_ADDR)")
    parser.add_argument("--master-port", default="", help="a free port there (MASTER_PORT)")
    parser.add_argument("--max-restarts", default="0", help="restarts after a fault (MAX_RESTARTS)")
    parser.add_argument("arguments", nargs="*", help="of microtron.train, behind --")
    return parser


def launch(argv: list[str]) -> int:
    """Runs the job on this node; returns the exit code.

    Raises:
        UserError: the arguments cannot work, or the nodes did not meet.
    """
    given = _parser().parse_args(argv)
    ranks, restarts, meeting = check(given)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there are ranks to hand it to
    logging.disable(logging.CRITICAL)  # torchrun's own story
    command = ("-m", "microtron.train", *given.arguments)
    return together(command, ranks, restarts, meeting, log_folder(given.arguments))


def together(
    command: tuple[str, ...],
    ranks: int,
    restarts: int,
    meeting: tuple[int, int, str, int],
    folder: Path,
) -> int:
    """Runs ``python *command`` as so many ranks; returns the exit code of the job.

    Raises:
        UserError: the nodes did not meet.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException

    from microtron.agent import Agent, Meeting, Voices

    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        rdzv_handler=Meeting(*meeting),
        entrypoint=sys.executable,
        args=command,
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    agent = Agent(spec, Voices(folder))
    try:
        agent.run()
    except SignalException as stop:
        agent.code = 128 + stop.sigval
    finally:
        agent.voices.close()
    if agent.line:
        print(agent.line, file=sys.stderr, flush=True)
    agent.part()
    return agent.code


def main() -> int:
    """The entry: prints what a person got wrong in one line."""
    try:
        return launch(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
