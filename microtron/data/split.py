"""Which documents are validation data: decided by their text alone, the same on every machine.

Duplicates stay on one side, and adding documents to a corpus moves none. Where the hash leaves one
side empty, the documents are few: then the one whose size is nearest to the wanted share goes to
that side. A single document (or copies of it) is cut.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from microtron.errors import UserError


def text_hash(text: str) -> int:
    """64 bits of the text; equal texts fall on the same side of the split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class SplitRule:
    """How documents are divided.

    ``hash``: those whose hash, as a fraction of 2**64, is below ``val_fraction``. ``only_val`` /
    ``only_train``: the one text of hash ``chosen`` against all others. ``cut``: every document is
    cut, the first 1 - val_fraction of its characters being train (nanoGPT's split, at 0.1).
    """

    kind: str
    val_fraction: float
    chosen: int = 0

    @property
    def pieces_per_document(self) -> int:
        """2 where the one document is cut in two."""
        return 2 if self.kind == "cut" else 1

    def is_val(self, text: str) -> bool:
        """The side of a whole document."""
        value = text_hash(text)
        if self.kind == "hash":
            return value < self.val_fraction * 2.0**64
        return (value == self.chosen) == (self.kind == "only_val")

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """[(text, is validation)]: the document, or its two pieces."""
        if self.kind != "cut":
            return [(text, self.is_val(text))]
        at = min(max(int(len(text) * (1 - self.val_fraction)), 1), len(text) - 1)
        return [(text[:at], False), (text[at:], True)]


def choose_split(texts: Iterable[str], val_fraction: float, source: str) -> SplitRule:
    """The rule for a corpus: reads until both sides have a document, which is soon for many.

    Raises: UserError for no text, and for a single document of one character.
    """
    rule, sizes, sides, text = SplitRule("hash", val_fraction), {}, set(), ""
    for text in texts:
        key = text_hash(text)
        sizes[key] = sizes.get(key, 0) + len(text.encode())
        sides.add(rule.is_val(text))
        if len(sides) == 2:
            return rule
    if not sizes:
        raise UserError(f"source {source} holds no text; name another --source or --field")
    if len(sizes) == 1:
        if len(text) < 2:
            raise UserError(
                f"source {source} holds one character; it takes two to split into training and "
                "validation"
            )
        return SplitRule("cut", val_fraction)
    kind, share = "only_val", val_fraction
    if sides == {True}:
        kind, share = "only_train", 1 - val_fraction
    wanted = share * sum(sizes.values())
    return SplitRule(kind, val_fraction, min(sizes, key=lambda k: (abs(sizes[k] - wanted), k)))
