"""Batches for training and validation; the whole state is one global position.

    loader = TokenLoader([Path("data/shakespeare")], None, "train", seq_len=1024, batch_size=8,
                         rank=0, world_size=1, seed=0, vocab_size=50304, tokenizer_fingerprint=None)
    inputs, labels = next(iter(loader))  # {"input": int64 [B, S]}, int64 [B, S]

A step of ``world_size`` ranks takes the next world_size * batch_size samples of one global order
(order.py), rank r the r-th run of ``batch_size`` of them. So ``position_samples`` says it all: it
is the same on every rank, counts what was consumed (not what was loaded ahead), and goes on without
gap or repeat with another number of ranks or batch size. TorchTitan's own loader state is per rank.

``infinite=False`` is one pass, for validation: each token of the split but the first of each shard
is a target exactly once. A shard's last window may be shorter and the last batch may lack samples;
what is missing has input 0 and label -100. Every rank gets the same number of batches, so a rank's
last batch may have no target at all.

Loaders have the interface of TorchTitan's BaseDataLoader (``__iter__``, ``state_dict``,
``load_state_dict``) without importing it. What a user can get wrong is refused at construction.
``MockLoader`` makes random tokens, for measuring without data.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from microtron.data import order
from microtron.data.checks import check_datasets, find_eot
from microtron.data.documents import document_positions
from microtron.data.prefetch import Prefetcher
from microtron.data.shards import open_shard
from microtron.errors import UserError

IGNORE = -100  # the label that losses leave out
_PLAN_SAMPLES = 8192  # samples placed at a time, so that numpy's cost per call vanishes
_OPEN_SHARDS = 512  # each map holds a file descriptor; 1024 is a common limit

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class _Loader(ABC):
    """Position, state, ranks and prefetch; a subclass says what the samples are."""

    def __init__(
        self,
        *,
        seq_len: int,
        batch_size: int,
        rank: int,
        world_size: int,
        vocab_size: int,
        pin_memory: bool,
        prefetch: int,
    ) -> None:
        for name, value in (
            ("seq_len", seq_len),
            ("batch_size", batch_size),
            ("world_size", world_size),
            ("vocab_size", vocab_size),
        ):
            if value < 1:
                raise UserError(f"{name} {value} is refused: it must be 1 or more")
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank {rank} is refused: with world_size {world_size} it must be in "
                f"0..{world_size - 1}"
            )
        self.seq_len, self.batch_size = seq_len, batch_size
        self.rank, self.world_size = rank, world_size
        self.vocab_size, self._step = vocab_size, world_size * batch_size
        self._prefetch, self._pin = prefetch, pin_memory and torch.cuda.is_available()
        self._position = 0  # global samples consumed
        self._resumed = False
        self._generation = 0  # only the newest iterator may move the position
        self._source: Prefetcher | Generator | None = None

    def _describe(
        self, total: int | None, fingerprint: str, eot_id: int | None, dtype: str
    ) -> None:
        """``total``: samples of one pass, None without end; ``eot_id``: None without positions."""
        if eot_id is not None and not 0 <= eot_id < self.vocab_size:
            raise UserError(
                f"eot_id {eot_id} is beyond vocab_size {self.vocab_size}; raise "
                f"vocab_size to {eot_id + 1} or more"
            )
        self._total, self._fingerprint, self._eot_id = total, fingerprint, eot_id
        self._staging = np.empty((self.batch_size, self.seq_len + 1), dtype=dtype)

    @abstractmethod
    def _fill(self, position: int, tokens: np.ndarray) -> np.ndarray | None:
        """Writes this rank's samples at ``position`` to ``tokens`` [B, S+1].

        Returns None, or how many targets each row has (int64 [B]) when some have fewer than S.
        """

    def _load(self, position: int) -> Batch:
        # Contiguous tensors of their own: batches in flight share nothing, context parallelism may
        # resize them in place, and strided views would lose the asynchronous copy to the device.
        tokens = self._staging
        targets = self._fill(position, tokens)
        if targets is not None:
            missing = np.arange(self.seq_len) >= targets[:, None]  # [B, S]
            tokens[:, 1:][missing] = 0
            tokens[targets == 0, 0] = 0
        inputs, labels = {"input": self._tensor()}, self._tensor()
        inputs["input"].numpy()[:] = tokens[:, :-1]
        labels.numpy()[:] = tokens[:, 1:]
        if targets is not None:
            labels.numpy()[missing] = IGNORE
        if self._eot_id is not None:
            inputs["positions"] = self._tensor()
            document_positions(tokens[:, :-1], self._eot_id, inputs["positions"].numpy())
        return inputs, labels

    def _tensor(self) -> torch.Tensor:
        size = self.batch_size, self.seq_len
        return torch.empty(size, dtype=torch.int64, pin_memory=self._pin)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position on; a one-pass loader starts over unless it was just resumed.

        A new iterator, ``load_state_dict`` and ``close`` end the iterator before.
        """
        self.close()
        if self._total is not None and not self._resumed:
            self._position = 0
        self._resumed = False
        return self._batches(self._generation)

    def _batches(self, generation: int) -> Iterator[Batch]:
        pid = source = None
        try:
            while True:
                if generation != self._generation:
                    raise RuntimeError(
                        "this iterator was ended by another, by load_state_dict or "
                        "by close; call iter() again"
                    )
                if pid != os.getpid():  # the first batch, or a fork: threads do not survive those
                    pid, source = os.getpid(), self._start()
                    stream = iter(source)
                found = next(stream, None)
                if found is None:
                    return
                position, batch = found
                self._position = position + self._step
                yield batch
        finally:
            if source is not None:
                source.close()

    def _start(self) -> Prefetcher | Generator:
        if self._total is None:
            positions = count(self._position, self._step)
        else:
            positions = range(self._position, self._total, self._step)
        if self._prefetch < 1:
            return ((position, self._load(position)) for position in positions)
        # a thread starts on device 0, where pinning would make every rank open a context
        setup = partial(torch.cuda.set_device, torch.cuda.current_device()) if self._pin else None
        self._source = Prefetcher(self._load, positions, self._prefetch, setup)
        return self._source

    def close(self) -> None:
        """Ends the prefetch thread and the iterator; the loader can be iterated again."""
        self._generation += 1
        if self._source is not None:
            self._source.close()
            self._source = None

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last batch taken; the same on every rank."""
        return {
            "position_samples": self._position,
            "seq_len": self.seq_len,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes on from ``state``, on any number of ranks and with any batch size.

        With another seq_len the number of tokens taken is kept; since each length has its own
        order, the rest of that epoch then overlaps with what was seen.

        Raises: UserError for incomplete state, other data, or a token count that is no whole number
        of windows of this seq_len.
        """
        missing = {"position_samples", "seq_len", "fingerprint"} - state.keys()
        if missing:
            raise UserError(
                f"loader state lacks {', '.join(sorted(missing))}; resume from a "
                f"checkpoint of microtron, or {_LEAVE_OUT}"
            )
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                f"the checkpoint was trained on other data (fingerprint {state['fingerprint']}, "
                f"this run's is {self._fingerprint}); name the same datasets in the same order, or "
                f"{_LEAVE_OUT}"
            )
        tokens = int(state["position_samples"]) * int(state["seq_len"])
        if tokens % self.seq_len:
            raise UserError(
                f"seq_len {self.seq_len} cannot take over a checkpoint of seq_len "
                f"{state['seq_len']} after {tokens} tokens, which it does not divide; choose one "
                f"that does, or {_LEAVE_OUT}"
            )
        self.close()
        self._position, self._resumed = tokens // self.seq_len, True


