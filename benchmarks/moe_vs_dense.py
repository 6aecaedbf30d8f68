"""A mixture of experts against its dense twin on a CPU: validation loss against seconds and FLOPs.

    python benchmarks/moe_vs_dense.py --out benchmarks/results/moe_vs_dense.json --pairs

The twins share everything but the feed-forward: top-k experts of the mixture are as wide together
as the dense one, so a token costs both the same FLOPs (the router comes on top, and is reported).
Both are trained on the standard library's bytes by the real Trainer, a process a run, with the same
seeds and schedule (constant after the warm-up, a linear decay at the end). The learning rate is
chosen for each by shorter runs of the whole schedule. Against FLOPs both see the same tokens;
against seconds the dense twin takes as many more steps as fit into the mixture's time (by the speed
of the shorter runs), so that both are through with their schedule at the same second.

Runs take turns, or go in pairs, one a core, twins together (``--pairs``), so that a slow minute
hits both. Seconds are those of training: validation is left out.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import facts, summary, write_json  # noqa: E402
from moe_vs_dense_curves import compare, plot, told  # noqa: E402

from microtron.errors import UserError  # noqa: E402
from microtron.model.accounting import count_parameters, flops_per_token  # noqa: E402
from microtron.model.args import ModelArgs  # noqa: E402

SHAPE = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "window": 64}
SHAPE |= {"vocab_size": 264, "num_experts": 8, "top_k": 2, "expert_dim": 128}
TINY = SHAPE | {"dim": 32, "n_layers": 1, "n_heads": 2, "head_dim": 16, "expert_dim": 16}
MOST_APART = 0.02  # of the twins' FLOPs
SEED, VALIDATIONS = 1337, 16


@dataclass(frozen=True)
class Plan:
    """What all runs share; lengths in steps."""

    shape: dict[str, int]
    steps: int
    sweep_steps: int
    rates: tuple[float, ...]
    seeds: int
    seq_len: int
    batch: int
    val_tokens: int

    def fields(self, model: str) -> dict[str, int]:
        """[model.args] of ``moe`` or ``dense``."""
        if model == "moe":
            return self.shape
        wide = self.shape["top_k"] * self.shape["expert_dim"]
        return {**self.shape, "num_experts": 0, "hidden_dim": wide}


@dataclass(frozen=True)
class Run:
    """One training run; ``core`` None: wherever the system puts it."""

    arm: str  # moe, dense, or dense_longer: as many seconds as moe
    seed: int
    lr: float
    steps: int
    core: int | None = None
    validations: int = VALIDATIONS

    @property
    def model(self) -> str:
        """The architecture."""
        return self.arm.partition("_")[0]


PLAN = Plan(SHAPE, 1000, 250, (1.5e-3, 3e-3, 6e-3), 3, 256, 8, 65536)
TINY_PLAN = Plan(TINY, 8, 4, (3e-3, 6e-3), 2, 32, 4, 512)


def twins(plan: Plan) -> dict[str, dict[str, float]]:
    """Parameters and training FLOPs a token of both.

    Raises:
        UserError: their FLOPs without the router differ by more than MOST_APART.
    """
    told, products = {}, {}
    for model in ("moe", "dense"):
        args = ModelArgs(**plan.fields(model))
        parts, counted = flops_per_token(args, plan.seq_len), count_parameters(args)
        products[model] = sum(parts.values()) - parts["router"]
        told[model] = {
            "parameters": counted.total,
            "parameters_active": counted.active,
            "flops_per_token": sum(parts.values()),
            "router_flops_per_token": parts["router"],
        }
    if abs(products["moe"] / products["dense"] - 1) > MOST_APART:
        raise UserError(
            f"the twins need {products['moe']:,.0f} and {products['dense']:,.0f} FLOPs a token: "
            "give the dense one hidden_dim = top_k * expert_dim"
        )
    return told


def command(run: Run, plan: Plan, data: Path, folder: Path) -> list[str]:
    """The command line of a run, as a person would give it."""
    every = max(1, run.steps // run.validations)
    options = {
        "job.dump_folder": folder / "dump",
        "data.dirs": data,
        "data.source": "stdlib",
        "data.tokenizer": "byte",
        "debug.seed": run.seed,
        "training.steps": run.steps,
        "training.seq_len": plan.seq_len,
        "training.local_batch_size": plan.batch,
        "training.global_batch_size": plan.batch,
        "optimizer.lr": run.lr,
        "optimizer.weight_decay": 0.1,
        "lr_scheduler.warmup_steps": max(1, run.steps // 8),
        "lr_scheduler.decay_ratio": 0.2,
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.min_lr_factor": 0.05,
        "validation.freq": every,
        "validation.local_batch_size": 32,
        "validation.val_tokens": plan.val_tokens,
        "metrics.log_freq": every,
        **{f"model.args.{name}": value for name, value in plan.fields(run.model).items()},
    }
    pinned = [] if run.core is None else ["taskset", "--cpu-list", str(run.core)]
    flags = ["--validation.enable", "--checkpoint.no-enable"]
    return [
        *(*pinned, sys.executable, "-m", "microtron.train", *flags),
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def curve_of(lines: Iterable[str], flops: float) -> list[dict[str, float]]:
    """A point a validation, from the lines of metrics.jsonl; ``flops`` are those of a token."""
    rows = [json.loads(line) for line in lines]
    trained = {row["step"]: row for row in rows if "loss" in row}
    points = []
    for row in rows:
        if "val_loss" in row:
            at = trained[row["step"]]
            where = {"step": row["step"], "tokens": at["tokens"], "seconds": at["time_s"]}
            where["flops"] = flops * at["tokens"]
            points.append({**where, "val_loss": row["val_loss"], "val_bpb": row["val_bpb"]})
    return points


def start(argv: list[str], folder: Path) -> subprocess.Popen:
    """A process whose console goes to a file in ``folder``."""
    with (folder / "console").open("w") as console:
        return subprocess.Popen(argv, cwd=folder, stdout=console, stderr=subprocess.STDOUT)


def together(
    runs: list[Run], plan: Plan, data: Path, flops: dict[str, float]
) -> list[dict[str, object]]:
    """Trains ``runs`` at the same time, each in a folder of its own beside the data.

    Raises:
        UserError: one failed.
    """
    folders = [Path(tempfile.mkdtemp(dir=data.parent)) for _ in runs]
    processes = []
    for run, folder in zip(runs, folders, strict=True):
        processes.append(start(command(run, plan, data, folder), folder))
    codes = [process.wait() for process in processes]
    rows = []
    for run, folder, code in zip(runs, folders, codes, strict=True):
        if code:
            last = (folder / "console").read_text().strip().splitlines()[-1:]
            raise UserError(f"a run of {run.arm} ended with code {code}: {' '.join(last)}")
        lines = (folder / "dump" / "metrics.jsonl").read_text().splitlines()
        curve = curve_of(lines, flops[run.model])
        told = {"arm": run.arm, "seed": run.seed, "lr": run.lr, "steps": run.steps}
        rows.append({**told, "core": run.core, "curve": curve})
        end = curve[-1]
        print(
            f"{run.arm:12} seed {run.seed} lr {run.lr:g}: {end['val_loss']:.4f} after "
            f"{end['seconds']:.1f} s, {end['tokens']:,} tokens",
            flush=True,
        )
    return rows


def train_all(
    runs: list[Run], plan: Plan, data: Path, flops: dict[str, float], cores: list[int]
) -> list[dict[str, object]]:
    """Results in the order of ``runs``: one after the other, or with two cores in pairs that swap
    cores from pair to pair.
    """
    if not cores:
        return [row for run in runs for row in together([run], plan, data, flops)]
    rows = []
    for number, start in enumerate(range(0, len(runs), 2)):
        placed = zip(runs[start : start + 2], cores[:: -1 if number % 2 else 1], strict=False)
        rows += together([replace(run, core=core) for run, core in placed], plan, data, flops)
    return rows


def of(rows: list[dict[str, object]], arm: str) -> list[dict[str, object]]:
    """The runs of one arm."""
    return [row for row in rows if row["arm"] == arm]


def choose(swept: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """Of each model the rate with the lowest loss at the end, and whether it lies at the edge of
    the rates tried, so that a better one may lie beyond.
    """
    chosen = {}
    for model in ("moe", "dense"):
        losses = {r["lr"]: r["curve"][-1]["val_loss"] for r in of(swept, model)}
        best = min(losses, key=losses.__getitem__)
        edge = best in (min(losses), max(losses))
        chosen[model] = {"lr": best, "at_the_edge": edge, "val_loss": losses}
    return chosen


def equal_seconds(swept: list[dict[str, object]], steps: int) -> int:
    """Steps of the dense twin that take as long as ``steps`` of the mixture, by the medians."""
    seconds = {
        arm: statistics.median(r["curve"][-1]["seconds"] / r["steps"] for r in of(swept, arm))
        for arm in ("moe", "dense")
    }
    return max(1, round(steps * seconds["moe"] / seconds["dense"]))


def ends(rows: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """Where each arm ended: median, least and most over seeds."""
    told = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        last = [row["curve"][-1] for row in of(rows, arm)]
        told[arm] = {
            name: summary([end[name] for end in last])
            for name in ("val_loss", "val_bpb", "seconds", "tokens", "flops")
        }
        told[arm]["tokens_per_s"] = summary([end["tokens"] / end["seconds"] for end in last])
    return told


def measure(plan: Plan, data: Path, cores: list[int]) -> dict[str, object]:
    """Sweeps, trains all arms, compares. ``data``: the prepared corpus."""
    costs = twins(plan)
    flops = {model: cost["flops_per_token"] for model, cost in costs.items()}
    both = ("moe", "dense")
    sweep = [
        Run(model, SEED, lr, plan.sweep_steps, validations=1) for lr in plan.rates for model in both
    ]
    swept = train_all(sweep, plan, data, flops, cores)
    chosen = choose(swept)
    seeds = range(SEED, SEED + plan.seeds)
    length = {"moe": plan.steps, "dense_longer": equal_seconds(swept, plan.steps)}
    runs = [
        Run(arm, seed, chosen[arm.partition("_")[0]]["lr"], steps)
        for seed in seeds
        for arm, steps in length.items()
    ]
    runs += [Run("dense", seed, chosen["dense"]["lr"], plan.steps) for seed in seeds]
    rows = train_all(runs, plan, data, flops, cores)
    peer = {"seconds": "dense_longer", "flops": "dense", "tokens": "dense"}
    compared = {a: compare(of(rows, "moe"), of(rows, arm), a) for a, arm in peer.items()}
    return {
        "plan": asdict(plan),
        "twins": costs,
        "cores": cores,
        "sweep": chosen,
        "swept": swept,
        "ends": ends(rows),
        "compared": compared,
        "runs": rows,
    }


def table(result: dict[str, object]) -> str:
    """The arms and the comparisons, as text."""
    lines = [f"{'arm':14}{'lr':>8}{'loss':>9}{'bpb':>9}{'seconds':>9}{'tokens':>12}{'tok/s':>9}"]
    for arm, end in result["ends"].items():
        lr = result["sweep"][arm.partition("_")[0]]["lr"]
        middle = {name: row["median"] for name, row in end.items()}
        lines.append(
            f"{arm:14}{lr:8g}{middle['val_loss']:9.4f}{middle['val_bpb']:9.4f}"
            f"{middle['seconds']:9.1f}{middle['tokens']:12,.0f}{middle['tokens_per_s']:9,.0f}"
        )
    for model, chosen in result["sweep"].items():
        if chosen["at_the_edge"]:
            lines.append(f"{model}: {chosen['lr']:g} is at the edge of the rates tried")
    lines += [f"against {axis}: {told(found, axis)}" for axis, found in result["compared"].items()]
    return "\n".join(lines)


def cores_for_pairs() -> list[int]:
    """Two cores to pin runs to. Raises: UserError, this process has only one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError(f"--pairs needs two cores and this process has {cores}: leave it out")
    return cores[:2]


