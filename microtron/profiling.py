"""Profiler traces by option: ``--profiling.enable_profiling``, then open the JSON in
ui.perfetto.dev.

TorchTitan's own helper lists a GPU activity even where there is no GPU, and torch refuses that.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("microtron")


@contextlib.contextmanager
def traces(options: object, folder: Path) -> Iterator[list[profile]]:
    """A list with the profiler to step, or an empty one when [profiling] is off."""
    if not options.enable_profiling:
        yield []
        return
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    active, warmup = options.profiler_active, options.profiler_warmup

    def write(profiler: profile) -> None:
        target = folder / options.save_traces_folder / f"iteration_{profiler.step_num}"
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"rank{dist.get_rank()}_trace.json"
        profiler.export_chrome_trace(str(path))
        log.info(f"profiler trace {path}")

    with profile(
        activities=activities, on_trace_ready=write, record_shapes=True,
        schedule=schedule(wait=options.profile_freq - active - warmup, warmup=warmup, active=active),
    ) as profiler:
        yield [profiler]