_LEAVE_OUT = "start the data afresh with --checkpoint.exclude_from_loading=dataloader"


class TokenLoader(_Loader):
    """Windows of seq_len + 1 tokens from the shards of one or more dataset folders.

    ``weights`` gives each dataset its share of the samples, each running through epochs of its own;
    None joins the datasets into one (always so with ``infinite=False``). Without ``shuffle``
    windows come in the order of the files. ``infinite`` leaves out the tokens behind a shard's last
    full window; one pass does not. ``max_tokens``: a pass ends after so many targets.
    ``document_positions`` adds "positions", restarting at each eot token (``eot_id`` is needed for
    foreign folders only). ``prefetch`` batches are loaded ahead by a thread (0: no thread).

    Raises: UserError for all that checks.py refuses, for weights that order.slot_table refuses or
    that do not match the datasets, and for fewer windows than one global batch.
    """

    def __init__(
        self,
        datasets: Sequence[Path],
        weights: Sequence[float] | None,
        split: str,
        *,
        seq_len: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        vocab_size: int,
        tokenizer_fingerprint: str | None,
        document_positions: bool = False,
        eot_id: int | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        infinite: bool = True,
        shuffle: bool = True,
        max_tokens: int | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            vocab_size=vocab_size,
            pin_memory=pin_memory,
            prefetch=prefetch,
        )
        if weights is not None and (len(weights) != len(datasets) or not infinite):
            why = f"{len(datasets)} datasets" if infinite else "one pass, which takes all of each"
            raise UserError(
                f"{len(weights)} dataset weights do not go with {why}; correct or "
                "remove the weights"
            )
        if max_tokens is not None and (infinite or max_tokens < 1):
            raise UserError(
                f"max_tokens {max_tokens} is refused: it ends a single pass, after 1 "
                "token or more; correct or remove it"
            )
        infos = check_datasets(datasets, split, vocab_size, tokenizer_fingerprint, verify)
        self._paths = [i.folder / e.file for i in infos for e in i.split(split)]
        shards = [[e.tokens for e in i.split(split)] for i in infos]
        self._table = order.slot_table(weights, seed) if weights is not None else None
        groups = shards if weights is not None else [sum(shards, [])]
        if max_tokens is not None:
            groups = [_first_targets(groups[0], max_tokens)]
        self._tokens = np.array(sum(groups, []), dtype=np.int64)  # used of each shard
        self._first_shard = np.cumsum([0] + [len(g) for g in groups])
        self._starts = [order.window_starts(g, seq_len, partial=not infinite) for g in groups]
        self._seed, self._shuffle = seed, shuffle
        self._plan_range, self._plan = range(0), []
        self._open = lru_cache(_OPEN_SHARDS)(lambda shard: open_shard(self._paths[shard]))
        prints = ",".join(info.fingerprint(split) for info in infos)
        self._describe(
            total=None if infinite else int(self._starts[0][-1]),
            fingerprint=hashlib.sha256(prints.encode()).hexdigest()[:16],
            eot_id=find_eot(infos, eot_id) if document_positions else None,
            dtype=max((i.dtype for i in infos), key=lambda name: np.dtype(name).itemsize),
        )
        self._check_enough(datasets, split)

    def _check_enough(self, datasets: Sequence[Path], split: str) -> None:
        needed = 1 if self._total is not None else self._step
        windows = [int(starts[-1]) for starts in self._starts]
        if min(windows) < 1 or sum(windows) < needed:
            names = ", ".join(map(str, datasets))
            raise UserError(
                f"split {split!r} of {names} has too few tokens: {int(self._tokens.sum())}, so "
                f"{' + '.join(map(str, windows))} windows of seq_len {self.seq_len}, for a global "
                f"batch of {needed}; lower seq_len or batch_size, or prepare more data"
            )

    def _fill(self, position: int, tokens: np.ndarray) -> np.ndarray | None:
        targets = []
        for row, (shard, offset, length) in zip(tokens, self._rows(position), strict=True):
            targets.append(length)
            if length:
                row[: length + 1] = self._open(shard)[offset : offset + length + 1]
        return np.array(targets) if min(targets) < self.seq_len else None

    def _rows(self, position: int) -> list[tuple[int, int, int]]:
        """(shard, offset, targets) of this rank's samples at ``position``; planned in blocks."""
        if position not in self._plan_range:
            steps = max(1, _PLAN_SAMPLES // self.batch_size)
            self._plan_range = range(position, position + steps * self._step, self._step)
            own = self.rank * self.batch_size + np.arange(self.batch_size)
            index = np.array(self._plan_range)[:, None] + own
            self._plan = list(zip(*(c.tolist() for c in self.place(index.ravel())), strict=True))
        row = self._plan_range.index(position) * self.batch_size
        return self._plan[row : row + self.batch_size]

    def place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, offset of its first token, targets) of global samples ``index``; int64 [n] each.

        Shards count through all datasets; a sample behind the end of a single pass has 0 targets.
        """
        group, running = (np.zeros_like(index), index)
        if self._table is not None:
            group, running = order.draw(index, self._table)
        shard, offset = np.empty_like(index), np.empty_like(index)
        for number, starts in enumerate(self._starts):
            chosen = group == number
            size, window = int(starts[-1]), running[chosen]
            if self._shuffle:
                window = order.epoch_order(window, size, self._seed, number)
            local, offset[chosen] = order.locate(window % size, starts, self.seq_len)
            shard[chosen] = local + self._first_shard[number]
        targets = np.minimum(self._tokens[shard] - 1 - offset, self.seq_len)
        if self._total is not None:
            targets[index >= self._total] = 0
        return shard, offset, targets


def _first_targets(shard_tokens: list[int], max_tokens: int) -> list[int]:
    """The tokens to use of each shard so that ``max_tokens`` of them are targets, in order."""
    used = []
    for tokens in shard_tokens:
        used.append(min(tokens, max_tokens + 1))
        max_tokens -= max(used[-1] - 1, 0)
    return used


class MockLoader(_Loader):
    """Uniform random tokens, a pure function of (seed, global sample index); no files.

    ``samples`` ends a pass (None: no end). With ``eot_id`` there are "positions" too, as if the
    random occurrences of that id were document starts.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        vocab_size: int,
        eot_id: int | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        samples: int | None = None,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            vocab_size=vocab_size,
            pin_memory=pin_memory,
            prefetch=prefetch,
        )
        self._describe(samples, f"mock-{seed}-{vocab_size}", eot_id, "int64")
        self._seed = seed

    def _fill(self, position: int, tokens: np.ndarray) -> np.ndarray | None:
        index = position + self.rank * self.batch_size + np.arange(self.batch_size)
        column = np.arange(self.seq_len + 1, dtype=np.uint64)
        bits = order.mix64(order.key64(self._seed, index)[:, None] + column)
        tokens[:] = bits % np.uint64(self.vocab_size)
        if self._total is None or index[-1] < self._total:
            return None
        return np.where(index < self._total, self.seq_len, 0)
