"""benchmarks/report.py: rows from synthetic JSON, what is missing, and the README as it stands."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACTS = {"device": "Some CPU", "threads": 1, "versions": {"torch": "9.9", "numpy": "1.0"}}


def of(median, least=None, most=None):
    """A summary."""
    return {"median": median, "min": least or median, "max": most or median}


@pytest.fixture
def report(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


@pytest.fixture
def write(report, monkeypatch, tmp_path):
    """Writes a result where the report looks for them; there are no others."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name, result, **facts):
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, **FACTS, **facts}))

    return write


def only(section):
    """(result, what) of a section with one row."""
    [(what, result, _)] = section()
    return result, what


def test_first_run_is_the_median_of_its_runs(report, write):
    run = {"total_s": 70.0, "val_bpb": 2.5, "loss_first": 5.5, "data_percent_max": 0.1}
    write("first_run", {"rows": [run | {"first_step_s": s} for s in (9.0, 6.0, 7.0)]})
    assert only(report.first_run)[0].startswith("first step after 7 s, done after 70 s, 2.50 bits")


def test_loader_and_tokenizers_by_their_medians(report, write):
    thread = {8: [1e6, 9e6, 5e6], 32: [7e6, 6e6, 8e6]}
    rows = [{"seq_len": 1024, "positions": False, "thread": t} for t in thread.values()]
    write("loader", {"rows": [*rows, {**rows[0], "seq_len": 2048, "thread": [9e9]}]})
    assert only(report.loader)[0] == "up to 7M tokens/s a process"
    kinds = ("byte", "char", "bpe", "gpt2")
    told = [{"tokenizer": k, "bytes": 6e6, "cpu_s": [0.1, 3.0, 0.5]} for k in kinds]
    write("tokenizing", {"rows": [{"what": "tokenize", **row} for row in told]})
    assert only(report.tokenizing)[0] == "byte 12, char 12, bpe 12, gpt2 12"


def train_step(ratio):
    speed = {"microtron": of(2000, 1900, 2100), "transformers (eager)": of(1000)}
    pair = {"ours": "microtron", "peer": "transformers (eager)", "ratio": ratio}
    return {"tokens_per_s": speed, **pair, "by_weights": {"fp32": pair}}


def test_train_steps_in_the_order_of_size(report, write):
    write("train_step_medium_float32", train_step(2.5), threads=2)
    half = train_step(1.5)
    half["by_weights"] |= {"bf16": {}, "fp32": {"ratio": 2.25}}
    write("train_step_tiny_bfloat16", half)
    write("train_step_tiny_float32", train_step(2.0))
    found = list(report.train_steps())
    assert [what for what, *_ in found] == [
        "training step, `tiny` shape, fp32, one thread",
        "training step, `tiny` shape, bf16, one thread",
        "training step, `medium` shape, fp32, 2 threads",
    ]
    assert found[0][1] == (
        "2,000 (1,900 to 2,100) tokens/s, 2.00 times transformers (eager) (1,000)"
    )
    assert found[1][1].endswith(
        "1.50 times transformers (eager) (1,000); both with fp32 weights 2.25"
    )


def shakespeare(ratio=0.25):
    ours = {"tokens": 345600, "parameters": 1012384, "parameters_active": 606880}
    baseline = {"tokens": 1459200, "parameters": 804096}
    seconds = {"ours": of(25, 24, 26), "baseline": of(100, 99, 105) if ratio else None}
    steps = {"ours": of(70), "baseline": of(56)}
    told = {"target": 1.92, "ours": [ours] * 3, "baseline": [baseline] * 3}
    return {**told, "seconds": seconds, "ms_per_step": steps, "ratio": ratio}


def test_shakespeare(report, write):
    write("shakespeare", shakespeare())
    result, what = only(report.shakespeare)
    assert what == "tiny Shakespeare to validation loss 1.92, 3 seeds, one thread"
    assert "25 s (24 to 26) of training, 345,600 tokens, 1.01M parameters (0.61M" in result
    assert "100 s (99 to 105) of training, 1,459,200 tokens, 0.80M, 56 ms a step" in result
    assert result.endswith("ours takes 0.25 of its time")


def test_shakespeare_without_the_target(report, write):
    write("shakespeare", shakespeare(ratio=None))
    result, _ = only(report.shakespeare)
    assert "nanoGPT's recipe in our code not reached" in result and "no ratio" in result


