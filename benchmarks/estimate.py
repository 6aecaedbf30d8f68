"""The estimate against real runs: memory and bytes sent, predicted and measured.

    python benchmarks/estimate.py --out benchmarks/results/estimate.json

Every case is the real Trainer on real ranks (processes and gloo on a CPU, a process for each CUDA
device), two steps of a small model on random tokens. Parameters and optimizer states are summed
after a step; activations are what is alive when a forward ends, at most over the step (on CUDA what
the allocator then holds beyond what it held before the step, gathered weights included); bytes sent
are counted collective by collective (on a CPU).
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from microtron.accelerator import DEVICE_TYPE  # noqa: E402

import torch  # noqa: E402
from common import facts, write_json  # noqa: E402

from microtron.certificate import layouts  # noqa: E402
from microtron.parse import parse  # noqa: E402
from microtron.scaling.communication import traffic_of  # noqa: E402
from microtron.scaling.measure import Watch, standing_bytes  # noqa: E402
from microtron.scaling.memory import memory_of  # noqa: E402
from microtron.scaling.plan import plan_of  # noqa: E402
from microtron.spec import register  # noqa: E402
from microtron.train import Trainer  # noqa: E402

MODEL = (
    "--model.args.dim=64",
    "--model.args.n_layers=4",
    "--model.args.n_heads=8",
    "--model.args.n_kv_heads=4",
    "--model.args.head_dim=16",
    "--model.args.vocab_size=512",
    "--model.args.num_experts=8",
    "--model.args.expert_dim=96",
    "--model.args.hidden_dim=192",
    "--model.args.window=32",
    "--training.seq_len=128",
    "--training.steps=2",
    "--data.mock",
    "--activation_checkpoint.selective_ac_option=op",
)
PATIENCE_S = 120
ON_CUDA = (
    "--model.args.dim=512",
    "--model.args.n_layers=8",
    "--model.args.head_dim=64",
    "--model.args.vocab_size=16384",
    "--model.args.expert_dim=512",
    "--model.args.hidden_dim=2048",
    "--model.args.window=128",
    "--training.seq_len=2048",
)
DENSE = "--model.args.num_experts=0"
GPT2 = (*layouts.GPT2, "--model.args.max_positions=2048")
LLAMA = layouts.LLAMA
FULL, SELECTIVE = (f"--activation_checkpoint.mode={m}" for m in ("full", "selective"))
SCHEDULE = "--parallelism.pipeline_parallel_schedule="
LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble")
WINDOW, FULL_ATTENTION = (f"--model.args.window_pattern={p}" for p in "SL")
SHORT = {
    "ddp": "data_parallel_replicate_degree",
    "fsdp": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}
# name, degrees, sequences a rank, further options
CASES: list[tuple[str, dict[str, int], int, tuple[str, ...]]] = [
    ("moe", {}, 4, ()),
    ("moe, selective", {}, 4, (SELECTIVE,)),
    ("moe, full", {}, 4, (FULL,)),
    ("dense", {}, 4, (DENSE,)),
    ("dense, selective", {}, 4, (DENSE, SELECTIVE)),
    ("dense, full", {}, 4, (DENSE, FULL)),
    ("gpt2", {}, 4, GPT2),
    ("gpt2, selective", {}, 4, (*GPT2, SELECTIVE)),
    ("llama", {}, 4, LLAMA),
    ("llama, selective", {}, 4, (*LLAMA, SELECTIVE)),
    ("windows only", {}, 4, (WINDOW,)),
    ("full attention only", {}, 4, (FULL_ATTENTION,)),
    ("sdpa", {}, 4, ("--model.args.attn_backend=sdpa",)),
    ("eager", {}, 4, ("--model.args.attn_backend=eager",)),
    ("experts in a loop", {}, 4, ("--model.args.experts_backend=loop",)),
    ("documents apart", {}, 4, ("--data.document_mask", "--data.eot_id=3")),
    ("ddp2", {"ddp": 2}, 4, ()),
    ("fsdp2", {"fsdp": 2}, 4, ()),
    ("fsdp2, selective", {"fsdp": 2}, 4, (SELECTIVE,)),
    ("fsdp2, never reshard", {"fsdp": 2}, 4, ("--parallelism.fsdp_reshard_after_forward=never",)),
    ("hsdp 2x2", {"ddp": 2, "fsdp": 2}, 2, ()),
    ("tp2", {"tp": 2}, 4, ()),
    ("tp2, full", {"tp": 2}, 4, (FULL,)),
    ("tp2, selective", {"tp": 2}, 4, (SELECTIVE,)),
    ("tp2, dense", {"tp": 2}, 4, (DENSE,)),
    ("cp2", {"cp": 2}, 4, ()),
    ("cp4, 2 kv heads", {"cp": 4}, 4, ("--model.args.n_kv_heads=2",)),
    ("cp2, selective", {"cp": 2}, 4, (SELECTIVE,)),
    ("ep2", {"fsdp": 2, "ep": 2}, 4, ()),
    ("ep2, full", {"fsdp": 2, "ep": 2}, 4, (FULL,)),
    ("tp2 x ep2, etp2", {"fsdp": 2, "tp": 2, "ep": 2, "etp": 2}, 4, ()),
    ("pp2 1F1B", {"pp": 2}, 8, ()),
    ("pp2 GPipe", {"pp": 2}, 8, (f"{SCHEDULE}GPipe",)),
    *((f"pp2 {name}", {"pp": 2}, 8, (SCHEDULE + name,)) for name in LOOPED),
    ("pp2 x tp2, full", {"pp": 2, "tp": 2}, 8, (FULL,)),
    ("pp2 x fsdp2", {"pp": 2, "fsdp": 2}, 8, ()),
    ("fsdp2 x tp2", {"fsdp": 2, "tp": 2}, 4, ()),
    ("tp2, gpt2", {"tp": 2}, 4, GPT2),
    ("cp2, gpt2", {"cp": 2}, 4, GPT2),
    ("tp2, llama", {"tp": 2}, 4, LLAMA),
]


def argv_of(case: tuple, folder: Path) -> tuple[list[str], int]:
    """The command line of a case, and its ranks."""
    _, degrees, local, extra = case
    ranks = 1
    for name in ("ddp", "fsdp", "tp", "pp", "cp"):
        ranks *= degrees.get(name, 1)
    layout = [f"--parallelism.{SHORT[n]}={v}" for n, v in {"fsdp": 1, **degrees}.items()]
    batch = f"--training.local_batch_size={local}"
    model = [*MODEL, *(ON_CUDA if DEVICE_TYPE == "cuda" else ())]
    return [*model, batch, *layout, *extra, f"--job.dump_folder={folder}"], ranks


class Measured(Trainer):
    """A Trainer whose forwards are looked at as they end."""

    def __init__(self, job: object) -> None:
        super().__init__(job)
        self.watch, self.activations, self.before = Watch(), 0, 0
        for part in self.model_parts:
            part.register_forward_hook(self._look)

    def two_steps(self) -> None:
        """The first makes optimizer states and buffers, the second is what is measured."""
        batches = self.batch_generator(self.dataloader)
        for self.step in (1, 2):
            self.watch.sent.clear()
            if DEVICE_TYPE == "cuda":
                self.optimizers.zero_grad()
                torch.cuda.reset_peak_memory_stats()
                self.before = torch.cuda.memory_allocated()
            self.train_step(batches)

    def _look(self, *unused: object) -> None:
        if self.step < 2:
            return
        if DEVICE_TYPE == "cuda":
            kept = torch.cuda.memory_allocated() - self.before
        else:
            kept = self.watch.kept_bytes(self.model_parts, self.optimizers)
        self.activations = max(self.activations, kept)


def measure(argv: list[str], ranks: int, rank: int) -> dict[str, object]:
    """One rank's row: predicted and measured bytes."""
    job = parse(argv)
    plan = plan_of(job, ranks, DEVICE_TYPE)
    memory, cuda = memory_of(plan, rank), DEVICE_TYPE == "cuda"
    register()
    trainer = Measured(job)
    try:
        # Compiled attention cannot be watched; on CUDA the allocator is asked.
        with contextlib.nullcontext() if cuda else trainer.watch:
            trainer.two_steps()
        standing = standing_bytes(trainer.parameters, trainer.optimizers)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
    finally:
        trainer.close()
    kept = memory.activations + (memory.gathered_weights if cuda else 0)
    row = {
        "rank": rank,
        "parameters_optimizer": _pair(
            memory.parameters + memory.optimizer, standing["parameters"] + standing["optimizer"]
        ),
        "gradients": _pair(memory.gradients, standing["gradients"]),
        "activations": _pair(kept, trainer.activations),
    }
    if cuda:
        return row | {"peak": _pair(memory.peak, peak)}
    return row | {"sent": _sent(traffic_of(plan, rank), trainer.watch)}


