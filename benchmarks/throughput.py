"""Training speed on one device: microtron, one optimisation after the other, against its peers.

    python benchmarks/throughput.py --out benchmarks/results/throughput.json --profile
    python benchmarks/throughput.py --only torchtitan --seq-len 2048 --repeats 1    # a part of it
    python benchmarks/throughput.py --tiny                                          # seconds, CPU

One recipe (gpt_oss_656m), bf16, random tokens, the tokens of a step and of a micro-batch held
constant over the sequence lengths. The candidates:

* microtron: the slow obvious path (eager attention, a loop over experts, all logits at once, one
  optimizer call a tensor), then one optimisation after the other until nothing is left out; and
  that with Liger's loss;
* its dense twin: one feed-forward as wide as the active experts;
* TorchTitan 0.2.2's gpt_oss and transformers' GptOssForCausalLM (`throughput_peers.py`).

Each is a process of its own with compiled code of its own, and they take turns for --repeats
rounds. MFU counts the same FLOPs for all of them: windows, causality, top-k (`accounting.py`). What
fails (out of memory, unsupported) is a row with its reason. Aimed at, by the fastest path: >= 50%
MFU; >= 1.5x TorchTitan; >= 2x transformers; tokens/s per active parameter >= 85% of the dense
twin's. Where time on the device is short, --only and --extend join several calls into one result.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import facts, summary, told_by, write_json  # noqa: E402
from throughput_peers import TRANSFORMERS, run_torchtitan, run_transformers  # noqa: E402
from throughput_step import Running, Work, measure, ours, profile, settings  # noqa: E402

Open = Callable[[Work], contextlib.AbstractContextManager[Running]]
ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "train_configs/gpt_oss_656m_1gpu.toml"
TINY = ["--model.args.n_layers=2", "--model.args.dim=64", "--model.args.expert_dim=64"]
TINY += ["--model.args.window=32"]
# What is added, without it, with it. {micro_tokens}: the loss of a micro-batch in one piece.
RUNGS = (
    ("attention kernel", "--model.args.attn_backend=eager", "--model.args.attn_backend=auto"),
    ("grouped GEMM", "--model.args.experts_backend=loop", "--model.args.experts_backend=auto"),
    (
        "chunked loss",
        "--model.args.loss_chunk_tokens={micro_tokens}",
        "--model.args.loss_chunk_tokens={chunk_tokens}",
    ),
    ("fused AdamW", "--optimizer.implementation=for-loop", "--optimizer.implementation=fused"),
    ("compiled blocks", "--compile.no-enable", "--compile.enable"),
    ("kernels", "{kernels_torch}", "{kernels_auto}"),
)


def rung_options(work: Work, added: int) -> tuple[str, ...]:
    """Options of the path with the first ``added`` optimisations."""
    from microtron.config import Kernels
    from microtron.model.args import ModelArgs

    names = [f.name for f in dataclasses.fields(Kernels)]
    told = {
        "micro_tokens": work.micro_tokens,
        "chunk_tokens": min(ModelArgs.loss_chunk_tokens, work.micro_tokens // 2),
        "kernels_torch": " ".join(f"--kernels.{n}=torch" for n in names),
        "kernels_auto": " ".join(f"--kernels.{n}=auto" for n in names),
    }
    chosen = [fast if i < added else slow for i, (_, slow, fast) in enumerate(RUNGS)]
    return tuple(o for options in chosen for o in options.format(**told).split())


def liger_options(work: Work) -> tuple[str, ...]:
    """The whole path with Liger's fused head and loss in place of ours, which goes by chunks."""
    return (*rung_options(work, len(RUNGS)), "--kernels.loss=liger")


def dense_options(work: Work) -> tuple[str, ...]:
    """The whole path for the dense twin: the same FLOPs a token but for the router's."""
    from microtron.config import resolved_args

    args = resolved_args(work.parsed())
    width = args.top_k * args.expert_dim
    dense = ("--model.args.num_experts=0", f"--model.args.hidden_dim={width}")
    return rung_options(work, len(RUNGS)) + dense


