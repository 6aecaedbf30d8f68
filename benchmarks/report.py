"""Writes the README's table of measurements from the JSON in benchmarks/results: no figure by hand.

    python benchmarks/report.py

A function a result, in the order of the table (`SECTIONS`). A result that is not there, or was
written by an older script, is left out with a line on stderr.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_vs_dense_curves import told as in_words

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
START, END = "<!-- measured: made by benchmarks/report.py", "<!-- /measured -->"
SHAPES, DTYPES = ("tiny", "small", "medium"), {"float32": "fp32", "bfloat16": "bf16"}
NO_GPU = "not measured: no GPU yet"

Row = tuple[str, str, str]  # what, result, script


class Missing(Exception):
    """A result that cannot be told: its file is not there."""


def load(name: str) -> dict[str, Any]:
    """One result file. Raises: Missing."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise Missing(f"{path.name} is not there")
    return json.loads(path.read_text())


def spread(row: dict[str, float], digits: int = 0, unit: str = "") -> str:
    """``median (least to most)``."""
    low, middle, high = (f"{row[name]:,.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle}{unit} ({low} to {high})"


def threads(result: dict[str, Any]) -> str:
    """``one thread``, or how many."""
    return "one thread" if result["threads"] == 1 else f"{result['threads']} threads"


def all_of(name: str) -> list[dict[str, Any]]:
    """The results ``name*.json``, those of GPUs last."""
    found = [load(path.stem) for path in sorted(RESULTS.glob(f"{name}*.json"))]
    return sorted(found, key=on_a_gpu)


def on_a_gpu(result: dict[str, Any]) -> bool:
    """By the device's name (`common.facts`)."""
    return "NVIDIA" in result["device"]


def first_run() -> Iterator[Row]:
    """What a newcomer waits for."""
    runs = load("first_run")["rows"]
    first = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    yield (
        "`./run_train.sh`, installed",
        f"first step after {first['first_step_s']:.0f} s, done after {first['total_s']:.0f} s, "
        f"{first['val_bpb']:.2f} bits per byte (start {first['loss_first'] / 0.6931:.1f}); "
        f"loading at most {first['data_percent_max']:.1f}% of the time",
        "first_run.py",
    )


def startup() -> Iterator[Row]:
    """From the command to the first step, and where that goes."""
    result = load("startup")
    rows = result["rows"]
    parts = sorted(rows["parts"].items(), key=lambda part: -part[1]["median"])
    yield (
        "start-up: a run's command to its first step",
        f"{spread(rows['run']['first_step_s'], 1, ' s')}; most of it: "
        + ", ".join(f"{name} {row['median']:.1f}" for name, row in parts[:4])
        + f"; `import microtron` {rows['import microtron']['wall_s']['median']:.2f} s, "
        f"`microtron --help` {rows['microtron --help']['wall_s']['median']:.2f} s",
        "startup.py",
    )


def suite() -> Iterator[Row]:
    """Seconds of the tests."""
    result = load("suite")
    name, seconds = next(iter(result["slowest_files_s"].items()))
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in result["tests"].items())
    yield (
        "the test suite",
        f"{outcomes}, in {result['total_s'] / 60:.1f} minutes; the longest file `{name}` "
        f"{seconds:.0f} s",
        "startup.py --suite",
    )


def shakespeare() -> Iterator[Row]:
    """To one loss, against nanoGPT's recipe."""
    result = load("shakespeare")
    run, peer = result["ours"][0], result["baseline"][0]
    seconds, step = result["seconds"], result["ms_per_step"]
    sides = [
        f"{spread(seconds[side], 0, ' s')} of training" if seconds[side] else "not reached"
        for side in ("ours", "baseline")
    ]
    ratio = f"{result['ratio']:.2f} of its time" if result["ratio"] else "no ratio"
    yield (
        f"tiny Shakespeare to validation loss {result['target']}, {len(result['ours'])} seeds, "
        f"{threads(result)}",
        f"{sides[0]}, {run['tokens']:,} tokens, {run['parameters'] / 1e6:.2f}M parameters "
        f"({run['parameters_active'] / 1e6:.2f}M active); nanoGPT's recipe in our code {sides[1]}, "
        f"{peer['tokens']:,} tokens, {peer['parameters'] / 1e6:.2f}M, "
        f"{step['baseline']['median']:.0f} ms a step: ours takes {ratio}",
        "shakespeare.py",
    )


