"""What `microtron prepare` says while it works (stderr) and when it is done (stdout)."""

import sys
import time
from pathlib import Path

from microtron.data.shards import DatasetInfo

LINE_S = 10.0  # between lines where there is no terminal to draw a bar on


class Progress:
    """A tqdm bar on a terminal, else a line now and then. ``total`` bytes of source, or None."""

    def __init__(self, total: int | None, done: int = 0) -> None:
        self.total, self.done, self._first = total, done, done
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="prepare")
        self._started = self._last = time.monotonic()

    def update(self, size: int) -> None:
        """``size`` more bytes of source are done."""
        self.done += size
        if self._bar is not None:
            self._bar.update(size)
        elif time.monotonic() - self._last >= LINE_S:
            self._last = time.monotonic()
            share = f" of {self.total / 1e6:,.1f}" if self.total else ""
            speed = (self.done - self._first) / 1e6 / (self._last - self._started)
            print(
                f"prepare: {self.done / 1e6:,.1f}{share} MB, {speed:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def report(out: Path, state: dict, info: DatasetInfo, seconds: float) -> None:
    """The summary; ``seconds`` is this run's time, which for a resumed one is not the whole."""
    for line in state["left_out"][:5]:
        print(f"prepare: left out {line}", file=sys.stderr)
    if state["left_out"]:
        print(
            f"prepare: left out {len(state['left_out'])} files that do not decode", file=sys.stderr
        )
    if state["empty"]:
        print(f"prepare: left out {state['empty']:,} empty documents", file=sys.stderr)
    print(f"prepared {out} with {info.tokenizer.name} (vocabulary {info.tokenizer.vocab_size:,})")
    for split, entries in info.splits.items():
        tokens, size = sum(e.tokens for e in entries), sum(e.bytes for e in entries)
        documents = sum(e.documents for e in entries)
        text_tokens = max(tokens - documents, 1)  # without the eot before each document
        print(
            f"  {split:5} {documents:>12,} documents {tokens:>15,} tokens {size:>15,} bytes "
            f"{size / text_tokens:.2f} bytes/token, {len(entries)} shards"
        )
    print(
        f"  {state['documents']:,} documents in {seconds:.1f} s, "
        f"{state['bytes'] / 1e6 / max(seconds, 1e-9):.1f} MB/s"
    )
