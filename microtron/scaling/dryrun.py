"""A rehearsal without ranks: the run's code spreads a weightless model over a pretended cluster.

torch's "fake" backend answers every collective at once, so one process can be any rank of any
number. The real ParallelDims, `parallelize` and pipeline cuts run on the meta device; what each
parameter's local part then holds must be what `memory.py` says.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from microtron import accelerator  # noqa: F401  (before torchtitan)
from microtron.config import resolved_args
from microtron.errors import UserError
from microtron.model.init import plain_name
from microtron.model.model import Transformer
from microtron.parallel.apply import parallelize
from microtron.parallel.pp import cut
from microtron.parallel.stages import module_names
from microtron.scaling.memory import local_parameters
from microtron.scaling.plan import Plan


def rehearse(job: JobConfig, plan: Plan, rank: int) -> dict[str, int]:
    """Numbers of each parameter on that rank, as the run itself would spread them.

    Raises:
        UserError: building it fails; with the library's reason.
    """
    with _pretended(plan.layout.world, rank):
        try:
            return _built(job, plan)
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            told = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"layout {plan.layout} cannot be built (rank {rank}): {told}; change the degrees "
                "of [parallelism]"
            ) from error


def compare(job: JobConfig, plan: Plan) -> list[int]:
    """Rehearses the ranks that differ (each pipeline rank's first, and the last of all) and
    compares their parameters with the formulas; returns these ranks.

    Raises:
        AssertionError: formula and code disagree.
        UserError: see `rehearse`.
    """
    ranks = sorted({*plan.telling_ranks(), plan.layout.world - 1})
    for rank in ranks:
        built, told = rehearse(job, plan, rank), local_parameters(plan, rank)
        wrong = {n for n in built.keys() | told.keys() if built.get(n) != told.get(n)}
        name = min(wrong, default="")
        assert not wrong, (
            f"rank {rank} holds {built.get(name)} numbers of {name}, the formula says "
            f"{told.get(name)} ({len(wrong)} parameters differ)"
        )
    return ranks


@contextlib.contextmanager
def _pretended(world_size: int, rank: int) -> Iterator[None]:
    """A process group of so many ranks, of which this process is one and the others nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    talk = logging.getLogger("root"), logging.getLogger("torchtitan"), logging.getLogger()
    levels = [log.level for log in talk]
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        for log in talk:
            log.setLevel(logging.WARNING)
        yield
    finally:
        for log, level in zip(talk, levels, strict=True):
            log.setLevel(level)
        dist.destroy_process_group()


def _built(job: JobConfig, plan: Plan) -> dict[str, int]:
    layout, args = plan.layout, resolved_args(job)
    dims = ParallelDims(
        dp_replicate=layout.dp_replicate,
        dp_shard=layout.dp_shard,
        cp=layout.cp,
        tp=layout.tp,
        pp=layout.pp,
        ep=layout.ep,
        etp=layout.etp,
        world_size=layout.world,
    )
    dims.build_mesh()
    with torch.device("meta"):
        model = Transformer(args)
    parts = [model]
    if layout.pp > 1:
        rank = dims.get_mesh("pp").get_local_rank()
        parts = [
            cut(model, module_names(args, stage.layers, stage.first, stage.last))
            for stage in plan.stages_of(rank)
        ]
    spread = [parallelize(part, dims, job) for part in parts]
    return {
        plain_name(name): _local_numel(parameter)
        for part in spread
        for name, parameter in part.named_parameters()
    }


def _local_numel(parameter: nn.Parameter) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