def candidates() -> dict[str, Open]:
    """Name -> how it is set up; microtron's rungs in their order."""
    found: dict[str, Open] = {}
    for added in range(len(RUNGS) + 1):
        name = f"microtron + {RUNGS[added - 1][0]}" if added else "microtron eager"
        found[name] = lambda work, added=added: ours(work, rung_options(work, added))
    found["microtron, loss by Liger"] = lambda work: ours(work, liger_options(work))
    found["dense twin"] = lambda work: ours(work, dense_options(work))
    for name, wrapped in (("torchtitan", False), ("torchtitan, FSDP2", True)):
        found[name] = partial(run_torchtitan, wrapped=wrapped)
    for attention, experts, weights, compiled in TRANSFORMERS:
        short = attention.split("/")[-1].removesuffix("_attention")
        name = f"transformers {short}, {experts}, {weights}{', compiled' if compiled else ''}"
        found[name] = partial(
            run_transformers,
            attention=attention,
            experts=experts,
            weights=weights,
            compiled=compiled,
        )
    return found


def run_here(name: str, work: Work, profile_to: Path | None) -> dict[str, object]:
    """One candidate in this process; ``failed`` holds one line where it cannot."""
    import torch

    torch.compiler.reset()  # --tiny has them all in one process
    try:
        with candidates()[name](work) as running:
            found = measure(running, work)
            if profile_to is not None:
                profile(running, profile_to)
            return found
    except Exception as error:
        return {"failed": one_line(error)}


def one_line(error: Exception) -> str:
    """Kind and first line of what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def run_apart(
    name: str, work: Work, profile_to: Path | None, cache: Path, timeout_s: float
) -> dict[str, object]:
    """One candidate in a process of its own, with compiled code under ``cache``."""
    given = {"name": name, "work": dataclasses.asdict(work)}
    given["profile_to"] = str(profile_to) if profile_to else None
    slug = cache / f"{work.seq_len}_{slug_of(name)}"
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(slug), "TRITON_CACHE_DIR": str(slug / "triton")}
    command = [sys.executable, __file__, "--one", json.dumps(given)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | kept, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout_s:.0f} s"}
    return told_by(done)


def slug_of(name: str) -> str:
    """A file's name for a candidate."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def rows_of(runs: dict[str, list[dict]], peak_flops: float) -> dict[str, dict[str, object]]:
    """Candidate -> its row, from what each round found. Seconds of the first step are those of the
    first round, in which nothing was compiled yet.
    """
    rows = {}
    for name, rounds in runs.items():
        whole = [r for r in rounds if "failed" not in r]
        if not whole:
            rows[name] = {"failed": rounds[0]["failed"]}
            continue
        speed = summary([s for r in whole for s in r["tokens_per_s"]])
        peaks = [r["peak_bytes"] for r in whole if r["peak_bytes"] is not None]
        rows[name] = {
            "tokens_per_s": speed,
            "mfu": whole[0]["flops_per_token"] * speed["median"] / peak_flops,
            "peak_bytes": max(peaks, default=None),
            "first_step_s": whole[0]["first_step_s"],
            "parameters_active": whole[0]["parameters_active"],
            "loss_is_finite": all(r["last_loss"] is not None for r in whole),
        }
    best = best_of(rows, "torchtitan", "transformers")
    for row in rows.values():
        if best is not None and "failed" not in row:
            speed = row["tokens_per_s"]["median"] / rows[best]["tokens_per_s"]["median"]
            row["ratio_to_best_peer"] = speed
    return rows


def best_of(rows: dict[str, dict], *kinds: str) -> str | None:
    """The fastest candidate whose name starts so."""
    ran = [n for n, row in rows.items() if n.startswith(kinds) and "failed" not in row]
    return max(ran, key=lambda n: rows[n]["tokens_per_s"]["median"], default=None)


