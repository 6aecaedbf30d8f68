"""Notices a rank that hangs or is gone, and ends the job with one line that names it.

A collective knows that somebody is missing, not who. So each rank has a daemon thread that notes,
beside the training, how far the main thread has come and whether it moves, in a key of a TCPStore;
the two lowest ranks read everybody's notes. The main thread only counts (`beat`): no collective, no
wait for a device. A rank hangs when its stack has stood still for the time-out of its phase and no
other rank is further behind; those that wait for it in a collective are further on, or seen to
wait. Slow work moves the stack, and so is left alone.

The first to know writes the verdict into the store and prints it; the others read it and leave in
silence. A collective that fails because a peer is gone is explained in the same way (`explain`).
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

log = logging.getLogger("watchdog")  # at this level to the log file alone
T = TypeVar("T")
LOST = 75  # exit code of a rank that left because of another one: the same command may succeed
_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|NCCL (error|comm)|"
    r"recvVector failed|sendBytes failed|remote process exited|failed to recv"
)
_CLOSED = re.compile(r"Connection (closed|reset|refused)|Broken pipe|remote process exited")
_WAITING = ("torch/distributed/", "torch/cuda/")  # a stack that ends here waits for others,
_WORKING = "torch/distributed/checkpoint/filesystem"  # but not one that ends here
REMEDY = "the same command goes on from the newest whole checkpoint"


class Watchdog:
    """Watches the ranks of one job; does nothing for a single one.

    Args:
        rank, world_size: of this process.
        address: host and port of the job's store.
        launched: a launcher keeps the store; else rank 0 does.
        on_cpu: the model runs here, so that a thread which computes is at work. (With a GPU it may
            as well spin while it waits.)
        init_s, train_s: time-outs before and after the first step, and of long phases.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        address: tuple[str, int] = ("127.0.0.1", 0),
        launched: bool = False,
        on_cpu: bool = True,
        init_s: float = 300.0,
        train_s: float = 100.0,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._long_s, self._train_s = 0.9 * max(init_s, train_s), 0.9 * train_s
        self._period_s = min(max(train_s / 20, 0.1), 2.0)
        self._beats, self._phase, self._limit_s = 0, "starting", self._long_s
        self._main = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._main) if on_cpu else None
        self._stack: tuple = ()
        self._computed_s = 0.0
        self._moved = self._born = time.monotonic()
        self._sequence = 0
        self._seen: dict[int, tuple[list, float]] = {}  # rank -> its note, when that last changed
        self._lock, self._done = threading.Lock(), threading.Event()
        self._leaving = threading.Lock()
        self._store = None
        if world_size > 1:
            self._address, self._serves = address, rank == 0 and not launched
            self._keeper = "the launcher" if launched else "rank 0"
            self._thread = threading.Thread(
                target=self._run, name="microtron-watchdog", daemon=True
            )
            self._thread.start()

    def beat(self, phase: str, long: bool = False) -> None:
        """The main thread begins ``phase``, one that may take long or not. Every rank beats alike.

        ``long`` phases (the first step, validation, a save) have the longer of the two time-outs.
        """
        self._beats += 1
        self._limit_s = self._long_s if long else self._train_s
        self._phase = phase

    def beating(self, batches: Iterable[T], step: Callable[[], tuple[str, bool]]) -> Iterator[T]:
        """The same batches, with a beat before and after each; ``step()`` says where we are."""
        iterator = iter(batches)
        while True:
            name, long = step()
            self.beat(f"{name}, loading data", long)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.beat(f"{name}, computing", long)
            yield batch

    def close(self) -> None:
        """The rank is done; the others need not miss it."""
        if self.world_size > 1 and not self._done.is_set():
            self._done.set()
            self._phase = "done"
            with contextlib.suppress(Exception):
                self._note()

    def explain(self, error: Exception) -> None:
        """Ends the process in one line if ``error`` is the work of another rank; else returns.

        The log file keeps the traceback.
        """
        if self.world_size == 1:
            return
        if not _blames_a_peer(error):
            self._done.set()
            with contextlib.suppress(Exception):  # this rank will tell; the others leave in silence
                self._decide(f"rank {self.rank} tells")
            return
        log.info("a collective failed", exc_info=error)
        told = self._who_is_missing(closed=bool(_CLOSED.search(_story(error))))
        if told is not None:
            self._leave(told)

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = 0.0
        while not self._done.wait(wait_s):
            try:
                if self._store is None:
                    self._connect()
                wait_s = self._period_s
                self._look_at_myself()
                self._note()
                told = self._verdict()
                if told is None and self.rank < 2:
                    self._read()
                    told = self._who_hangs() if self._is_observer() else None
            except Exception as error:  # noqa: BLE001 (whatever a broken connection raises)
                log.info("the watchdog lost the store: %s", error)
                told = self._lost_store()  # perhaps because all is done
                if self._done.wait(10.0):
                    return
            if told is not None and not self._done.is_set():
                self._leave(told)

    def _connect(self) -> None:
        host, port = self._address
        self._store = dist.TCPStore(
            host,
            port,
            is_master=self._serves,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=max(self._long_s, 10)),
        )

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """One thread speaks to the store; a frozen keeper does not answer, and blocks it."""
        if not self._lock.acquire(timeout=max(4 * self._period_s, 2.0)):
            raise TimeoutError("the store does not answer")
        try:
            yield
        finally:
            self._lock.release()

    def _look_at_myself(self) -> None:
        """Notices whether the main thread has done something since the last look."""
        frame, stack = sys._current_frames().get(self._main), [self._beats]
        while frame is not None:
            stack.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        computed_s = time.clock_gettime(self._clock) if self._clock is not None else 0.0
        if tuple(stack) != self._stack or computed_s > self._computed_s + 0.2 * self._period_s:
            self._stack, self._moved = tuple(stack), time.monotonic()
        self._computed_s = computed_s

    def _note(self) -> None:
        """Writes how this rank does: sequence, beats, seconds without motion, limit, ..."""
        self._sequence += 1
        still = time.monotonic() - self._moved
        waits, where = False, ""
        if still > 2 * self._period_s:
            waits, where = _place(sys._current_frames().get(self._main))
        note = [self._sequence, self._beats, still, self._limit_s, waits, self._phase, where]
        with self._hold():
            self._store.set(f"watchdog/{self.rank}", json.dumps(note))

    def _read(self) -> None:
        """Takes in everybody's notes."""
        now = time.monotonic()
        with self._hold():
            keys = {r: f"watchdog/{r}" for r in range(self.world_size)}
            there = [r for r in keys if r in self._seen or self._store.check([keys[r]])]
            values = self._store.multi_get([keys[r] for r in there]) if there else []
        for rank, value in zip(there, values, strict=True):
            note = json.loads(value)
            if rank not in self._seen or self._seen[rank][0][0] != note[0]:
                self._seen[rank] = note, now

    def _verdict(self) -> str | None:
        """What another rank has found; "" when that was not for us to print."""
        with self._hold():
            if self._store is not None and self._store.check(["watchdog/verdict"]):
                return ""
        return None

    def _decide(self, told: str) -> bool:
        """Whether ``told`` became the verdict: only the first does."""
        with self._hold():
            mine = f"{self.rank}: {told}"
            return self._store.compare_set("watchdog/verdict", "", mine).decode() == mine

    def _is_observer(self) -> bool:
        """Rank 0 watches; rank 1 where rank 0 has stopped writing."""
        if self.rank == 0:
            return True
        note = self._seen.get(0)
        silent = time.monotonic() - (note[1] if note else self._born)
        return silent > max(self._long_s if note is None else note[0][3], 6 * self._period_s)

    def _who_hangs(self, at_once: bool = False) -> str | None:
        """The line for ranks that have not moved for their time-out and keep the others waiting.

        ``at_once``: a collective has timed out already; who was furthest behind?
        """
        others = [r for r in range(self.world_size) if not (at_once and r == self.rank)]
        ranks = [self._state(r) for r in others]
        ranks = [
            s | {"limit_s": s["limit_s"] * (not at_once)} for s in ranks if s["phase"] != "done"
        ]
        behind = min((s["beats"] for s in ranks), default=0)
        last = [s for s in ranks if s["beats"] == behind]
        busy = [s for s in last if not s["waits"]]
        if not busy and any(s["still_s"] < s["limit_s"] for s in ranks):
            return None
        if not any(s["still_s"] >= s["limit_s"] for s in busy or last):
            return None
        late_s = 4 * self._period_s  # notes are not all of one moment
        guilty = [s for s in busy or last if s["still_s"] >= s["limit_s"] - late_s]
        first = guilty[0]
        many = len(guilty) > 1
        if first["mute"]:
            state = "do not answer" if many else "does not answer"
        else:
            state = "hang" if many else "hangs"
        where = f", at {first['where']}" if first["where"] else ""
        return (
            f"{_names([s['rank'] for s in guilty])} {state}: nothing moved for "
            f"{first['still_s']:.0f} s ({first['phase']}{where}); {REMEDY}, and steps that are "
            "healthy but slow need a higher comm.train_timeout_seconds"
        )

    def _state(self, rank: int) -> dict:
        """What is known of a rank now; a mute one has stopped to write notes."""
        never = [0, -1, 0.0, self._long_s, False, "before it came", ""]
        note, changed = self._seen.get(rank, (never, self._born))
        silent_s = time.monotonic() - changed
        mute = silent_s > 4 * self._period_s or note is never
        number, beats, still_s, limit_s, waits, phase, where = note
        return {
            "rank": rank,
            "number": number,
            "beats": beats,
            "still_s": still_s + silent_s * mute,
            "limit_s": limit_s,
            "waits": waits and not mute,
            "phase": phase,
            "where": "" if mute else where,
            "mute": mute,
        }

    def _who_is_missing(self, closed: bool) -> str | None:
        """The line for ranks that no longer write or hang, asked when a collective has failed.

        "": another rank tells. None: nobody can be blamed. ``closed``: not by a time-out.
        """
        before: dict[int, int] = {}
        end = time.monotonic() + max(4 * self._period_s, 1.5)
        try:
            while time.monotonic() < end:
                if (told := self._verdict()) is not None:
                    return told
                self._read()
                if (told := self._who_hangs()) is not None:
                    return told
                before = before or {r: note[0] for r, (note, _) in self._seen.items()}
                time.sleep(self._period_s / 2)
        except Exception:  # noqa: BLE001 (whatever a broken connection raises)
            return self._lost_store()
        states = [self._state(r) for r in range(self.world_size) if r != self.rank]
        gone = [
            s for s in states if s["phase"] != "done" and before.get(s["rank"], 0) == s["number"]
        ]
        if not gone:
            return self._who_hangs(at_once=True)
        verb = ("is gone", "are gone") if closed else ("does not answer", "do not answer")
        names, phase = _names([s["rank"] for s in gone]), gone[0]["phase"]
        return f"{names} {verb[len(gone) > 1]} (last seen: {phase}); {REMEDY}"

    def _lost_store(self) -> str:
        self._store = None
        return f"{self._keeper}, which keeps the job's store, is gone or does not answer; {REMEDY}"

    def _leave(self, told: str) -> None:
        """Ends this process; the first rank to come here prints."""
        self._leaving.acquire()  # for good: the thread and the main thread may both come here
        ours = bool(told)
        with contextlib.suppress(Exception):
            ours = ours and self._decide(told)
        with contextlib.suppress(Exception):  # a launcher that is gone reads no more
            if ours:
                log.info(told)
                by = f" (rank {self.rank})" if self.rank else ""
                os.write(2, f"error{by}: {told}\n".encode())
                time.sleep(2 * self._period_s + 1 if self._serves else 0)  # others read the verdict
            sys.stdout.flush()
        os._exit(LOST)


def _names(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{' and more' if len(ranks) > 8 else ''}"


def _place(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack waits for other ranks, and the line of microtron that it came from."""
    waits = working = False
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        working = working or _WORKING in file
        waits = waits or (not working and any(part in file for part in _WAITING))
        if "/microtron/" in file:
            name = file.rsplit("/microtron/", 1)[1]
            return waits, f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return waits, ""


def _blames_a_peer(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a broken or silent connection."""
    while error is not None:
        if isinstance(error, RuntimeError) and _PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _story(error: BaseException | None) -> str:
    told = ""
    while error is not None:
        told += f"{error}\n"
        error = error.__cause__ or error.__context__
    return told
