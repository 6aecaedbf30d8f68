"""Log-likelihoods of continuations, in batches of similar length.

Continuations of one context share it: it is computed once, cached, and each of them goes on from
the copy (`infer/engine.py`). One that has its context to itself runs through the model in one
piece. Logits exist for the tokens that are scored, some thousand at a time.

    scorer = Scorer(load(path).model, max_length=1024)
    scores = scorer.score([([50256, 464], [3797]), ([50256, 464], [3290])])
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from microtron.errors import UserError
from microtron.evals.choice import Pair, shortened
from microtron.infer.attention import WholeStep
from microtron.infer.engine import Engine
from microtron.model.model import Transformer

_LOGITS = 2**26  # the most logits at once: 256 MiB in fp32


class Score(NamedTuple):
    """Of one continuation: its log-probability (nats), and whether each token was the likeliest."""

    logprob: float
    greedy: bool


class Scorer:
    """Scores continuations with one model.

    Args:
        model: in eval mode, on its device.
        max_length: tokens that the model sees at once; longer contexts are cut on the left.
        batch_size: rows computed together.
    """

    def __init__(self, model: Transformer, max_length: int, batch_size: int = 16) -> None:
        self.engine, self.max_length, self.batch_size = Engine(model), max_length, batch_size

    def within(self, max_length: int) -> "Scorer":
        """The same, seeing other lengths."""
        other = copy.copy(self)
        other.max_length = max_length
        return other

    @torch.no_grad()
    def score(
        self, pairs: list[Pair], progress: Callable[[Iterable], Iterable] | None = None
    ) -> list[Score]:
        """One score a pair, in their order.

        Args:
            pairs: ids of a context, one at least, and of its continuation.
            progress: wraps the series of batches, as tqdm does.

        Raises:
            UserError: a continuation is longer than ``max_length``.
        """
        pairs = [self._checked(pair) for pair in pairs]
        scores: list[Any] = [None] * len(pairs)
        for shared, batch in (progress or list)(list(self._batches(pairs))):
            chosen = [pairs[index] for index in batch]
            found = self._shared(chosen) if shared else self._alone(chosen)
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
        return scores

    def _checked(self, pair: Pair) -> Pair:
        if len(pair[1]) > self.max_length:
            raise UserError(
                f"a continuation of {len(pair[1])} tokens is longer than the {self.max_length} "
                "that the model sees at once: raise --max-length, or leave the task out"
            )
        return shortened(pair, self.max_length)

    def _batches(self, pairs: list[Pair]) -> Iterator[tuple[bool, list[int]]]:
        """(whether contexts are shared, indices), longest first, so that memory runs short at once
        or not at all. Those of one context stay together as far as a batch goes; one token, such as
        the separator before whole documents, is not worth sharing.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            groups.setdefault(tuple(context), []).append(index)

        def length(index: int) -> int:
            return len(pairs[index][0]) + len(pairs[index][1])

        parts: list[list[int]] = []
        for context, group in groups.items():
            group.sort(key=length, reverse=True)
            size = self.batch_size if len(context) > 1 else 1
            parts += [group[i : i + size] for i in range(0, len(group), size)]
        parts.sort(key=lambda part: length(part[0]), reverse=True)
        for shared in (True, False):
            batch: list[int] = []
            for part in (p for p in parts if (len(p) > 1) == shared):
                if batch and len(batch) + len(part) > self.batch_size:
                    yield shared, batch
                    batch = []
                batch += part
            if batch:
                yield shared, batch

    def _alone(self, pairs: list[Pair]) -> list[Score]:
        """Whole rows, padded on the right, where a causal model does not look."""
        rows = [torch.tensor((context + continuation)[:-1]) for context, continuation in pairs]
        hidden = self._hidden(rows)
        return [
            self._of_hidden(h[len(context) - 1 : len(context) + len(wanted) - 1], wanted)
            for h, (context, wanted) in zip(hidden, pairs, strict=True)
        ]

    def _hidden(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Ids of each row -> [B, longest, dim], normed for the head."""
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.engine.device)
        args, width = self.engine.args, tokens.shape[1]
        step = WholeStep(tokens.device, width, args.attn_backend, args.window)
        positions = torch.arange(width, device=tokens.device).unsqueeze(0)
        return self.engine.body(tokens, {"window": step, "full": step}, positions)

    def _of_hidden(self, hidden: torch.Tensor, wanted: list[int]) -> Score:
        """hidden [n, dim], wanted n ids."""
        size = max(_LOGITS // self.engine.args.vocab_size, 1)
        parts = [
            _score(self.engine.head(h.unsqueeze(0))[0], wanted[i * size : (i + 1) * size])
            for i, h in enumerate(hidden.split(size))
        ]
        return _joined(parts)

    def _shared(self, pairs: list[Pair]) -> list[Score]:
        """Each context once; its last token predicts the first of every continuation."""
        contexts = list({tuple(context): None for context, _ in pairs})
        most = max(len(wanted) for _, wanted in pairs) - 1
        cache, first = self.engine.prefill(
            [list(c) for c in contexts], max(map(len, contexts)) + most
        )
        rows = [contexts.index(tuple(context)) for context, _ in pairs]
        parts = [
            [_score(first[row : row + 1], wanted[:1])]
            for row, (_, wanted) in zip(rows, pairs, strict=True)
        ]
        given = [torch.tensor(wanted[:-1], dtype=torch.int64) for _, wanted in pairs]
        tokens = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        width = max(_LOGITS // (len(pairs) * self.engine.args.vocab_size), 1)
        cache = cache.select(rows) if most else cache
        for start in range(0, most, width):
            counts = [min(max(len(ids) - start, 0), width) for ids in given]
            logits = self.engine.extend(cache, tokens[:, start : start + width], counts)
            for part, row, count, (_, wanted) in zip(parts, logits, counts, pairs, strict=True):
                if count:
                    part.append(_score(row[:count], wanted[start + 1 : start + 1 + count]))
        return list(map(_joined, parts))


def _score(logits: torch.Tensor, wanted: list[int]) -> Score:
    """logits [n, V], wanted n ids."""
    ids = torch.tensor(wanted, device=logits.device)
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids.unsqueeze(-1))
    return Score(logprobs.double().sum().item(), bool((logits.argmax(-1) == ids).all()))


def _joined(parts: list[Score]) -> Score:
    return Score(sum(part.logprob for part in parts), all(part.greedy for part in parts))
