"""The one exception that a person is meant to read.

A ``UserError`` carries a single line: the value, why it is refused, and the remedy. Entry points
(`cli.py`, `train.py`) print that line and exit with code 1; anything else is a bug and keeps its
traceback. It is a ``ValueError`` so that library users can catch it without knowing this package.
"""

import re


class UserError(ValueError):
    """A mistake in the input, told in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def unboxed(told: str) -> str:
    """tyro's complaint about a command line, without its frame and its pages of help."""
    told = re.sub(r"╭[^╮]*╮", " ", told)  # the title says what the text says again
    told = re.sub(r"[─-╿]+|-{5,}", " ", told)
    told = re.split("Argument helptext|For full helptext", told)[0]
    return " ".join(told.split())
