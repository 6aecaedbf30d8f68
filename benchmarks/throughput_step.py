"""One candidate of throughput.py in this process: what it works on, its step, its measurement."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import our_trainer, seconds_of, stepping, synchronise

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

    from microtron.model.args import ModelArgs

WARM_UP = 2  # the first step compiles, the second allocates what the optimizer keeps


@dataclass(frozen=True)
class Work:
    """What every candidate is given: the recipe's shape, and as many tokens a step."""

    toml: str
    options: tuple[str, ...]
    """Of the run: --section.key=value, on top of the TOML."""
    seq_len: int
    micro_tokens: int
    """Tokens of a forward and backward."""
    step_tokens: int
    """Tokens of an optimizer step."""
    steps: int
    """Steps of a block, which is timed in one piece."""
    blocks: int
    backend: str
    """Of torch.compile."""

    def __post_init__(self) -> None:
        from microtron.errors import UserError

        if self.micro_tokens % self.seq_len:
            raise UserError(
                f"--micro-tokens {self.micro_tokens} is not whole sequences of {self.seq_len}: "
                "give a multiple"
            )
        if self.step_tokens % self.micro_tokens:
            raise UserError(
                f"--step-tokens {self.step_tokens} is not whole micro-batches of "
                f"{self.micro_tokens}: give a multiple"
            )

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.micro_tokens // self.seq_len

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return self.step_tokens // self.micro_tokens

    def argv(self, options: tuple[str, ...] = ()) -> list[str]:
        """The run, for `microtron.parse`; the last of two equal options counts."""
        return [
            f"--job.config_file={self.toml}",
            *self.options,
            "--data.no-document-mask",  # the peers attend across documents: equal work
            "--training.mixed-precision-param=bfloat16",
            f"--training.seq-len={self.seq_len}",
            f"--training.local-batch-size={self.rows}",
            f"--training.global-batch-size={self.rows * self.accumulate}",
            f"--compile.backend={self.backend}",
            *options,
        ]

    def parsed(self, options: tuple[str, ...] = ()) -> "JobConfig":
        """The same as a checked JobConfig; peers share its data and optimizer."""
        from common import BARE

        from microtron.parse import parse

        argv = self.argv(options)
        return parse([*argv[:1], *BARE, *argv[1:]])

    def batches(self) -> Iterator[tuple[dict, object]]:
        """The micro-batches that our Trainer would see: ({"input": [B, S]}, labels [B, S])."""
        from microtron.spec import build_loader

        return iter(build_loader(1, 0, None, self.parsed()))


@dataclass(frozen=True)
class Running:
    """A candidate, ready to train."""

    args: "ModelArgs"
    step: Callable[[], None]
    """One optimizer step of `Work.step_tokens`; may return before the device is done."""
    loss: Callable[[], float]
    """Of the last step, a token."""


@contextlib.contextmanager
def ours(work: Work, options: tuple[str, ...]) -> Iterator[Running]:
    """microtron's Trainer."""
    with our_trainer(work.argv(options)) as trainer:
        yield Running(trainer.model_args, stepping(trainer), lambda: trainer.step_result[0].item())


def measure(running: Running, work: Work) -> dict[str, object]:
    """Seconds of the first step, tokens a second of each block, peak memory after the warm-up.

    Raises:
        UserError: the loss is not that of a model which knows nothing (random tokens teach
            nothing): it would compare a candidate that computes something else.
    """
    import torch

    from microtron.errors import UserError
    from microtron.model.accounting import count_parameters, flops_per_token

    cuda = torch.cuda.is_available()
    first_step_s = seconds_of(running.step)
    loss, chance = running.loss(), math.log(running.args.vocab_size)
    if not 0.9 * chance < loss < 1.5 * chance:
        raise UserError(f"its first loss is {loss:.3f} where chance is {chance:.3f}")
    for _ in range(WARM_UP - 1):
        running.step()
    synchronise()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    speeds = []
    for _ in range(work.blocks):
        began = time.perf_counter()
        for _ in range(work.steps):
            running.step()
        synchronise()
        speeds.append(work.steps * work.step_tokens / (time.perf_counter() - began))
    last = running.loss()
    return {
        "tokens_per_s": speeds,
        "first_step_s": first_step_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "first_loss": loss,
        "last_loss": last if math.isfinite(last) else None,
        "flops_per_token": sum(flops_per_token(running.args, work.seq_len).values()),
        "parameters_active": count_parameters(running.args).active,
    }


def profile(running: Running, path: Path, steps: int = 2) -> None:
    """Writes the kernels that took most of the device's time (on a CPU: the operators)."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    began = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            running.step()
        synchronise()
    wall_ms = 1e3 * (time.perf_counter() - began) / steps
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append((microseconds / 1e3 / steps, event.count / steps, event.key))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(kernel_table(rows, wall_ms))


def kernel_table(rows: list[tuple[float, float, str]], wall_ms: float, most: int = 40) -> str:
    """(ms a step, calls a step, name) -> the largest first, with their share of all of them."""
    total = sum(ms for ms, _, _ in rows)
    lines = [f"{total:.2f} ms a step in {len(rows)} kernels; {wall_ms:.2f} ms on the clock"]
    lines += ["   ms/step  share  calls  kernel"]
    for ms, calls, name in sorted(rows, reverse=True)[:most]:
        lines.append(f"{ms:10.3f} {ms / max(total, 1e-9):6.1%} {calls:6.0f}  {name[:120]}")
    return "\n".join(lines) + "\n"


def settings(work: Work) -> dict[str, object]:
    """Of the measurement, for the JSON; equal ones may be put together."""
    told = asdict(work)
    del told["seq_len"]
    toml = os.path.relpath(work.toml, Path(__file__).resolve().parents[1])
    return told | {"toml": toml, "options": list(work.options)}
