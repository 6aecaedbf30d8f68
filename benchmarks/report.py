"""Writes the README's table of measurements from the JSON in benchmarks/results: no figure by hand.

python benchmarks/report.py
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
START, END = "<!-- measured: made by benchmarks/report.py", "<!-- /measured -->"


def load(name: str) -> dict:
    """One result file."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def rows() -> list[tuple[str, str, str]]:
    """(what, result, script)."""
    first = load("first_run")["rows"][0]
    found = [
        (
            "`./run_train.sh`, installed, 2 cores",
            f"first step after {first['first_step_s']:.0f} s, done after {first['total_s']:.0f} s, "
            f"{first['val_bpb']:.2f} bits per byte (start {first['loss_first'] / 0.6931:.1f}); "
            f"loading at most {first['data_percent_max']:.1f}% of the time",
            "first_run.py",
        )
    ]
    shake = load("shakespeare")
    run, peer = shake["ours"][0], shake["baseline"]
    found.append(
        (
            f"tiny Shakespeare to validation loss {shake['target']}, one thread",
            f"{run['end']['time_s']:.0f} s of training, {run['tokens']:,} tokens, "
            f"{run['parameters'] / 1e6:.2f}M parameters ({run['parameters_active'] / 1e6:.2f}M "
            f"active); nanoGPT's recipe in our code {peer['reached']['time_s']:.0f} s, "
            f"{peer['reached']['step'] * peer['tokens_per_step']:,} tokens, "
            f"{peer['parameters'] / 1e6:.2f}M",
            "shakespeare.py",
        )
    )
    for shape in ("tiny", "small"):
        step = load(f"train_step_{shape}")
        ours, theirs = (step["tokens_per_s"][n]["median"] for n in ("microtron", step["peer"]))
        found.append(
            (
                f"training step, `{shape}` shape, fp32, one thread",
                f"{ours:,.0f} tokens/s, {step['ratio']:.2f} times {step['peer']} ({theirs:,.0f})",
                "train_step.py",
            )
        )
    generate = load("generate")
    told = "; ".join(
        f"batch {row['batch']}: {row['tokens_per_s']['microtron']['median']:,.0f} tokens/s, "
        f"{row['ratio']:.2f} times {row['peer']} "
        f"({row['tokens_per_s'][row['peer']]['median']:,.0f})"
        for row in generate["rows"]
    )
    what = f"generation, {generate['tokens']} new tokens, `small` shape, fp32, one thread"
    found.append((what, told, "generate.py"))
    loader = max(
        max(r["thread"])
        for r in load("loader")["rows"]
        if r["seq_len"] == 1024 and not r["positions"]
    )
    found.append(
        ("loader, sequences of 1024", f"up to {loader / 1e6:.0f}M tokens/s a process", "loader.py")
    )
    speed = {
        r["tokenizer"]: r["mb_per_s"] for r in load("tokenizing")["rows"] if r["what"] == "tokenize"
    }
    names = ("byte", "char", "bpe", "gpt2")
    told = ", ".join(f"{n} {speed[n]:,.0f}" for n in names)
    found.append(("tokenizing, MB/s a core", told, "tokenizing.py"))
    estimate = [row for case in load("estimate")["rows"] for row in case["ranks"]]
    off = {
        name: 100 * max(abs(row[name]["ratio"] - 1) for row in estimate)
        for name in ("parameters_optimizer", "activations")
    }
    found.append(
        (
            "`microtron estimate` against real ranks",
            f"{len(load('estimate')['rows'])} layouts: parameters and optimizer within "
            f"{off['parameters_optimizer']:.2f}%, activations within {off['activations']:.0f}%",
            "estimate.py",
        )
    )
    convert = load("convert")
    best, gated, peer = (
        convert["rows"][n] for n in ("microtron, no gate", "microtron", "torch + transformers")
    )
    spent, needed = (
        {n: row[key]["median"] for n, row in (("best", best), ("gated", gated), ("peer", peer))}
        for key in ("seconds", "peak_bytes")
    )
    found.append(
        (
            f"`microtron convert to-hf`, {convert['parameters'] / 1e6:.0f}M parameters, "
            "fp32 to bf16",
            f"{spent['best']:.0f} s and {needed['best'] / 2**30:.1f} GiB at most, with the gate "
            f"{spent['gated']:.0f} s and {needed['gated'] / 2**30:.1f}; torch's format_utils and "
            f"save_pretrained {spent['peer']:.0f} s and {needed['peer'] / 2**30:.1f} GiB",
            "convert.py",
        )
    )
    certificate = load("certificate")
    layouts = certificate["layouts"]
    worst = {kind: max(row[kind] for row in layouts) for kind in ("loss", "grads", "weights")}
    agree = sum(row["verdict"] == "agrees" for row in layouts)
    found.append(
        (
            "`microtron certify`, 2 cores",
            f"{agree} of {len(layouts)} layouts agree with one process, in "
            f"{certificate['seconds']:.0f} s; "
            f"largest relative error: loss {worst['loss']:.0e}, gradients {worst['grads']:.0e}, "
            f"weights {worst['weights']:.0e}",
            "certify",
        )
    )
    return found


def certified() -> str:
    """The layouts of the certificate in words, those for dense models too marked with a star."""
    names = [row["layout"] for row in load("certificate")["layouts"] if row["verdict"] == "agrees"]
    dense = {name.removesuffix(", dense") for name in names if name.endswith(", dense")}
    told = [f"{n}*" if n in dense else n for n in names if not n.endswith(", dense")]
    return " · ".join(told)


def main() -> None:
    """Replaces what stands between the marks."""
    device = load("first_run")
    lines = ["| what | result | script in benchmarks/ |", "|---|---|---|"]
    lines += [f"| {what} | {result} | `{script}` |" for what, result, script in rows()]
    versions = ", ".join(f"{k} {v}" for k, v in device["versions"].items())
    lines += [
        "",
        f"On {device['device']} (a shared 2-core virtual machine), {versions}. No GPU yet.",
    ]
    text = README.read_text()
    start = text.index("\n", text.index(START)) + 1
    text = text[:start] + "\n".join(lines) + "\n" + text[text.index(END) :]
    start, end = (text.index(mark) for mark in ("<!-- certified -->", "<!-- /certified -->"))
    README.write_text(f"{text[:start]}<!-- certified -->\n{certified()}\n{text[end:]}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
