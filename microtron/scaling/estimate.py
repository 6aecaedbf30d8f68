"""``microtron estimate``: what a run will need and move, before a GPU is rented.

    microtron estimate train_configs/gpt_oss_656m.toml --ngpu 8 --device h100
    microtron estimate train_configs/gpt_oss_20b_64gpu.toml --set training.seq_len=16384

Nothing is allocated: the numbers are formulas (`memory.py`, `activations.py`, `communication.py`,
`floor.py`), and the layout is built once on torch's fake backend (`dryrun.py`), which refuses what
cannot be built and holds the parameter count to the formulas.
"""

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated

from microtron.accelerator import DEVICE_TYPE

import tyro
from torchtitan.config import JobConfig

from microtron.errors import UserError
from microtron.model import accounting
from microtron.parallel.layout import OPTIONS
from microtron.parse import parse, read_toml
from microtron.scaling import devices, dryrun, table
from microtron.scaling.communication import bubble, traffic_of
from microtron.scaling.floor import floor_of
from microtron.scaling.memory import memory_of
from microtron.scaling.plan import Plan, plan_of


def estimate(
    toml: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TOML")],
    ngpu: int | None = None,
    device: str = "",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),  # noqa: A002
    stages: bool = False,
    dry_run: bool = True,
    json: Path | None = None,
) -> None:
    """Tells what a run needs on each rank: memory, communication, bubble, FLOPs, least time.

    Args:
        toml: The run, as ./run_train.sh takes it.
        ngpu: Ranks. Default: the product of the degrees in the TOML.
        device: a100, h100, h200, b200, l40s, ... adds the floor of the step time; cpu counts what
            CPU ranks keep. Default: a CUDA device of no known speed, bf16.
        set: An option of the run, as section.key=value; may be repeated.
        stages: Show every pipeline rank, not only the one that needs most.
        dry_run: Build the layout on torch's fake backend and compare the parameters.
        json: Also write the numbers there.

    Raises:
        UserError: the TOML, an option or the device is wrong, or the layout cannot run.
    """
    known = None if device in ("", "cpu") else devices.device(device)
    job = load(toml, list(set), device == "cpu")
    if ngpu is not None and ngpu < 1:
        raise UserError(f"--ngpu {ngpu} is no number of ranks: give 1 or more, or leave it out")
    plan = plan_of(
        job, degrees(job) if ngpu is None else ngpu, "cpu" if device == "cpu" else "cuda"
    )
    built = dryrun.compare(job, plan) if dry_run else []
    found = {"toml": str(toml), "set": list(set)} | numbers(plan, known)
    found["built_as_ranks"] = built
    print(table.text(found, plan, stages))
    if json is not None:
        try:
            json.write_text(jsonlib.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write --json {json}: {error.strerror}; name a file in a folder that exists"
            ) from None


def load(toml: Path, options: list[str], cpu: bool) -> JobConfig:
    """The checked job, resolved for the device that is asked about and not for this machine.

    Raises:
        UserError: see `parse`; an option that is not section.key=value.
    """
    for option in options:
        if "=" not in option:
            raise UserError(f"--set {option} is not of the form section.key=value")
    given = read_toml(str(toml))
    named = {option.partition("=")[0] for option in options}
    forced = []
    precision = given.get("training", {}).get("mixed_precision_param", "auto")
    if precision == "auto" and "training.mixed_precision_param" not in named:
        forced.append(f"training.mixed_precision_param={'float32' if cpu else 'bfloat16'}")
    backend = given.get("model", {}).get("args", {}).get("attn_backend", "auto")
    if backend == "flex" and not cpu and DEVICE_TYPE != "cuda":  # refused here; auto means it
        forced.append("model.args.attn_backend=auto")
    return parse([f"--job.config_file={toml}", *(f"--{o}" for o in [*forced, *options])])


def degrees(job: JobConfig) -> int:
    """Ranks that the degrees make; open data shards (-1) count once."""
    ranks = 1
    for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp"):
        ranks *= max(1, getattr(job.parallelism, OPTIONS[name]))
    return ranks


def numbers(plan: Plan, device: devices.Device | None) -> dict[str, object]:
    """All that is told, as one JSON object: bytes, FLOPs, seconds. Ranks: the first of each
    pipeline rank; those beside it differ by rounding alone.
    """
    parameters = accounting.count_parameters(plan.args)
    flops = accounting.flops_per_token(plan.args, plan.seq_len)
    ranks = []
    for rank in plan.telling_ranks():
        memory = memory_of(plan, rank)
        row: dict[str, object] = {
            "rank": rank,
            "layers": [list(s.layers) for s in plan.stages_of(plan.place(rank).pp)],
            "memory_bytes": dataclasses.asdict(memory)
            | {"static": memory.static, "peak": memory.peak},
            "sent_bytes_a_step": [dataclasses.asdict(t) for t in traffic_of(plan, rank)],
        }
        if device is not None:
            floor = floor_of(plan, rank, device)
            row["floor_s"] = dataclasses.asdict(floor) | {"step": floor.step}
        ranks.append(row)
    return {
        "ranks": plan.layout.world,
        "layout": dataclasses.asdict(plan.layout),
        "parameters": parameters.total,
        "parameters_active": parameters.active,
        "tokens_a_step": plan.step_tokens,
        "flops_a_token": sum(flops.values()),
        "flops_a_token_by_part": flops,
        "bubble": bubble(plan),
        "device": dataclasses.asdict(device) if device else None,
        "by_rank": ranks,
    }
