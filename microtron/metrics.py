"""What a run tells: console lines, metrics.jsonl, and TensorBoard or W&B by option.

One JSON object a line: ``step, loss, grad_norm, lr, tokens, tps, mfu, tflops, memory_gib, time_s,
data_percent`` and the expert load; validation lines hold ``step, val_loss, val_bpb, val_tokens``,
HellaSwag's ``step, hellaswag_acc, hellaswag_acc_norm``.
``tokens`` and ``tps`` are of the whole run, ``mfu`` and ``tflops`` of one device, ``memory_gib`` of
the rank with the most, ``time_s`` is time spent training (validation, samples and checkpoints left
out). On CPU the MFU is relative to a measured matrix product.
"""

import json
import logging
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from microtron import accelerator

log = logging.getLogger("microtron")


class _Readable(logging.Filter):
    """The console shows microtron's own lines and everybody's warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.startswith("microtron") or record.levelno >= logging.WARNING


def setup_logging(folder: Path, rank: int) -> None:
    """Console on rank 0, a whole log of every rank in ``folder/log/rankN.log``."""
    import sys

    logging.raiseExceptions = False  # a full disk is told once, by whoever ends the run
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for old in root.handlers[:]:
        root.removeHandler(old)
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.addFilter(_Readable())
        console.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(console)
    (folder / "log").mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "log" / f"rank{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(lambda record: _to_file(record, file))


def _to_file(record: logging.LogRecord, file: logging.Handler) -> bool:
    """Library warnings go to the log file, not to the person."""
    file.handle(record)
    return False


class RunMetrics(MetricsProcessor):
    """TorchTitan's processor with our fields and files. Built after the process group."""

    def __init__(self, job: JobConfig, parallel_dims: ParallelDims) -> None:
        super().__init__(job, parallel_dims)
        self.steps = job.training.steps
        self.writes = dist.get_rank() == 0  # which has the console as well
        self.path = Path(job.job.dump_folder) / "metrics.jsonl"
        self.train_s = 0.0  # since the last line
        self.steps_since_line = 0

    def resume_at(self, step: int) -> None:
        """Drops lines past ``step``: the run takes another course from there. 0: a new run."""
        if not self.writes or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step and step > 0:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line a kill cut in two
        temporary = self.path.with_suffix(".jsonl.partial")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)

    def write(self, entry: dict[str, object]) -> None:
        """Appends one line, and hands numbers to TensorBoard and W&B."""
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        for key, values in entry.items():
            if isinstance(values, list):
                numbers |= {f"{key}/layer{i}": v for i, v in enumerate(values)}
        self.logger.log(numbers, entry["step"])
        if self.writes:
            with self.path.open("a") as f:
                f.write(json.dumps(entry) + "\n")

    def log_step(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        time_s: float,
        extra: dict[str, object],
    ) -> None:
        """One training line, over the steps since the last one."""
        ranks = dist.get_world_size()
        tps = self.ntokens_since_last_log / max(self.train_s, 1e-9)
        flops = self.num_flops_per_token * tps / ranks
        data = 100 * sum(self.data_loading_times) / max(self.train_s, 1e-9)
        memory = self._largest(self.device_memory_monitor.get_peak_stats().max_reserved_gib)
        entry = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tps": round(tps, 1),
            "mfu": round(100 * flops / self.gpu_peak_flops, 3),
            "tflops": round(flops / 1e12, 5),
            "memory_gib": round(memory, 3),
            "time_s": round(time_s, 3),
            "data_percent": round(data, 3),
            **extra,
        }
        self.write(entry)
        left = (self.steps - step) * self.train_s / max(self.steps_since_line, 1)
        width = len(str(self.steps))
        balance = extra.get("expert_load_max_mean")
        load = f" | load {max(balance):.2f}" if balance else ""
        log.info(
            f"step {step:>{width}}/{self.steps} | loss {loss:.4f} | grad {grad_norm:.2f} | "
            f"lr {lr:.2e}{load} | {tps:,.0f} tok/s | mfu {entry['mfu']:.1f}% | "
            f"{memory:.2f} GiB | {clock(time_s)} (left {clock(left)})"
        )
        self.ntokens_since_last_log, self.train_s, self.steps_since_line = 0, 0.0, 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()

    @staticmethod
    def _largest(value: float) -> float:
        """Of all ranks: the one that runs out of memory first is the one to know of."""
        if dist.get_world_size() == 1:
            return value
        largest = torch.tensor(value, device=accelerator.DEVICE_TYPE)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def log_validation(  # pyrefly: ignore
        self, step: int, loss: float, tokens: int, byte_count: int, seconds: float
    ) -> dict[str, object]:
        """One validation line; bits-per-byte where the bytes are known."""
        bpb = loss * tokens / math.log(2) / byte_count if byte_count else None
        entry = {"step": step, "val_loss": loss, "val_bpb": bpb, "val_tokens": tokens}
        self.write({k: v for k, v in entry.items() if v is not None})
        told = f" | {bpb:.4f} bits per byte" if bpb is not None else ""
        log.info(
            f"step {step} | validation loss {loss:.4f}{told} | {tokens:,} tokens in {seconds:.1f} s"
        )
        return entry


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def build_metrics(
    job: JobConfig, parallel_dims: ParallelDims, model_args: object = None, tag: str | None = None
) -> RunMetrics:
    """TorchTitan's builder signature."""
    return RunMetrics(job, parallel_dims)


class Stopwatch:
    """Seconds spent inside ``with``, summed."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *failure: object) -> None:
        self.last_s = time.perf_counter() - self.start
        self.total_s += self.last_s