def moe_vs_dense(cores=()):
    def end(bits, tokens, seconds):
        return {"val_bpb": of(bits), "tokens": of(tokens), "seconds": of(seconds)}

    ends = {"moe": end(2.0, 2e6, 200.4), "dense": end(2.2, 2e6, 150.0)}
    ends["dense_longer"] = end(2.125, 2.5e6, 190.0)
    since = {"below_at_the_end": "moe", "crossover": 42.0, "gap": 0.1}
    twins = {"moe": {"parameters": 2e6}, "dense": {"parameters": 5e5}}
    plan = {"seeds": 3, "shape": {"num_experts": 8, "top_k": 2}}
    compared = {"seconds": since, "flops": {**since, "crossover": None}}
    told = {"plan": plan, "twins": twins, "ends": ends, "compared": compared}
    return {**told, "cores": list(cores)}


def test_moe_vs_dense(report, write, tmp_path):
    write("first_run", {"rows": []})
    write("moe_vs_dense", moe_vs_dense([0, 1]))
    result, what = only(report.moe_vs_dense)
    assert "8 experts, top 2" in what and what.endswith("one thread (two runs at a time)")
    assert "2.00M parameters against 0.50M; after 2.0M tokens each 2.000" in result
    assert "against 2.200 (2.200 to 2.200) bits per byte, in 200 s against 150;" in result
    assert "1.25 times the tokens 2.125 (2.125 to 2.125) in 190 s." in result
    assert "Over seconds: crossover at 42 s" in result
    assert "Over FLOPs: no crossover: mixture of experts below throughout" in result
    assert "](benchmarks/results/moe_vs_dense.png)" not in report.measured()
    (tmp_path / "moe_vs_dense.png").touch()
    assert "](benchmarks/results/moe_vs_dense.png)" in report.measured()


def test_startup_tells_the_largest_parts(report, write):
    parts = {name: of(s) for name, s in zip("abcde", (0.1, 3.0, 0.2, 2.0, 1.0), strict=True)}
    rows = {"run": {"first_step_s": of(6.5, 6.0, 7.0)}, "parts": parts}
    for name, seconds in (("import microtron", 0.04), ("microtron --help", 0.11)):
        rows[name] = {"wall_s": of(seconds)}
    write("startup", {"rows": rows})
    result, _ = only(report.startup)
    assert result == (
        "6.5 s (6.0 to 7.0); most of it: b 3.0, d 2.0, e 1.0, c 0.2; `import microtron` 0.04 s, "
        "`microtron --help` 0.11 s"
    )


def test_suite(report, write):
    told = {"tests": {"passed": 900, "skipped": 100}, "total_s": 570.0}
    write("suite", {**told, "slowest_files_s": {"tests.slow": 61.2, "tests.quick": 5.0}})
    result, _ = only(report.suite)
    assert result == ("900 passed, 100 skipped, in 9.5 minutes; the longest file `tests.slow` 61 s")


def throughput():
    goals = [{"goal": "MFU", "ours": "microtron + kernels", "value": 0.51, "at_least": 0.5}]
    goals.append({**goals[0], "goal": "to torchtitan", "value": None, "at_least": 1.5})
    row = {"tokens_per_s": of(90000), "peak_bytes": 2**34}
    told = {"settings": {"toml": "a/gpt.toml"}, "goals": {"2048": goals}}
    return {**told, "rows": {"2048": {"microtron + kernels": row}}}


def test_without_a_gpu_that_is_said(report, write):
    write("throughput", throughput())
    write("kernels_cpu", {"classes": {}, "dtype": "float32"})
    assert only(report.throughput)[0] == only(report.compiled)[0] == report.NO_GPU
    told = list(report.kernels())
    assert [row[1] == report.NO_GPU for row in told] == [True, False]  # the CPU's stands below


def test_what_a_gpu_measured(report, write):
    write("throughput", throughput(), device="NVIDIA H200")
    result, what = only(report.throughput)
    assert what == "training, `gpt`, sequence 2048, NVIDIA H200"
    assert "tokens/s, 16.0 GiB; MFU 0.51 (goal 0.5); to torchtitan not measured" in result
    both = {"torch": of(2.0), "compile": of(1.0)}
    bodies = {n: {"both": {"seconds": s, "share": 0.9 / s["median"]}} for n, s in both.items()}
    bodies["liger"] = {"failed": "no such package"}
    norm = {"floor": {"forward": {}, "both": {}}, "bodies": bodies}
    write("kernels_cuda", {"classes": {"norm": norm}, "dtype": "bf16"}, device="NVIDIA H200")
    assert only(report.kernels)[0] == "norm 90% (compile)"