def train_steps() -> Iterator[Row]:
    """A training step, each shape and dtype that was measured."""
    found = False
    for shape in SHAPES:
        for dtype, short in DTYPES.items():
            if (RESULTS / f"train_step_{shape}_{dtype}.json").is_file():
                result, found = load(f"train_step_{shape}_{dtype}"), True
                speed, by_weights = result["tokens_per_s"], result["by_weights"]
                alike = ""
                if len(by_weights) > 1:
                    alike = f"; both with fp32 weights {by_weights['fp32']['ratio']:.2f}"
                yield (
                    f"training step, `{shape}` shape, {short}, {threads(result)}",
                    f"{spread(speed[result['ours']])} tokens/s, {result['ratio']:.2f} times "
                    f"{result['peer']} ({speed[result['peer']]['median']:,.0f}){alike}",
                    "train_step.py",
                )
    if not found:
        raise Missing("no train_step_SHAPE_DTYPE.json is there")


def moe_vs_dense() -> Iterator[Row]:
    """The mixture against its dense twin."""
    result = load("moe_vs_dense")
    shape, twins, ends = result["plan"]["shape"], result["twins"], result["ends"]
    bits = {arm: spread(end["val_bpb"], 3) for arm, end in ends.items()}
    tokens, seconds = ({a: e[w]["median"] for a, e in ends.items()} for w in ("tokens", "seconds"))
    since = {axis: in_words(found, axis) for axis, found in result["compared"].items()}
    pairs = " (two runs at a time)" * bool(result["cores"])
    yield (
        f"mixture ({shape['num_experts']} experts, top {shape['top_k']}) against its dense twin, "
        f"equal FLOPs a token, {result['plan']['seeds']} seeds, {threads(result)}{pairs}",
        f"{twins['moe']['parameters'] / 1e6:.2f}M parameters against "
        f"{twins['dense']['parameters'] / 1e6:.2f}M; after {tokens['moe'] / 1e6:.1f}M tokens each "
        f"{bits['moe']} against {bits['dense']} bits per byte, in "
        f"{seconds['moe']:.0f} s against {seconds['dense']:.0f}; the twin with "
        f"{tokens['dense_longer'] / tokens['moe']:.2f} times the tokens {bits['dense_longer']} in "
        f"{seconds['dense_longer']:.0f} s. Over seconds: {since['seconds']}. "
        f"Over FLOPs: {since['flops']}",
        "moe_vs_dense.py",
    )


def generation() -> Iterator[Row]:
    """Cached generation."""
    result = load("generate")
    speeds = "; ".join(
        f"batch {row['batch']}: {row['tokens_per_s']['microtron']['median']:,.0f} tokens/s, "
        f"{row['ratio']:.2f} times {row['peer']} "
        f"({row['tokens_per_s'][row['peer']]['median']:,.0f})"
        for row in result["rows"]
    )
    what = f"generation, {result['tokens']} new tokens, `small` shape, fp32, {threads(result)}"
    yield what, speeds, "generate.py"


def loader() -> Iterator[Row]:
    """Tokens a second from page cache."""
    rows = load("loader")["rows"]
    rows = [r for r in rows if r["seq_len"] == 1024 and not r["positions"]]
    speed = max(statistics.median(r["thread"]) for r in rows)  # of all batch sizes
    yield ("loader, sequences of 1024", f"up to {speed / 1e6:.0f}M tokens/s a process", "loader.py")


def tokenizing() -> Iterator[Row]:
    """Megabytes a second."""
    rows = load("tokenizing")["rows"]
    speed = {
        r["tokenizer"]: r["bytes"] / 1e6 / statistics.median(r["cpu_s"])
        for r in rows
        if r["what"] == "tokenize" and "cpu_s" in r
    }
    speeds = ", ".join(f"{name} {speed[name]:,.0f}" for name in ("byte", "char", "bpe", "gpt2"))
    yield "tokenizing, MB/s a core", speeds, "tokenizing.py"