def goals(rows: dict[str, dict]) -> list[dict[str, object]]:
    """What was aimed at, by the fastest path of ours; what could not be measured is not met."""
    us, dense = best_of(rows, "microtron"), "dense twin"

    def per_parameter(name: str) -> float:
        return rows[name]["tokens_per_s"]["median"] / rows[name]["parameters_active"]

    def against(peer: str | None) -> float | None:
        if us is None or peer is None:
            return None
        return rows[us]["tokens_per_s"]["median"] / rows[peer]["tokens_per_s"]["median"]

    titan, theirs = best_of(rows, "torchtitan"), best_of(rows, "transformers")
    twin = us is not None and best_of(rows, dense) is not None
    found = [
        ("MFU", None, rows[us]["mfu"] if us else None, 0.5),
        ("tokens/s to TorchTitan's", titan, against(titan), 1.5),
        ("tokens/s to transformers'", theirs, against(theirs), 2.0),
        (
            "tokens/s per active parameter to the dense twin's",
            dense,
            per_parameter(us) / per_parameter(dense) if twin else None,
            0.85,
        ),
    ]
    return [
        {"goal": goal, "ours": us, "peer": peer, "value": value, "at_least": least}
        | {"met": value is not None and value >= least}
        for goal, peer, value, least in found
    ]


def print_table(seq_len: str, rows: dict[str, dict]) -> None:
    """For people; the JSON has the same."""
    print(
        f"\nsequence {seq_len}\n{'candidate':56} {'tokens/s':>10} {'[least .. most]':>21}", end=""
    )
    print(f" {'MFU':>6} {'peak GiB':>8} {'1st step':>8} {'to peer':>8}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:56} {row['failed']}")
            continue
        speed, peak = row["tokens_per_s"], row["peak_bytes"]
        memory = f"{peak / 2**30:8.2f}" if peak is not None else f"{'-':>8}"
        ratio = row.get("ratio_to_best_peer")
        spread = f"[{speed['min']:,.0f} .. {speed['max']:,.0f}]"
        print(f"{name:56} {speed['median']:10,.0f} {spread:>21} {row['mfu']:6.1%} {memory}", end="")
        print(f" {row['first_step_s']:6.1f} s", f"{ratio:7.2f}x" if ratio else f"{'-':>8}", end="")
        print("" if row["loss_is_finite"] else "  its loss is not finite")


