"""Each kernel class of a training step against what this device can do at most.

    python benchmarks/kernel_speed.py --out benchmarks/results/kernels_cuda.json
    python benchmarks/kernel_speed.py --tiny --choices torch compile     # of [kernels], small

The shapes are those of a TOML's micro-batch (default: gpt_oss_656m on CUDA, debug on a CPU);
options of the run (--training.seq_len=..., --model.args.dim=...) may follow. For every class and
every body (`kernel_cases.py`): milliseconds forward, without gradients, and forward with backward;
peak memory; and the share of the floor, max(least bytes / copy, FLOPs / matmul) over the time. The
ceilings, a large copy and a large matmul in the compute dtype, are measured here too.

Bodies take turns. On CUDA a call is timed by events around it, after writes that empty the L2 cache
and keep the device busy for some milliseconds, in which the host runs ahead: what is measured is
the device, not the launches, unless a body waits for it. Before that, every body's results and
gradients are compared with the first one's (`error`, relative).

`auto` in the JSON is what `microtron/kernels.py` shall have in its table; a test compares them.
"""

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from microtron.accelerator import DEVICE_TYPE  # noqa: E402

import torch  # noqa: E402
from common import BARE, facts, interleave, peak_bytes, reset_peak, summary, write_json  # noqa: E402
from kernel_cases import Case, Shapes, cases  # noqa: E402

from microtron.config import resolved_args  # noqa: E402
from microtron.kernels import DEPENDABLE, KERNELS  # noqa: E402
from microtron.model import cpu_product  # noqa: E402
from microtron.parse import parse  # noqa: E402

RECIPES = Path(__file__).parents[1] / "train_configs"
DEFAULT = {"cuda": "gpt_oss_656m_1gpu.toml", "cpu": "debug.toml"}
TINY = ["--training.seq_len=32", "--training.local_batch_size=2", "--model.args.n_layers=2"]
TINY += ["--model.args.dim=32", "--model.args.expert_dim=24", "--model.args.window=8"]
TINY += ["--model.args.vocab_size=512", "--model.args.n_heads=4", "--model.args.n_kv_heads=2"]
TINY += ["--training.global_batch_size=-1"]
L2_BYTES = 256 * 2**20  # more than any cache
AHEAD_BYTES = 16 * 2**30  # written before a call: takes longer than to launch a body
CLASS_OF = {"norm": "norm", "rope": "rope", "swiglu": "swiglu", "loss": "head + loss"}
SLOWER = 0.95  # a body replaces plain torch when it takes less than this share of its time


def clocked(call: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """``call`` that appends the seconds the device took."""
    if DEVICE_TYPE != "cuda":

        def run() -> None:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)

        return run

    def run() -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(AHEAD_BYTES // L2_BYTES):
            _larger_than_cache().zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)

    return run


@functools.cache
def _larger_than_cache() -> torch.Tensor:
    return torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")


def timed(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Name -> seconds: median, least, most; calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    interleave({name: clocked(call, seconds[name]) for name, call in calls.items()}, repeats)
    return {name: summary(taken[-repeats:]) for name, taken in seconds.items()}


def ceilings(dtype: torch.dtype, tiny: bool, repeats: int) -> dict[str, dict[str, float]]:
    """FLOP/s of a large matmul and bytes/s (read and written) of a large copy."""
    cuda = DEVICE_TYPE == "cuda"
    n = 256 if tiny else 8192 if cuda else 1536
    a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE_TYPE) for _ in range(2))
    c = torch.empty_like(a)
    # A step's products on a CPU may go to oneDNN, so this one does, too.
    matmul = (lambda: torch.mm(a, b, out=c)) if cuda else (lambda: cpu_product.product(a, b))
    size = (2**22 if tiny else 2**31 if cuda else 2**28) // 4
    source = torch.ones(size, device=DEVICE_TYPE)
    target = torch.empty_like(source)
    seconds = timed({"matmul": matmul, "copy": lambda: target.copy_(source)}, repeats)
    work = {"matmul": 2.0 * n**3, "copy": 8.0 * size}
    rates = {}
    for name, taken in seconds.items():
        rates[name] = {
            "median": work[name] / taken["median"],
            "min": work[name] / taken["max"],
            "max": work[name] / taken["min"],
        }
    return rates


