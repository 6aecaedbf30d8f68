"""Tokens to text as they come: whole characters only, and nothing of a stop string.

    stream = TextStream(tokenizer, stop=["\\nUser:"])
    for token in tokens:
        print(stream.push(token), end="")
    print(stream.flush())

A character may be cut across tokens, so bytes wait until it is whole; text that may turn out to be
the beginning of a stop string waits too. All that was pushed and returned is what
``tokenizer.decode`` makes of the tokens, up to the first stop string.
"""

import codecs
from collections.abc import Callable, Sequence

from microtron.data.tokenizers import EOT, Tokenizer
from microtron.infer.engine import Engine
from microtron.infer.sampling import Sampling


class TextStream:
    """One row's text. ``done``: a stop string has come; what is pushed after it counts for nothing.

    Args:
        stop: strings that end the text; the first to come does, and is not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.pieces, self.eot_id = tokenizer.pieces, tokenizer.eot_id
        self.stop = [text for text in stop if text]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.waiting, self.done = "", False

    def push(self, token: int) -> str:
        """The text that this token makes certain, often none."""
        if token == self.eot_id:
            piece = EOT.encode()
        else:
            piece = self.pieces[token] if token < len(self.pieces) else b"\xef\xbf\xbd"
        return self._take(self.decoder.decode(piece))

    def flush(self) -> str:
        """The rest, at the end."""
        text = self._take(self.decoder.decode(b"", final=True)) + self.waiting
        self.waiting = ""
        return text

    def _take(self, text: str) -> str:
        if self.done:
            return ""
        text = self.waiting + text
        ends = [text.find(s) for s in self.stop if s in text]
        if ends:
            self.done, self.waiting = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, s) for s in self.stop), default=0)
        self.waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def generate_text(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: list[list[int]],
    params: Sampling | list[Sampling],
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[str], int]:
    """The continuation of each row as text, and how many tokens were made; see `Engine.generate`.

    Args:
        stop: strings that end a row.
        on_text: called with (row, piece of text) as it comes.
    """
    streams = [TextStream(tokenizer, stop) for _ in rows]
    texts = [""] * len(rows)

    def tell(row: int, text: str) -> None:
        texts[row] += text
        if text and on_text is not None:
            on_text(row, text)

    def on_token(row: int, token: int) -> bool:
        tell(row, streams[row].push(token))
        return streams[row].done

    made = engine.generate(rows, params, on_token)
    for row, stream in enumerate(streams):
        tell(row, stream.flush())
    return texts, sum(map(len, made))