def _pair(predicted: float, measured: float) -> dict[str, float | None]:
    ratio = predicted / measured if measured else 1.0 if not predicted else None
    return {"predicted": predicted, "measured": measured, "ratio": ratio}


def _sent(told: list, watch: Watch) -> dict[str, dict[str, float]]:
    """By collective and number of ranks."""
    predicted: dict[str, float] = {}
    for item in told:
        kind = "all-reduce" if item.kind == "counts" else item.kind.partition(" ")[2]
        key = f"{kind} over {item.ranks}"
        predicted[key] = predicted.get(key, 0) + item.sent_bytes
    measured: dict[str, float] = {}
    for (kind, ranks), size in watch.sent.items():
        if size:
            key = f"{kind} over {len(ranks)}"
            measured[key] = measured.get(key, 0) + size
    keys = sorted(predicted.keys() | measured.keys())
    return {k: _pair(predicted.get(k, 0), measured.get(k, 0)) for k in keys}


def _rank(rank: int, ranks: int, port: int, argv: list[str], results: object) -> None:
    """The main function of a rank's process."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        results.put(measure(argv, ranks, rank))
    except BaseException as error:
        results.put({"rank": rank, "error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        os._exit(0)


def run(case: tuple) -> list[dict[str, object]]:
    """Rows of all ranks of a case."""
    with tempfile.TemporaryDirectory() as folder:
        argv, ranks = argv_of(case, Path(folder))
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["microtron.scaling.estimate", "microtron.train"])
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(rank, ranks, port, argv, results))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        rows: list[dict[str, object]] = []
        end = time.monotonic() + PATIENCE_S
        while len(rows) < ranks and not (rows and "error" in rows[-1]):
            if not results.empty():
                rows.append(results.get())
            elif time.monotonic() > end:
                rows.append({"error": f"no result within {PATIENCE_S} s"})
            else:
                time.sleep(0.01)
        for process in processes:
            process.kill()
            process.join()
    if "error" in rows[-1]:
        raise RuntimeError(f"{case[0]}: {rows[-1]}")
    return sorted(rows, key=lambda r: r["rank"])


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names begin so")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for case in CASES:
        name, degrees, _, extra = case
        if asked.only and not name.startswith(tuple(asked.only)):
            continue
        if DEVICE_TYPE == "cuda" and argv_of(case, Path())[1] > torch.cuda.device_count():
            continue
        rows = run(case)
        worst = max(rows, key=lambda r: abs(r["activations"]["ratio"] - 1))
        static = max(rows, key=lambda r: abs(r["parameters_optimizer"]["ratio"] - 1))
        print(
            f"{name:24} parameters + optimizer {static['parameters_optimizer']['ratio']:.4f}  "
            f"activations {worst['activations']['ratio']:.3f}"
        )
        for key, pair in rows[0].get("sent", {}).items():
            print(f"    {key:24} {pair['predicted']:12,.0f} {pair['measured']:12,.0f}")
        found.append({"case": name, "degrees": degrees, "options": extra, "ranks": rows})
    if asked.out:
        write_json(asked.out, {"rows": found, **facts()})


if __name__ == "__main__":
    main()