def estimate() -> Iterator[Row]:
    """What the estimate says against what ranks do."""
    cases = load("estimate")["rows"]
    ranks = [row for case in cases for row in case["ranks"]]
    off = {
        name: 100 * max(abs(row[name]["ratio"] - 1) for row in ranks)
        for name in ("parameters_optimizer", "activations")
    }
    yield (
        "`microtron estimate` against real ranks",
        f"{len(cases)} layouts: parameters and optimizer within "
        f"{off['parameters_optimizer']:.2f}%, activations within {off['activations']:.0f}%",
        "estimate.py",
    )


def conversion() -> Iterator[Row]:
    """To a Hugging Face folder."""
    result = load("convert")
    names = ("microtron, no gate", "microtron", "torch + transformers")
    best, gated, peer = (result["rows"][name]["seconds"]["median"] for name in names)
    small, more, theirs = (result["rows"][name]["peak_bytes"]["median"] / 2**30 for name in names)
    yield (
        f"`microtron convert to-hf`, {result['parameters'] / 1e6:.0f}M parameters, fp32 to bf16",
        f"{best:.0f} s and {small:.1f} GiB at most, with the gate {gated:.0f} s and {more:.1f}; "
        f"torch's format_utils and save_pretrained {peer:.0f} s and {theirs:.1f} GiB",
        "convert.py",
    )


def checkpoint() -> Iterator[Row]:
    """Save and load against torch's and the disk's, and what a save costs a running training."""
    result = load("checkpoint")
    rate = {
        (what, name): row["gb_per_s"]["median"]
        for what in ("save", "load")
        for name, row in result[what].items()
    }
    plain = {"disabled": "synchronous"}  # what checkpoint.async_mode calls it
    share = ", ".join(
        f"{plain.get(mode, mode)} {percent:.2f}%"
        for mode, percent in result["percent_of_step_time"].items()
    )
    yield (
        f"checkpoint, {result['parameters'] / 1e6:.0f}M parameters, {result['bytes'] / 1e9:.2f} GB",
        f"saved at {rate['save', 'microtron']:.2f} GB/s to the disk (torch.save "
        f"{rate['save', 'torch.save, fsync']:.2f}, plain write "
        f"{rate['save', 'plain write, fsync']:.2f}), loaded at "
        f"{rate['load', 'microtron, page cache']:.2f} from the page cache (torch.load "
        f"{rate['load', 'torch.load, page cache']:.2f}); a save every {result['interval']:,} "
        f"steps adds to the time: {share}",
        "checkpoint.py",
    )


def certificate() -> Iterator[Row]:
    """Every layout against one process."""
    result = load("certificate")
    layouts = result["layouts"]
    worst = {kind: max(row[kind] for row in layouts) for kind in ("loss", "grads", "weights")}
    agree = sum(row["verdict"] == "agrees" for row in layouts)
    yield (
        "`microtron certify`",
        f"{agree} of {len(layouts)} layouts agree with one process, in "
        f"{result['seconds']:.0f} s; largest relative error: loss {worst['loss']:.0e}, gradients "
        f"{worst['grads']:.0e}, weights {worst['weights']:.0e}",
        "certify",
    )


def throughput() -> Iterator[Row]:
    """A GPU's training speed against its peers: the fastest path of ours, and the goals."""
    found = [result for result in all_of("throughput") if on_a_gpu(result)]
    if not found:
        yield "training, `gpt_oss_656m`, one GPU, against its peers", NO_GPU, "throughput.py"
    for result in found:
        for seq_len, goals in result["goals"].items():
            ours = goals[0]["ours"]
            row = result["rows"][seq_len].get(ours, {})
            speed = f"{spread(row['tokens_per_s'])} tokens/s" if row else "nothing ran"
            memory = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row.get("peak_bytes") else ""
            told = "; ".join(
                f"{goal['goal']} "
                + ("not measured" if goal["value"] is None else f"{goal['value']:.2f}")
                + f" (goal {goal['at_least']:g})"
                for goal in goals
            )
            what = f"training, `{Path(result['settings']['toml']).stem}`, sequence {seq_len}"
            yield f"{what}, {result['device']}", f"{speed}{memory}; {told}", "throughput.py"