def memory_of(call: Callable[[], None]) -> int | None:
    """Bytes that a call needs at most beyond what is held before it; None: cannot be seen."""
    before = reset_peak()
    call()
    return None if before is None else max(0, peak_bytes() - before)


class Runner:
    """The calls of one case: forward without gradients, and forward with backward."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.leaves = [t for t in case.tensors if t.requires_grad]
        self.upstream: list[torch.Tensor] | None = None

    def _results(self, body: Callable) -> list[torch.Tensor]:
        cast = self.case.autocast and self.dtype != torch.float32
        with torch.autocast(DEVICE_TYPE, self.dtype) if cast else contextlib.nullcontext():
            out = body(*self.case.tensors)
        return list(out) if isinstance(out, tuple) else [out]

    def forward(self, body: Callable) -> None:
        """Without gradients."""
        with torch.no_grad():
            self._results(body)

    def both(self, body: Callable) -> list[torch.Tensor]:
        """Results and gradients, for an upstream gradient that is the same for all bodies."""
        results = self._results(body)
        if self.upstream is None:
            generator = torch.Generator(DEVICE_TYPE).manual_seed(0)
            self.upstream = [
                torch.randn(r.shape, generator=generator, device=DEVICE_TYPE).to(r.dtype)
                for r in results
            ]
        up = [u.to(r.dtype) for u, r in zip(self.upstream, results, strict=True)]
        return [*results, *torch.autograd.grad(results, self.leaves, up)]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest distance of a tensor from the truth, relative to the truth's norm, or to a
    thousandth of the largest norm: a gradient that cancels to zero is rounding alone.
    """
    pairs = [(f.detach().float(), t.detach().float()) for f, t in zip(found, truth, strict=True)]
    least = max(float(t.norm()) for _, t in pairs) / 1e3
    return max(float((f - t).norm()) / max(float(t.norm()), least) for f, t in pairs)


def measure(case: Case, at: Shapes, rates: dict, asked: list[str], repeats: int) -> dict:
    """One class: for each body seconds, share of the floor, error, memory; or why it failed."""
    runner, bodies, rows = Runner(case, at.dtype), dict(case.bodies), {}
    truth = None
    for number, (name, body) in enumerate(case.bodies.items()):
        if number and asked and name not in asked:
            del bodies[name]
            continue
        began = time.perf_counter()
        try:
            rows[name] = {}
            if case.backward:
                found = runner.both(body)
                truth = truth or found
                rows[name]["error"] = error(found, truth)
                del found
            call = runner.both if case.backward else runner.forward
            rows[name]["first_s"] = time.perf_counter() - began
            rows[name]["peak_bytes"] = memory_of(lambda c=call, b=body: c(b))
        except Exception as failure:  # a body that this device lacks is a row, not the end
            told = str(failure).strip().splitlines() or [""]
            rows[name] = {"failed": f"{type(failure).__name__}: {told[0]}"[:200]}
            del bodies[name]
    kinds = {"forward": runner.forward} | ({"both": runner.both} if case.backward else {})
    floors = {}
    for index, (kind, run) in enumerate(kinds.items()):
        by_bytes = case.moved[index] / rates["copy"]["median"]
        by_flops = case.flops[index] / rates["matmul"]["median"]
        floors[kind] = {
            "seconds": max(by_bytes, by_flops),
            "of": ("copy", "matmul")[by_flops > by_bytes],
        }
        calls = {n: (lambda run=run, body=body: run(body)) for n, body in bodies.items()}
        for name, taken in timed(calls, repeats).items():
            rows[name][kind] = {
                "seconds": taken,
                "share": floors[kind]["seconds"] / taken["median"],
            }
    return {"bytes": case.moved, "flops": case.flops, "floor": floors, "bodies": rows}


