"""The one exception that a person is meant to read.

A ``UserError`` carries a single line: the value, why it is refused, and the remedy. Entry points
(`cli.py`, `train.py`) print that line and exit with code 1; anything else is a bug and keeps its
traceback. It is a ``ValueError`` so that library users can catch it without knowing this package.
"""


class UserError(ValueError):
    """A mistake in the input, told in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
