"""Positions within packed documents: where attention and RoPE start again."""

import numpy as np


def document_positions(tokens: np.ndarray, eot_id: int, out: np.ndarray) -> None:
    """Writes the position of each of ``tokens`` [B, S] in its document to ``out``, int64 [B, S].

    A document starts at its eot token (position 0); the first token of a row has position 0 too.
    ``out`` is contiguous.
    """
    starts = tokens == eot_id
    starts[:, 0] = True
    first = np.flatnonzero(starts)
    flat = out.reshape(-1)
    flat[:] = 1  # one running sum of increments is twice as fast as repeating each start
    flat[first[0]] = 0
    flat[first[1:]] -= np.diff(first)
    np.cumsum(flat, out=flat)
