"""A thread that loads batches ahead, for loaders whose batch is a pure function of a position.

One producer, one consumer, a fixed number of batches in flight; an exception in the thread comes
out of ``next()``. Positions travel with their batches, so the consumer knows what it has taken.
"""

import atexit
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_END = object()


class Prefetcher:
    """Iterates ``(position, load(position))`` over ``positions``, ``depth`` (>= 1) batches ahead.

    ``setup`` runs in the thread first. The thread belongs to the process that made it: a fork must
    make its own. Nothing may be taken after ``close()``.
    """

    def __init__(
        self,
        load: Callable[[int], Any],
        positions: Iterable[int],
        depth: int,
        setup: Callable[[], None] | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._load, self._positions, self._setup = load, positions, setup
        self._slots = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="microtron-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before the interpreter freezes the thread half way

    def _run(self) -> None:
        try:
            if self._setup is not None:
                self._setup()
            for position in self._positions:
                self._slots.acquire()
                if self._closed:
                    return
                self._ready.put((position, self._load(position)))
            self._ready.put(_END)
        except BaseException as error:  # noqa: BLE001 (handed to the consumer)
            self._ready.put(error)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while True:
            item = self._ready.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            self._slots.release()
            yield item

    def close(self) -> None:
        """Ends the thread (after the load under way) and drops what it made; safe to repeat."""
        if self._closed:  # perhaps by atexit: now the modules used below may be gone
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            return
        self._slots.release()
        if threading.current_thread() is not self._thread:  # a garbage collection may run there
            self._thread.join()
        self._ready = queue.SimpleQueue()
