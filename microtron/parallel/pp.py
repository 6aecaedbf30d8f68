"""Pipeline parallel: stages of layers on torch.distributed.pipelining.

Stages are balanced by cost (`stages.py`). The last one returns the summed loss itself: it is handed
the labels as every stage is, and the schedule's loss function only divides by the tokens of the
global batch, before backward, so gradients have the size they have without a pipeline. (TorchTitan
0.2.2 divides afterwards, when only the log sees it: pytorch/torchtitan#2972.)
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from microtron.model.args import ModelArgs
from microtron.model.model import Transformer
from microtron.parallel.dp import autocast_for, wrapped
from microtron.parallel.stages import module_names, split, stage_count

V_SHAPED = ("ZBVZeroBubble",)  # a rank's second stage counts from the end


def pipeline(
    model: Transformer,
    dims: ParallelDims,
    job: JobConfig,
    device: torch.device,
    args: ModelArgs,
    parallelize: Callable[..., Transformer],
    loss_fn: Callable[..., torch.Tensor],
) -> tuple[object, list[nn.Module], bool, bool]:
    """TorchTitan's pipelining_fn: (schedule, this rank's parts, has the first stage, has the last).

    The schedule carries a `Relay` as ``relay``, for passes without backward.
    """
    options = job.parallelism
    schedule = options.pipeline_parallel_schedule
    group = dims.get_mesh("pp").get_group()
    count = stage_count(
        schedule, dims.pp, options.pipeline_parallel_layers_per_stage, args.n_layers
    )
    layers = split(args, job.training.seq_len, count)
    shapes = _Shapes.of(args, dims, job)
    stages, parts = [], []
    for index in stages_of(dist.get_rank(group), dims.pp, count, schedule):
        first, last = index == 0, index == count - 1
        part = cut(model, module_names(args, layers[index], first, last))
        part = parallelize(part, dims, job)
        dtype = autocast_for(dims, job)
        if dtype is not None:
            part.forward = torch.autocast(device.type, dtype=dtype)(part.forward)
        stage = PipelineStage(
            part,
            index,
            count,
            device,
            input_args=shapes.tokens() if first else shapes.hidden(),
            output_args=shapes.loss() if last else shapes.hidden(),
            group=group,
        )
        stages.append(stage)
        parts.append(part)
    kind = get_schedule_class(schedule)
    built = kind(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
        n_microbatches=job.training.local_batch_size // options.pipeline_parallel_microbatch_size,
        loss_fn=loss_fn,
        scale_grads=False,
    )
    built.relay = Relay(stages, group, dims.tp, shapes.dtype)
    return built, parts, stages[0].is_first, any(s.is_last for s in stages)


def stages_of(rank: int, ranks: int, count: int, schedule: str) -> list[int]:
    """The stages that a rank of the pipeline runs, in the order of the layers."""
    if schedule in V_SHAPED:
        return [rank, count - 1 - rank]
    return list(range(rank, count, ranks))


def cut(model: Transformer, names: list[str]) -> Transformer:
    """A copy of a meta model with only the named modules; parameters keep their names."""
    part = copy.deepcopy(model)
    for name, child in list(part.named_children()):
        if isinstance(child, nn.ModuleDict):
            for key in list(child):
                if f"{name}.{key}" not in names:
                    del child[key]
        elif name not in names:
            setattr(part, name, None)
    return part


@dataclass(frozen=True)
class _Shapes:
    """What stages exchange for one micro-batch; told to torch, which else runs the model to see."""

    batch: int
    length: int
    length_between: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, args: ModelArgs, dims: ParallelDims, job: JobConfig) -> "_Shapes":
        length = job.training.seq_len // dims.cp
        param = TORCH_DTYPE_MAP[job.training.mixed_precision_param]
        return cls(
            job.parallelism.pipeline_parallel_microbatch_size,
            length,
            length // dims.tp,
            args.dim,
            param if wrapped(dims) else TORCH_DTYPE_MAP[job.training.dtype],
        )

    def tokens(self) -> torch.Tensor:
        return torch.empty(self.batch, self.length, dtype=torch.int64, device="meta")

    def hidden(self) -> torch.Tensor:
        shape = (self.batch, self.length_between, self.dim)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)

    def loss(self) -> torch.Tensor:
        return torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)


class Relay:
    """Forward alone through all stages, for any batch shape: validation and samples.

    A rank passes hidden states on and goes ahead with its next batch, so a sequence of batches
    flows like a pipeline without a schedule.
    """

    def __init__(
        self, stages: list[PipelineStage], group: dist.ProcessGroup, tp: int, dtype: torch.dtype
    ) -> None:
        self.stages, self.group, self.tp, self.dtype = stages, group, tp, dtype
        self.sending: list[tuple[dist.Work, torch.Tensor]] = []

    def __call__(self, tokens: torch.Tensor, **extra: object) -> torch.Tensor | None:
        """tokens [B, S/cp] -> what the last stage returns, on its rank; None elsewhere."""
        out = None
        for stage in self.stages:
            x = tokens if stage.is_first else self._receive(stage, tokens, out)
            out = stage.submod(x, **extra)
            if not stage.is_last:
                self._send(stage, out)
        return out if self.stages[-1].is_last else None

    def _peer(self, stage: PipelineStage, index: int) -> int | None:
        """Global rank of a stage's neighbour; None: this rank itself."""
        rank = stage.stage_index_to_group_rank[index]
        return None if rank == stage.group_rank else dist.get_global_rank(self.group, rank)

    def _receive(
        self, stage: PipelineStage, tokens: torch.Tensor, before: torch.Tensor | None
    ) -> torch.Tensor:
        peer = self._peer(stage, stage.stage_index - 1)
        if peer is None:
            return before
        dim = stage.submod.model_args.dim
        shape = (tokens.shape[0], tokens.shape[1] // self.tp, dim)
        x = torch.empty(shape, dtype=self.dtype, device=tokens.device)
        self._exchange(dist.irecv, x, peer).wait()
        return x

    def _exchange(self, operation: Callable, x: torch.Tensor, peer: int) -> dist.Work:
        """As a batch of one, on the communicator that the schedule has opened."""
        return dist.batch_isend_irecv([dist.P2POp(operation, x, peer, self.group)])[0]

    def _send(self, stage: PipelineStage, out: torch.Tensor) -> None:
        peer = self._peer(stage, stage.stage_index + 1)
        if peer is not None:
            out = out.detach().to(self.dtype).contiguous()
            self.sending.append((self._exchange(dist.isend, out, peer), out))
        if len(self.sending) > 4:  # a few batches ahead at most
            self.sending.pop(0)[0].wait()

    def finish(self) -> None:
        """Waits until all that was sent has arrived."""
        while self.sending:
            self.sending.pop(0)[0].wait()
