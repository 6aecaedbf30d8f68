"""Bits per byte of any text.

A text is one document: the document separator stands before it, and each of its tokens is a target
once. Windows of ``window`` tokens slide on by ``stride``; a token is scored in the first window
that holds it, so all but the first ``window`` have at least ``window - stride`` tokens of context.
The summed loss is divided by the bytes that the tokens stand for (`validate.py` does the same on
its tokens), so figures of different tokenizers compare.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from microtron.data.tokenizers import Tokenizer
from microtron.errors import UserError
from microtron.evals.choice import Pair
from microtron.evals.score import Scorer


@dataclass(frozen=True)
class BitsPerByte:
    """Of one text: ``loss`` is nats a token."""

    loss: float
    tokens: int
    bytes: int

    @property
    def bpb(self) -> float:
        """The loss of all tokens in bits, over their bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes


def windows(ids: list[int], prefix: int, window: int, stride: int) -> Iterator[Pair]:
    """(context, what is scored in it) until each id was scored once; neither is empty.

    The model is given context and all but the last of the scored: ``window`` tokens at most.
    """
    whole = [prefix, *ids]
    done = 0  # ids scored
    while done < len(ids):
        end = min(window if not done else done + stride, len(ids))
        yield whole[max(end - window, 0) : done + 1], ids[done:end]
        done = end


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        UserError: it is not there, not UTF-8, or empty.
    """
    try:
        text = path.read_bytes().decode()  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read the text {str(path)!r} ({told}): name a UTF-8 text file"
        ) from None
    if not text:
        raise UserError(f"the text {str(path)!r} is empty: name one with words in it")
    return text


def bits_per_byte(
    scorer: Scorer,
    tokenizer: Tokenizer,
    text: str,
    *,
    prefix: int,
    stride: int,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> BitsPerByte:
    """Of ``text``, in windows of ``scorer.max_length``; ``prefix`` is the id before the text."""
    ids = tokenizer.encode_array(text)
    byte_count = int(tokenizer.token_bytes()[ids].sum())
    found = scorer.score(list(windows(ids.tolist(), prefix, scorer.max_length, stride)), progress)
    return BitsPerByte(-math.fsum(s.logprob for s in found) / len(ids), len(ids), byte_count)
