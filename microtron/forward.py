"""Forward alone, on any mesh: what validation, samples and diagnosis run.

A batch is cut as in training; a pipeline relays it from stage to stage.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchtitan.distributed import ParallelDims

from microtron import accelerator
from microtron.batch import Part, model_inputs
from microtron.model.head import IGNORE
from microtron.parallel.dp import reshard


def part_of(dims: ParallelDims) -> Part:
    """This rank's part of every batch."""
    index = dims.get_mesh("cp").get_local_rank() if dims.cp_enabled else 0
    return Part(index, dims.cp, hidden_cut=dims.tp_enabled, by_row=dims.pp_enabled)


class Forward:
    """The model of the run as one function; every rank calls it alike."""

    def __init__(self, parts: list[nn.Module], dims: ParallelDims, schedule: object = None) -> None:
        self.parts, self.dims, self.part = parts, dims, part_of(dims)
        self.relay = schedule.relay if schedule is not None else None
        # Offloaded parameters are on the CPU; batches go where the work is.
        self.device = torch.device(accelerator.DEVICE_TYPE)

    def __call__(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Logits, or the summed loss with labels, of this rank's part [B, S/cp].

        None on pipeline ranks without the last stage.
        """
        tokens, extra = model_inputs(
            input_dict, input_dict["input"] if labels is None else labels, self.part
        )
        if labels is None:
            del extra["labels"]
        model = self.parts[0] if self.relay is None else self.relay
        return model(tokens, **extra)

    def next_logits(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        """What follows position ``index``, on every rank: tokens [1, S] -> fp32 [V]."""
        logits = self({"input": tokens})
        width = tokens.shape[1] // self.part.parts
        vocab_size = self.parts[0].model_args.vocab_size
        row = torch.zeros(vocab_size, device=tokens.device)
        if logits is not None and index // width == self.part.index:
            row += logits[0, index % width].float()
        self.sum_over(row, "cp", "pp")
        if dist.get_world_size() > 1:
            dist.broadcast(row, 0)  # rounding must not let ranks choose different tokens
        return row

    def row_scores(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probability of each row's labels, summed: tokens, labels [B, S] -> fp64 [B].

        This rank's part of it: the sum over cp and pp is the whole. ``IGNORE`` counts nothing.
        """
        logits = self({"input": tokens})
        scores = torch.zeros(tokens.shape[0], dtype=torch.float64, device=tokens.device)
        if logits is None:
            return scores
        labels = labels.chunk(self.part.parts, dim=1)[self.part.index]
        for row, (raw, wanted) in enumerate(zip(logits, labels, strict=True)):
            raw, wanted = raw[wanted != IGNORE].float(), wanted[wanted != IGNORE]
            scores[row] = -F.cross_entropy(raw, wanted, reduction="sum")
        return scores

    def sum_over(self, tensor: torch.Tensor, *names: str) -> None:
        """In place, over the ranks of those meshes that this run has."""
        for mesh in map(self.dims.get_optional_mesh, names):
            if mesh is not None:
                dist.all_reduce(tensor, group=mesh.get_group())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around a series of calls: eval mode, no gradients; after it nothing is under way or held
        whole.
        """
        for part in self.parts:
            part.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if self.relay is not None:
                self.relay.finish()
            reshard(self.parts)
            for part in self.parts:
                part.train()