def kernels() -> Iterator[Row]:
    """Of each class of kernels the fastest body's share of the floor, forward and backward."""
    found = all_of("kernels")
    if not any(map(on_a_gpu, found)):
        yield "kernels, share of the GPU's measured ceilings", NO_GPU, "kernel_speed.py"
    for result in found:
        told = []
        for name, measured in result["classes"].items():
            kind = "both" if "both" in measured["floor"] else "forward"
            ran = {n: row[kind] for n, row in measured["bodies"].items() if kind in row}
            if ran:
                best = min(ran, key=lambda n: ran[n]["seconds"]["median"])
                told.append(f"{name} {ran[best]['share']:.0%} ({best})")
        what = f"kernels, {result['dtype']}, share of the measured ceilings, {result['device']}"
        yield what, ", ".join(told), "kernel_speed.py"


def compiled() -> Iterator[Row]:
    """`torch.compile` beside eager: blocks, the whole model, modes."""
    found = all_of("compile")
    if not any(map(on_a_gpu, found)):
        yield "`torch.compile` on a GPU: blocks, whole model, modes", NO_GPU, "compile.py"
    for result in found:
        rows = {name: row for name, row in result["variants"].items() if "failed" not in row}
        base = rows["eager"]["tokens_per_s"]
        told = [
            f"{name} {row['tokens_per_s'] / base:.2f} (+{row['compile_s']['median']:.0f} s, "
            f"{sum(row['graph_breaks'].values())})"
            for name, row in rows.items()
            if name != "eager"
        ]
        what = f"`torch.compile`, `{Path(result['toml']).stem}`, {result['device']}"
        yield (
            what,
            f"eager {base:,.0f} tokens/s; times that (longer first step, graph breaks): "
            + ", ".join(told),
            "compile.py",
        )


SECTIONS: tuple[Callable[[], Iterator[Row]], ...] = (
    first_run,
    startup,
    shakespeare,
    train_steps,
    moe_vs_dense,
    generation,
    loader,
    tokenizing,
    estimate,
    conversion,
    certificate,
    checkpoint,
    suite,
    throughput,
    kernels,
    compiled,
)


def rows(sections: tuple[Callable[[], Iterator[Row]], ...] = SECTIONS) -> list[Row]:
    """All rows; what is missing, or lacks a field that a newer script writes, goes to stderr."""
    found: list[Row] = []
    for section in sections:
        try:
            found += list(section())
        except Missing as missing:
            print(f"left out: {section.__name__}: {missing}", file=sys.stderr)
        except (KeyError, TypeError, IndexError) as error:
            name = section.__name__
            told = f"its JSON lacks {error}; measure again with today's script"
            print(f"left out: {name}: {told}", file=sys.stderr)
    return found


def certified() -> str:
    """The layouts of the certificate in words, those for dense models too marked with a star."""
    names = [row["layout"] for row in load("certificate")["layouts"] if row["verdict"] == "agrees"]
    dense = {name.removesuffix(", dense") for name in names if name.endswith(", dense")}
    return " · ".join(f"{n}*" if n in dense else n for n in names if not n.endswith(", dense"))


def measured() -> str:
    """What stands between the marks: table, picture, machine."""
    lines = ["| what | result | script in benchmarks/ |", "|---|---|---|"]
    lines += [f"| {what} | {result} | `{script}` |" for what, result, script in rows()]
    if (RESULTS / "moe_vs_dense.png").is_file():
        lines += ["", "![validation loss of a mixture of experts and of its dense twin, against "]
        lines[-1] += "seconds and against FLOPs](benchmarks/results/moe_vs_dense.png)"
    machine = load("first_run")
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    lines += ["", f"On {machine['device']}{cores}; {versions}."]
    return "\n".join(lines)


def main() -> None:
    """Replaces what stands between the marks."""
    told = measured()
    text = README.read_text()
    start = text.index("\n", text.index(START)) + 1
    text = f"{text[:start]}{told}\n{text[text.index(END) :]}"
    start, end = (text.index(mark) for mark in ("<!-- certified -->", "<!-- /certified -->"))
    README.write_text(f"{text[:start]}<!-- certified -->\n{certified()}\n{text[end:]}")
    print(told)


if __name__ == "__main__":
    main()
