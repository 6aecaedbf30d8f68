"""HellaSwag while a model trains: every rank of any mesh takes its part.

Every ending is a row of its own. Rows of about the same length make a batch, of one shape on all
ranks, and are dealt over the data ranks; where they do not come out even, empty rows fill up, so
that every rank calls the model equally often and none waits for another. A row's score lands at its
own index of one vector, which is summed over the ranks at the end.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microtron.data.tokenizers import Tokenizer
from microtron.errors import UserError
from microtron.evals.choice import Accuracy, accuracy, question, read, shortened
from microtron.model.head import IGNORE

log = logging.getLogger("microtron")
_SHORTEST = 16  # tokens of the shortest shape, for each rank that cuts a sequence
_LOGITS = 2**27  # the most logits of a batch


@dataclass(frozen=True)
class Batch:
    """Rows of one shape; ``indices`` [B] says which ones, -1 where a row is empty."""

    indices: list[int]
    length: int


def batches(lengths: list[int], unit: int, longest: int, rows: Callable[[int], int]) -> list[Batch]:
    """All rows in batches of few shapes, longest first.

    Args:
        lengths: tokens of each row, none above ``longest``.
        unit: the shortest shape; each other is twice one, or ``longest``.
        rows: how many rows of a length make a batch.
    """
    by_shape: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shape = unit
        while shape < lengths[index]:
            shape *= 2
        by_shape.setdefault(min(shape, longest), []).append(index)
    found = []
    for length, indices in by_shape.items():
        size = rows(length)
        indices += [-1] * (-len(indices) % size)
        found += [Batch(indices[i : i + size], length) for i in range(0, len(indices), size)]
    return found


class HellaSwag:
    """The examples of ``[eval] hellaswag``, encoded once.

    Raises:
        UserError: the file cannot be read, or the data has no tokenizer.
    """

    def __init__(self, options: Any, tokenizer: Tokenizer | None, seq_len: int) -> None:  # noqa: ANN401
        if tokenizer is None:
            raise UserError(
                f"eval.hellaswag = {options.hellaswag!r} cannot work: the data has no tokenizer to "
                "read it with; prepare data with `microtron prepare`, or leave it out"
            )
        self.seq_len = seq_len
        self.examples = read(Path(options.hellaswag), options.hellaswag_examples)
        try:
            found = [question(e, tokenizer.encode, [tokenizer.eot_id]) for e in self.examples]
        except UserError as error:
            raise UserError(f"eval.hellaswag = {options.hellaswag!r}: {error}") from None
        self.rows = [shortened(pair, seq_len) for pairs in found for pair in pairs]

    def measure(self, forward: Any, amp: AbstractContextManager) -> Accuracy:  # noqa: ANN401
        """Called by all ranks alike; the same figures on each. ``forward`` is the run's Forward."""
        dims, device = forward.dims, forward.device
        mesh = dims.get_optional_mesh("batch")
        rank, ranks = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
        vocab_size = forward.parts[0].model_args.vocab_size

        def rows(length: int) -> int:
            return ranks * max(_LOGITS // (length * vocab_size), 1)

        unit = _SHORTEST * dims.cp * dims.tp
        lengths = [len(context) + len(ending) - 1 for context, ending in self.rows]
        scores = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        with forward.evaluating(), amp:
            for batch in batches(lengths, unit, self.seq_len, rows):
                share = len(batch.indices) // ranks
                mine = batch.indices[rank * share : (rank + 1) * share]
                tokens, labels = self._tensors(mine, batch.length)
                found = forward.row_scores(tokens.to(device), labels.to(device))
                for place, index in enumerate(mine):
                    if index >= 0:
                        scores[index] = found[place]
        forward.sum_over(scores, "loss", "pp")
        return accuracy(self.examples, scores.tolist())

    def _tensors(self, indices: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens and labels [B, length] of these rows; only endings are targets."""
        tokens = torch.zeros(len(indices), length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        for place, index in enumerate(indices):
            if index >= 0:
                context, ending = self.rows[index]
                ids = torch.tensor(context + ending)
                tokens[place, : len(ids) - 1] = ids[:-1]
                labels[place, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
        return tokens, labels

    def report(
        self,
        step: int,
        forward: Any,
        amp: AbstractContextManager,
        write: Callable[[dict], None],  # noqa: ANN401
    ) -> Accuracy:
        """Measures, tells the console, and hands the entry of metrics.jsonl to ``write``."""
        began = time.perf_counter()
        found = self.measure(forward, amp)
        write({"step": step, "hellaswag_acc": found.acc, "hellaswag_acc_norm": found.acc_norm})
        log.info(
            f"step {step} | HellaSwag {100 * found.acc:.2f}%, normed {100 * found.acc_norm:.2f}% | "
            f"{found.examples:,} examples in {time.perf_counter() - began:.1f} s"
        )
        return found