def main(argv: list[str] | None = None) -> None:
    """Measures or redraws; prints, writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help=f"of a run (default {PLAN.steps})")
    parser.add_argument("--sweep-steps", type=int, help=f"default {PLAN.sweep_steps}")
    parser.add_argument("--sweep", type=float, nargs="+", metavar="LR", help=f"{PLAN.rates}")
    parser.add_argument("--seeds", type=int, help=f"runs of each arm (default {PLAN.seeds})")
    parser.add_argument("--pairs", action="store_true", help="two runs at a time, one a core")
    parser.add_argument("--tiny", action="store_true", help="seconds rather than an hour")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="only draw again what is there")
    parser.add_argument("--out", type=Path, help="JSON; the PNG is put beside it")
    asked = parser.parse_args(argv)
    if (asked.out or asked.redraw) and importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: pip install -e '.[plot]'")
    if asked.redraw:
        plot(json.loads(asked.redraw.read_text()), asked.redraw.with_suffix(".png"))
        return
    given = {"steps": asked.steps, "sweep_steps": asked.sweep_steps, "seeds": asked.seeds}
    given["rates"] = tuple(asked.sweep) if asked.sweep else None
    plan = TINY_PLAN if asked.tiny else PLAN
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    with tempfile.TemporaryDirectory() as work:
        cores, data = cores_for_pairs() if asked.pairs else [], Path(work) / "data"
        prepare = [sys.executable, "-m", "microtron.cli", "prepare", "--source", "stdlib"]
        subprocess.run([*prepare, "--tokenizer", "byte", "--out", str(data)], check=True)
        result = measure(plan, data, cores)
    print(table(result))
    if asked.out:
        write_json(asked.out, {**result, **facts()})
        plot(result, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