def test_compiled(report, write):
    eager = {"tokens_per_s": 1000.0}
    blocks = {"tokens_per_s": 1500.0, "compile_s": of(9.7), "graph_breaks": {"a": 1, "b": 2}}
    variants = {"eager": eager, "blocks": blocks, "whole": {"failed": "no"}}
    write("compile", {"toml": "a/gpt.toml", "variants": variants}, device="NVIDIA H200")
    result, what = only(report.compiled)
    assert what == "`torch.compile`, `gpt`, NVIDIA H200"
    assert result == (
        "eager 1,000 tokens/s; times that (longer first step, graph breaks): blocks 1.50 (+10 s, 3)"
    )


def test_checkpoint(report, write):
    save = {"microtron": 1.5, "torch.save, fsync": 1.2, "plain write, fsync": 2.0}
    load = {"microtron, page cache": 3.0, "torch.load, page cache": 2.5}
    rates = {
        what: {name: {"gb_per_s": of(rate)} for name, rate in rows.items()}
        for what, rows in (("save", save), ("load", load))
    }
    told = {"parameters": 150e6, "bytes": 1.8e9, "interval": 1000}
    write("checkpoint", {**told, **rates, "percent_of_step_time": {"disabled": 0.5, "async": 0.1}})
    result, what = only(report.checkpoint)
    assert what == "checkpoint, 150M parameters, 1.80 GB"
    assert "saved at 1.50 GB/s to the disk (torch.save 1.20, plain write 2.00)" in result
    assert "loaded at 3.00 from the page cache (torch.load 2.50); a save every 1,000" in result
    assert result.endswith("adds to the time: synchronous 0.50%, async 0.10%")


def test_what_is_missing_or_older_is_left_out_and_told(report, write, capsys):
    write("train_step_small_float32", train_step(2.0))
    write("shakespeare", {"target": 1.92, "ours": [{}], "baseline": {}})
    found = report.rows()
    assert [(script, result == report.NO_GPU) for _, result, script in found] == [
        ("train_step.py", False),
        ("throughput.py", True),
        ("kernel_speed.py", True),
        ("compile.py", True),
    ]
    told = capsys.readouterr().err
    assert "left out: first_run: first_run.json is not there\n" in told
    assert "left out: shakespeare: its JSON lacks" in told
    assert "train_steps" not in told


def test_every_section_has_its_script(report):
    """The table names scripts; each is one that stands in benchmarks/ or a command."""
    for _, _, script in report.rows():
        assert script == "certify" or (ROOT / "benchmarks" / script.split()[0]).is_file()


def test_main_replaces_what_stands_between_the_marks(report, write, monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    marks = [f"{report.START} -->", report.END, "<!-- certified -->", "<!-- /certified -->"]
    readme.write_text("a\n{}\nold\n{}\nb\n{}\nold\n{}\nc\n".format(*marks))
    monkeypatch.setattr(report, "README", readme)
    write("first_run", {"rows": []}, cores=2)
    names = ("tp2", "tp2, dense", "pp2", "cp2")
    verdicts = ("agrees", "agrees", "agrees", "differs")
    rows = [{"layout": n, "verdict": v} for n, v in zip(names, verdicts, strict=True)]
    for row in rows:
        row |= {"loss": 1e-7, "grads": 2e-6, "weights": 3e-6}
    write("certificate", {"layouts": rows, "seconds": 9.0})
    report.main()
    text = readme.read_text()
    assert text.startswith(f"a\n{marks[0]}\n| what | result |")
    assert "| 3 of 4 layouts agree" in text and "old" not in text
    assert "On Some CPU, 2 cores; torch 9.9, numpy 1.0.\n" in text
    assert text.endswith(f"{marks[1]}\nb\n{marks[2]}\ntp2* · pp2\n{marks[3]}\nc\n")


def test_the_readme_is_what_the_report_writes(report):
    text = (ROOT / "README.md").read_text()
    assert f"-->\n{report.measured()}\n{report.END}" in text, "run benchmarks/report.py"
    assert f"-->\n{report.certified()}\n<!-- /certified -->" in text, "run benchmarks/report.py"