def print_goals(seq_len: str, found: list[dict]) -> None:
    """One line each."""
    for goal in found:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.2f}"
        verdict = "met" if goal["met"] else "not met"
        peer = f" ({goal['peer']})" if goal["peer"] else ""
        told = f"{goal['goal']}{peer}: {value}, at least {goal['at_least']}"
        print(f"sequence {seq_len}: {told}: {verdict}")


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left over for the run."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Other options (--section.key=value) are the run's, for every candidate.",
        allow_abbrev=False,
    )
    parser.add_argument("--toml", default=str(RECIPE))
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--micro-tokens", type=int, default=16384)
    parser.add_argument("--step-tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=4, help="steps of a timed block")
    parser.add_argument("--blocks", type=int, default=3, help="timed blocks of a process")
    parser.add_argument("--repeats", type=int, default=3, help="rounds: processes a candidate")
    parser.add_argument("--only", nargs="+", help="candidates whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="name the candidates and end")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--profile", action="store_true", help="kernel tables beside --out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--extend", action="store_true", help="add to what --out holds")
    parser.add_argument("--tiny", action="store_true", help="small, in this process, no compiler")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked, options = parser.parse_known_args(argv)
    if asked.tiny:
        asked.toml, asked.backend = str(ROOT / "train_configs/debug.toml"), "eager"
        asked.seq_len, asked.micro_tokens, asked.step_tokens = [64], 256, 512
        asked.steps, asked.blocks, asked.repeats = 1, 2, 1
        options = [*TINY, *options]
    if (asked.profile or asked.extend) and asked.out is None:
        parser.error("--profile and --extend need --out: name a file")
    return asked, options


def begin(asked: argparse.Namespace, work: Work) -> dict[str, object]:
    """What the JSON says before the first run; with --extend, what it says already.

    Raises:
        UserError: that was measured otherwise.
    """
    from microtron.errors import UserError

    results: dict[str, object] = {**facts(), "settings": settings(work)}
    if asked.extend and asked.out.is_file():
        old = json.loads(asked.out.read_text())
        for key in ("device", "versions", "commit", "settings"):
            if old[key] != json.loads(json.dumps(results[key])):
                raise UserError(
                    f"--extend: {asked.out} was measured with {key} = {old[key]}, this would be "
                    f"with {results[key]}: choose another --out"
                )
        return old
    from torchtitan.tools.utils import get_peak_flops

    return results | {"peak_flops_per_s": get_peak_flops(results["device"]), "runs": {}}


def finish(results: dict[str, object]) -> None:
    """Rows and goals, made of the runs."""
    peak, runs = results["peak_flops_per_s"], results["runs"]
    results["rows"] = {seq_len: rows_of(found, peak) for seq_len, found in runs.items()}
    results["goals"] = {seq_len: goals(rows) for seq_len, rows in results["rows"].items()}


def main(argv: list[str] | None = None) -> None:
    """Runs every candidate in turns, prints, writes; the file is whole after each of them.

    Raises:
        UserError: an option cannot work.
    """
    from microtron.errors import UserError

    asked, options = arguments(argv)
    if asked.one:
        given = json.loads(asked.one)
        given["work"]["options"] = tuple(given["work"]["options"])
        to = given["profile_to"]
        print(json.dumps(run_here(given["name"], Work(**given["work"]), Path(to) if to else None)))
        return
    names = [n for n in candidates() if not asked.only or any(part in n for part in asked.only)]
    if asked.list:
        print("\n".join(names))
        return
    if not names:
        raise UserError(f"--only {' '.join(asked.only)} names no candidate: --list shows them")
    shape = (asked.micro_tokens, asked.step_tokens, asked.steps, asked.blocks, asked.backend)
    works = [Work(asked.toml, tuple(options), s, *shape) for s in asked.seq_len]
    results = begin(asked, works[0])
    run_in_turns(asked, works, names, results)
    for seq_len, rows in results["rows"].items():
        print_table(seq_len, rows)
    for seq_len, found in results["goals"].items():
        print_goals(seq_len, found)
    if asked.out:
        write_json(asked.out, results)


def run_in_turns(
    asked: argparse.Namespace, works: list[Work], names: list[str], results: dict[str, object]
) -> None:
    """Rounds over sequence lengths over candidates; what has failed is not tried again. Profiles
    are taken in the last round, after the timing.
    """
    tables = asked.out.parent / f"{asked.out.stem}_profile" if asked.profile else None
    turns = [(r, work, name) for r in range(asked.repeats) for work in works for name in names]
    with tempfile.TemporaryDirectory() as cache:
        for number, work, name in turns:
            rounds = results["runs"].setdefault(str(work.seq_len), {}).setdefault(name, [])
            if number and "failed" in rounds[-1]:
                continue
            to = None
            if tables is not None and number == asked.repeats - 1:
                to = tables / f"{work.seq_len}_{slug_of(name)}.txt"
            if asked.tiny:
                rounds.append(run_here(name, work, to))
            else:
                rounds.append(run_apart(name, work, to, Path(cache), asked.timeout))
            print(work.seq_len, name, told_short(rounds[-1]), flush=True)
            finish(results)
            if asked.out:
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(json.dumps(results, indent=1) + "\n")


def told_short(found: dict[str, object]) -> str:
    """While it runs: the median, or why there is none."""
    if "failed" in found:
        return found["failed"]
    return f"{median(found['tokens_per_s']):,.0f} tokens/s"


if __name__ == "__main__":
    from microtron.errors import UserError

    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