def fastest(found: dict[str, dict], allowed: tuple[str, ...]) -> dict[str, str]:
    """Kernel -> the choice of [kernels] with the least forward and backward; plain torch unless
    another takes less than `SLOWER` of its time.
    """
    best = {}
    for kernel in KERNELS:
        rows = found.get(CLASS_OF[kernel], {}).get("bodies", {})
        taken = {n: r["both"]["seconds"]["median"] for n, r in rows.items() if "both" in r}
        taken = {n: s for n, s in taken.items() if n in allowed}
        least = min(taken, key=taken.get, default="torch")
        plain = taken.get("torch", float("inf"))
        best[kernel] = least if taken and taken[least] < SLOWER * plain else "torch"
    return best


def table(found: dict[str, dict]) -> str:
    """Milliseconds, share of the floor and memory of every body."""
    times = f"{'forward ms':>11} {'share':>6} {'both ms':>11} {'share':>6}"
    lines = [f"{'':28} {times} {'peak MiB':>9} {'error':>8}"]
    for name, result in found.items():
        told = ", ".join(
            f"{k} {v['seconds'] * 1e3:.3f} ms by {v['of']}" for k, v in result["floor"].items()
        )
        lines.append(f"{name}  (floor: {told})")
        for body, row in result["bodies"].items():
            if "failed" in row:
                lines.append(f"  {body:26} {row['failed']}")
                continue
            cells = [_cell(row.get(kind)) for kind in ("forward", "both")]
            peak = row["peak_bytes"]
            memory = "" if peak is None else f"{peak / 2**20:.1f}"
            off = f"{row['error']:.1e}" if "error" in row else ""
            lines.append(f"  {body:26} {' '.join(cells)} {memory:>9} {off:>8}")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return f"{'':11} {'':6}"
    return f"{row['seconds']['median'] * 1e3:11.3f} {row['share']:6.0%}"


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints, writes; returns what it wrote."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("toml", nargs="?", default=str(RECIPES / DEFAULT[DEVICE_TYPE]))
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--classes", nargs="*", default=[], help="only these, by their first word")
    parser.add_argument(
        "--choices", nargs="*", default=[], help="besides the first, only these bodies"
    )
    parser.add_argument("--out", type=Path)
    asked, options = parser.parse_known_args(argv)
    options = [*(TINY if asked.tiny else []), *options]
    job = parse([f"--job.config_file={asked.toml}", *BARE, *options])
    dtype = getattr(torch, asked.dtype or job.training.mixed_precision_param)
    at = Shapes(
        resolved_args(job),
        job.training.local_batch_size,
        job.training.seq_len,
        torch.device(DEVICE_TYPE),
        dtype,
    )
    torch.manual_seed(0)
    # Bodies that share their code are compiled many times: past the limit they would run eagerly.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    rates = ceilings(dtype, asked.tiny, asked.repeats)
    found = {}
    for build in cases(at):
        if not asked.classes or build.name.split()[0].strip(",") in asked.classes:
            found[build.name] = measure(build, at, rates, asked.choices, asked.repeats)
    told = {k: f"{v['median']:.3e}" for k, v in rates.items()}
    print(table(found))
    print(f"ceilings: {told['matmul']} FLOP/s ({dtype}), {told['copy']} bytes/s")
    everything = ("torch", "compile", "liger")
    result = {
        "device_type": DEVICE_TYPE,
        "toml": Path(asked.toml).name,
        "options": options,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": at.batch,
        "seq_len": at.seq_len,
        "ceilings": rates,
        "classes": found,
        "fastest": fastest(found, everything),
        "auto": fastest(found, DEPENDABLE[DEVICE_TYPE]),
        **facts(),
    }
    print(f"fastest: {result['fastest']}; auto: {result['auto']}")
    if asked.out:
        write_json(asked.out, result)
    return result


if __name__ == "__main__":
    main()
