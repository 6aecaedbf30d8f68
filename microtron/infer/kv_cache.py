"""What attention remembers of the tokens so far: full layers everything, window layers their
window.

A full layer keeps position p in slot p and grows by doubling. A window layer is a ring: position p
lies in slot p mod W, so the newest W positions are there and nothing else. What lies in a slot
follows from the row's length alone, so rows of different lengths share a batch without any table.
One slot more, in front, is always zero: attention puts the sink's score on it (`attention.py`).
"""

import torch

from microtron.model.args import ModelArgs


class LayerCache:
    """Keys and values of one layer, one tensor [2, B, K, 1 + slots, D].

    Attributes:
        window: keys a query sees, or None; a ring that is not full yet has fewer slots.
        keys, values: [B K, 1 + slots, D] views for batched products.
    """

    def __init__(self, kv: torch.Tensor, window: int | None) -> None:
        self.window = window
        self.hold(kv)

    def hold(self, kv: torch.Tensor) -> None:
        """Takes another tensor in place of the one it has."""
        self.kv = kv
        self.keys, self.values = kv.flatten(1, 2).unbind(0)

    @property
    def slots(self) -> int:
        """Positions that fit."""
        return self.kv.shape[3] - 1

    def grow(self, tokens: int) -> None:
        """Makes room for ``tokens`` positions; a ring never needs more than its window."""
        needed = tokens if self.window is None else min(tokens, self.window)
        if needed > self.slots:
            most = 2 * self.slots if self.window is None else min(2 * self.slots, self.window)
            shape = (*self.kv.shape[:3], 1 + max(needed, most), self.kv.shape[4])
            wider = self.kv.new_zeros(shape)
            wider[:, :, :, : 1 + self.slots] = self.kv  # a ring that has room has not gone round
            self.hold(wider)


class Cache:
    """All layers of a batch of rows, and how many tokens each row has."""

    def __init__(self, layers: list[LayerCache], lengths: list[int]) -> None:
        self.layers, self.lengths = layers, lengths

    @classmethod
    def empty(
        cls, args: ModelArgs, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> "Cache":
        """For ``rows`` rows of up to ``capacity`` tokens; more grow it."""
        layers = []
        for layer in range(args.n_layers):
            window = args.window if args.mask_kind(layer) == "window" else None
            slots = max(1, capacity if window is None else min(capacity, window))
            shape = (2, rows, args.n_kv_heads, 1 + slots, args.head_dim)
            # Zeros, not empty: a masked slot has weight 0, and 0 times garbage may be NaN.
            layers.append(LayerCache(torch.zeros(shape, device=device, dtype=dtype), window))
        return cls(layers, [0] * rows)

    @property
    def capacity(self) -> int | None:
        """Tokens a row may have before full layers grow; None: there are only windows."""
        return min((c.slots for c in self.layers if c.window is None), default=None)

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(layer.kv.nbytes for layer in self.layers)

    def grow(self, tokens: int) -> None:
        """Makes room for rows of ``tokens`` tokens."""
        for layer in self.layers:
            layer.grow(tokens)

    def select(self, index: list[int] | torch.Tensor) -> "Cache":
        """A new cache whose row i is a copy of row ``index[i]``: one context for several
        continuations, rows dropped or reordered.
        """
        rows = torch.as_tensor(index, dtype=torch.long).tolist()
        where = torch.tensor(rows, dtype=torch.long, device=self.layers[0].kv.device)
        layers = [LayerCache(c.kv.index_select(1, where), c.window) for c in self.layers]
        return Cache(layers, [self.lengths[row] for row in rows])
