"""Profiler traces by option: ``--profiling.enable_profiling``, then open the JSON in
ui.perfetto.dev.

TorchTitan's own helper lists a GPU activity even where there is no GPU, and torch refuses that.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from microtron.accelerator import DEVICE_TYPE

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule
from torchtitan.tools.profiling import maybe_enable_memory_snapshot

log = logging.getLogger("microtron")


@contextlib.contextmanager
def profilers(options: object, folder: Path, step: int) -> Iterator[list]:
    """What to step after each training step: traces, and TorchTitan's CUDA memory snapshots."""
    snapshots = maybe_enable_memory_snapshot(options, global_step=step, base_folder=str(folder))
    with traces(options, folder) as running, snapshots as memory:
        yield running + ([memory] if memory else [])


@contextlib.contextmanager
def traces(options: object, folder: Path) -> Iterator[list[profile]]:
    """A list with the profiler to step, or an empty one when [profiling] is off."""
    if not options.enable_profiling:
        yield []
        return
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if DEVICE_TYPE == "cuda" else []
    active, warmup = options.profiler_active, options.profiler_warmup

    def write(profiler: profile) -> None:
        target = folder / options.save_traces_folder / f"iteration_{profiler.step_num}"
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"rank{dist.get_rank()}_trace.json"
        profiler.export_chrome_trace(str(path))
        log.info(f"profiler trace {path}")

    with profile(
        activities=activities,
        on_trace_ready=write,
        record_shapes=True,
        schedule=schedule(
            wait=options.profile_freq - active - warmup, warmup=warmup, active=active
        ),
    ) as profiler:
        yield [profiler]
