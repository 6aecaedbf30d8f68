"""torchrun's agent (torch.distributed.elastic) with the manners that `launch.py` describes.

`Agent` watches the ranks of a node, `Voices` takes what they write, `Meeting` brings the nodes
together.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from microtron.errors import UserError
from microtron.watchdog import LOST, REMEDY

GRACE_S = 5.0  # for ranks that lost a peer to leave by themselves
LEAVING_S = 1800.0  # for ranks that save before they leave
JOIN_S = 900.0  # for the nodes to come together
_TOLD = re.compile(rb"error( \(rank \d+\))?: ")
_LIBRARY = re.compile(  # torch's C++ log
    rb"\[(rank\d+\]:\s*\[?)?[EWIF]\d{4} |frame #\d+: |Exception raised from |<omitting python"
)
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}


class Voices(LogsSpecs):
    """What the ranks write: rank 0 is shown, errors are kept for the end, all else is filed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.told: dict[int, list[str]] = {}  # rank -> its lines `error: ...`
        self.tail: dict[int, deque[str]] = {}
        self._pipes: dict[int, tuple[int, int]] = {}  # rank -> read end, write end
        self._rest: dict[int, bytes] = {}

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """A pipe for each rank of a new attempt; torch opens its write end by name."""
        self.close()
        out, err = {}, {}
        for local, env in envs.items():
            rank = int(env["RANK"])
            env.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING", None)  # TorchTitan warns, and sets its own
            self._pipes[rank] = ends = os.pipe()
            os.set_blocking(ends[0], False)
            self.told[rank], self.tail[rank], self._rest[rank] = [], deque(maxlen=60), b""
            err[local] = f"/dev/fd/{ends[1]}"
            out[local] = "" if rank == 0 else err[local]
        nowhere = dict.fromkeys(envs, os.devnull)
        return LogsDest(stdouts=out, stderrs=err, error_files=nowhere)

    def pump(self) -> None:
        """Takes in what has been written since the last call."""
        for rank, (end, _) in self._pipes.items():
            try:
                while data := os.read(end, 1 << 16):
                    self._take(rank, data)
            except BlockingIOError:
                pass

    def close(self) -> None:
        """The ranks have ended."""
        self.pump()
        for rank, ends in self._pipes.items():
            if self._rest[rank]:
                self._take(rank, b"\n")
            for end in ends:
                os.close(end)
        self._pipes.clear()

    def _take(self, rank: int, data: bytes) -> None:
        *lines, rest = (self._rest[rank] + data).split(b"\n")
        for line in lines:
            self._line(rank, line + b"\n")
        # A progress bar has no end of line; what may become an error waits for its own.
        if rank == 0 and rest and not rest.startswith((b"e", b"[", b"f", b"E", b"<")):
            os.write(2, rest)
            rest = b""
        self._rest[rank] = rest

    def _line(self, rank: int, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self.tail[rank].append(text)
        if _TOLD.match(line):
            self.told[rank].append(text)
        elif rank == 0 and not _LIBRARY.match(line):
            os.write(2, line)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank{rank}.err").open("ab") as file:
                file.write(line)
        except OSError:
            pass  # the run tells of its folder itself


class Meeting(RendezvousHandler):
    """Where nodes meet: a store on node 0, and for each attempt a new one for the ranks."""

    use_agent_store = True  # the ranks find theirs there, and host none

    def __init__(self, nodes: int, node: int, address: str, port: int) -> None:
        self.nodes, self.node, self.address, self.port = nodes, node, address, port
        self.attempt = -1
        self.store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """The stores of the next attempt.

        Raises:
            UserError: the nodes did not come together.
        """
        self.attempt += 1
        self._tell()
        try:
            if self.store is None:
                self.store = TCPStore(
                    self.address, self.port, self.nodes, self.node == 0, timedelta(seconds=JOIN_S)
                )
            if self.node == 0:
                self.ranks_store = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
                self.store.set(f"port/{self.attempt}", str(self.ranks_store.port))
            end = time.monotonic() + JOIN_S
            while not self.store.check([f"port/{self.attempt}"]):
                if time.monotonic() > end:
                    raise RuntimeError(f"node 0 did not come back for attempt {self.attempt}")
                time.sleep(0.1)
            port = int(self.store.get(f"port/{self.attempt}"))
        except (DistError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(
                f"node {self.node} of {self.nodes} did not meet the others at MASTER_ADDR="
                f"{self.address} MASTER_PORT={self.port} ({why}): all nodes need the same two, "
                "node 0 must run there, and the port must be free"
            ) from None
        info = RendezvousStoreInfo(self.address, port)
        store = PrefixStore(f"attempt{self.attempt}", self.store)
        return RendezvousInfo(store, self.node, self.nodes, info)

    def _tell(self) -> None:
        """Nodes wait for each other in silence; the person at one of them should know for whom.

        Raises:
            UserError: there is no such host as node 0's.
        """
        if self.nodes == 1 or self.attempt > 0:
            return
        if self.node == 0:
            where = f"of {self.nodes} waits for the others on port {self.port}"
        else:
            where = f"of {self.nodes} joins {self.address}:{self.port}; rank 0 speaks on node 0"
            try:
                socket.getaddrinfo(self.address, self.port)
            except OSError as error:
                raise UserError(
                    f"MASTER_ADDR={self.address} is no host that this node knows "
                    f"({error.strerror}): give the name or address of node 0"
                ) from None
        print(f"node {self.node} {where} (up to {JOIN_S / 60:.0f} min)", flush=True)

    def get_backend(self) -> str:
        return "microtron"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "microtron"

    def shutdown(self) -> bool:
        return True


class Agent(LocalElasticAgent):
    """torchrun's agent for one node; `line` and `code` say how the job ended."""

    def __init__(self, spec: WorkerSpec, voices: Voices) -> None:
        super().__init__(spec, voices)
        self.voices, self.meeting = voices, spec.rdzv_handler
        self.line, self.code = "", 0
        self.asked = 0  # the signal that this launcher was sent
        self._codes: dict[int, int] = {}  # rank -> exit code, in the order of ending
        self._next_look = 0.0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        if self.asked:
            raise SignalException("asked to stop", signal.Signals(self.asked))
        self._codes.clear()
        pids = super()._start_workers(worker_group)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        return pids

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Hands a signal to the ranks, which save and leave (a second one: they leave)."""
        self.asked = number
        for rank, process in self._processes().items():
            if rank not in self._codes and process.poll() is None:
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def _processes(self) -> dict:
        handlers = self._pcontext.subprocess_handlers
        return {w.global_rank: handlers[w.local_rank].proc for w in self._worker_group.workers}

    def _look(self) -> bool:
        """Takes in output and exit codes; whether every rank has ended."""
        self.voices.pump()
        processes = self._processes()
        for rank, process in processes.items():
            if rank not in self._codes and process.poll() is not None:
                self._codes[rank] = process.returncode
        return len(self._codes) == len(processes)

    def _wait(self, elsewhere: dict | None) -> None:
        """Gives the ranks time to leave; then kills those that live, and every rank's children."""
        began = time.monotonic()
        while not self._look() and time.monotonic() - began < self._patience(elsewhere):
            time.sleep(0.02)
        ended = set(self._codes)
        for process in self._processes().values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes().values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # held by a driver or a disk
                process.wait(30)
        self.voices.pump()
        self._codes = {r: c for r, c in self._codes.items() if r in ended}

    def _patience(self, elsewhere: dict | None) -> float:
        if {*self._codes.values(), (elsewhere or {}).get("code")} & _STOPPED:
            return LEAVING_S
        known = any(c != LOST or self.voices.told[r] for r, c in self._codes.items() if c)
        return 0.5 if known else GRACE_S

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._look()
        failed = any(self._codes.values())
        elsewhere = None if failed else self._elsewhere()
        if failed or elsewhere:
            self._wait(elsewhere)
            self._judge(elsewhere)
        return super()._monitor_workers(worker_group)

    def _judge(self, elsewhere: dict | None) -> None:
        """Why the attempt failed, agreed on by all nodes, and whether another one follows."""
        found = elsewhere or self._agree(self._cause())
        line, limit = found["line"], self._worker_group.spec.max_restarts
        if line and found["node"] != self.meeting.node:
            line = f"node {found['node']} ended the job: {line.removeprefix('error: ')}"
        if self._remaining_restarts > 0 and not (found["final"] or self.asked):
            number = limit - self._remaining_restarts + 1
            line = line.removeprefix("error: ")
            print(f"{line}; restart {number} of {limit}", file=sys.stderr, flush=True)
            return
        self._remaining_restarts = 0
        self.code = found["code"]
        line += found.get("remedy", "")
        self.line = f"error: {line}" if line and not _TOLD.match(line.encode()) else line

    def _elsewhere(self) -> dict | None:
        """What another node says about its failure in this attempt, if there was one."""
        now = time.monotonic()
        if self.meeting.nodes == 1 or now < self._next_look:
            return None
        self._next_look = now + 0.5
        key = f"failed/{self.meeting.attempt}"
        try:
            there = self.meeting.store.check([key])
            return json.loads(self.meeting.store.get(key)) if there else None
        except (DistError, RuntimeError):
            return self._node_0_is_gone()

    def _agree(self, cause: dict) -> dict:
        """The first cause that any node has found."""
        if self.meeting.nodes == 1:
            return cause
        end = time.monotonic() + (0 if cause["sure"] else GRACE_S)
        while time.monotonic() < end:  # ours may be the echo of another node's
            self._next_look = 0.0
            if found := self._elsewhere():
                return found
            time.sleep(0.1)
        try:
            key = f"failed/{self.meeting.attempt}"
            return json.loads(self.meeting.store.compare_set(key, "", json.dumps(cause)))
        except (DistError, RuntimeError):
            return self._node_0_is_gone()

    def _node_0_is_gone(self) -> dict:
        line = f"node 0 ({self.meeting.address}:{self.meeting.port}) is gone"
        node = self.meeting.node
        return {"node": node, "line": line, "code": 1, "final": True, "sure": True}

    def _cause(self) -> dict:
        """What ended this node's ranks: line, exit code, whether a restart is of no use."""
        codes, told = self._codes, self.voices.told
        cause = {"node": self.meeting.node, "line": "", "code": 1, "final": False, "sure": True}
        stopped = [c for c in codes.values() if c in _STOPPED]
        early = {-signal.SIGTERM, -signal.SIGINT, LOST} if self.asked else set()
        if set(codes.values()) <= _STOPPED | early | {0}:
            return cause | {"code": stopped[0] if stopped else 128 + self.asked, "final": True}
        killed = [r for r, c in codes.items() if c < 0 and c != -signal.SIGABRT]
        if killed:
            name = signal.Signals(-codes[killed[0]]).name
            line = f"rank {killed[0]} was killed ({name}){self._log(killed[0])}"
            return cause | {"line": line, "remedy": f"; {REMEDY}"}
        refused = sorted(r for r, c in codes.items() if c == 1 and told[r])
        spoken = refused or sorted(r for r in codes if told[r])
        if spoken:
            line = told[spoken[0]][-1]
            return cause | {"line": line, "final": bool(refused), "sure": bool(refused)}
        rank = next(r for r, c in codes.items() if c)
        tail = list(self.voices.tail[rank])
        if rank and any(text.startswith("Traceback") for text in tail):
            print("\n".join(tail), file=sys.stderr)  # rank 0 has shown its own
        how = f"exit code {codes[rank]}" if codes[rank] > 0 else signal.Signals(-codes[rank]).name
        said = f": {tail[-1]}" if tail else ""
        line = f"rank {rank} ended with {how}{said}{self._log(rank)}"
        return cause | {"line": line, "sure": codes[rank] != LOST}

    def _log(self, rank: int) -> str:
        return f"; its log is {self.voices.folder}/rank{rank}.log"

    def part(self) -> None:
        """Node 0 stays until the others know how it ended."""
        meeting = self.meeting
        if meeting.nodes == 1 or meeting.store is None:
            return
        with contextlib.suppress(DistError, RuntimeError):
            meeting.store.set(f"left/{meeting.node}", "1")
            end = time.monotonic() + (LEAVING_S if self.code in _STOPPED else GRACE_S)
            others = [f"left/{n}" for n in range(meeting.nodes)]
            while meeting.node == 0 and not meeting.store.check(others):
                if time.monotonic() > end:
                    return
                time.sleep(0.1)
