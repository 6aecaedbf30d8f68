"""benchmarks/startup.py and checkpoint.py: each run tiny in a fork, and what they reckon with."""

import importlib
import json
import sys
import time
from pathlib import Path

from microtron.accelerator import DEVICE_TYPE

import pytest
import torch
from runs import SMALL, _server, become, free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    """A script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def _alone():
    """This process is the one rank of a run, and has the scripts at hand."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    become(0, 1, free_port())


def _startup(out, *given):
    _alone()
    import startup

    sys.exit(startup.trained_within(out, time.perf_counter(), [*startup.RUN, *SMALL, *given]))


def _checkpoint(out, *given):
    _alone()
    import checkpoint

    assert torch.serialization.get_crc32_options()
    checkpoint.main([f"--out={out}", *given])
    assert not torch.serialization.get_crc32_options()  # a Trainer leaves checksums out


def forked(function, out, *given):
    """What a function wrote, in a process that has what every run of these tests has imported."""
    process = _server().Process(target=function, args=(out, *given))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return json.loads(out.read_text())


def _late(out):
    there = {"datasets", "pandas", "torch._inductor.compile_fx"} & sys.modules.keys()
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset, build_text_dataloader

    with pytest.raises(TypeError, match="missing"):
        build_text_dataloader()
    asked = [HuggingFaceTextDataset.__name__, "datasets" in sys.modules]
    out.write_text(json.dumps([sorted(there), asked]))


def test_a_run_has_imported_no_more_than_it_uses(tmp_path):
    """And what was put off is there for who asks: TorchTitan's text loader."""
    there, asked = forked(_late, tmp_path / "late.json")
    assert there == ([] if DEVICE_TYPE == "cpu" else ["torch._inductor.compile_fx"])
    assert asked == ["HuggingFaceTextDataset", True]


# -- startup.py -----------------------------------------------------------------------------------


def test_the_parts_of_a_start_add_up(tmp_path):
    found = forked(_startup, tmp_path / "parts.json", f"--job.dump_folder={tmp_path / 'run'}")
    parts = found["parts"]
    assert found["total"] == pytest.approx(sum(parts.values()))
    for name in ("import torch", "options", "process group", "model", "optimizer", "first step"):
        assert parts[name] > 0, name
    assert 0 <= parts["everything else"] < 0.5 * found["total"]


def test_an_inner_part_is_not_counted_twice(bench, monkeypatch):
    startup = bench("startup")
    now = iter([0.0, 1.0, 3.0, 10.0, 20.0, 24.0])
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(now))
    parts = startup.Parts()
    with parts.part("outer"), parts.part("inner"):
        pass
    with parts.part("inner"):
        pass
    assert parts.seconds == {"inner": 2.0 + 4.0, "outer": 8.0} and parts.inner == [16.0 - 2.0]


def test_imports_are_added_up_by_package(bench):
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:   1000000 |    1000000 |     torch._C\n"
        "import time:    500000 |    1500000 |   torch\n"
        "import time:    250000 |     250000 | microtron.train\n"
        "some warning | 3 | torch\n"
    )
    assert bench("startup").by_package(text) == {"torch": 1.5, "microtron": 0.25}


def test_a_process_is_timed_to_its_line_and_to_its_end(bench):
    startup = bench("startup")
    code = "import time; print('step 1', flush=True); time.sleep(0.2)"
    took = startup.process(["-c", code], until="step")
    assert took["first_step_s"] <= took["wall_s"] - 0.2 and took["cpu_s"] > 0
    for arguments, until in ((["-c", "raise SystemExit('no')"], ""), (["-c", "pass"], "step")):
        with pytest.raises(SystemExit, match="failed"):
            startup.process(arguments, until)


def test_a_part_that_a_repeat_lacks_is_nothing(bench):
    told = bench("startup").columns([{"a": 1.0}, {"a": 3.0, "b": 4.0}, {"a": 2.0}])
    assert told["a"] == {"median": 2.0, "min": 1.0, "max": 3.0} and told["b"]["median"] == 0.0


def test_the_suite_is_added_up_by_file(bench, tmp_path, monkeypatch):
    cases = [("tests.a", "x", 1.5, ""), ("tests.a", "y", 0.5, "<skipped/>")]
    cases += [("tests.b", "z", 3.0, ""), ("tests.b", "w", 0.25, "<failure/>")]
    for number, half in enumerate((cases[:2], cases[2:])):
        rows = "".join(
            f'<testcase classname="{c}" name="{n}" time="{s}">{inner}</testcase>'
            for c, n, s, inner in half
        )
        suite = f"<testsuites><testsuite>{rows}</testsuite></testsuites>"
        (tmp_path / f"{number}.xml").write_text(suite)
    startup, out = bench("startup"), tmp_path / "suite.json"
    files = [str(tmp_path / f"{n}.xml") for n in (0, 1)]
    monkeypatch.setattr(sys, "argv", ["startup.py", "--suite", *files, "--out", str(out)])
    startup.main()
    found = json.loads(out.read_text())
    assert found["tests"] == {"passed": 2, "skipped": 1, "failure": 1}
    assert found["total_s"] == 5.2 and found["slowest_files_s"] == {"tests.b": 3.25, "tests.a": 2.0}
    assert list(found["slowest_tests_s"])[0] == "tests.b::z" and "versions" in found


# -- checkpoint.py --------------------------------------------------------------------------------


def test_a_checkpoint_is_measured_every_way(tmp_path):
    tiny = ["--parameters=1000", "--repeats=1", "--steps=1", f"--folder={tmp_path}", "--"]
    tiny += ["--model.args.n_layers=1", "--model.args.num_experts=2"]
    found = forked(_checkpoint, tmp_path / "checkpoint.json", *tiny)
    assert found["bytes"] > 3 * 4 * found["parameters"]  # weights and two moments, fp32
    ways = {"microtron", "microtron, CRC-32", "torch.save, fsync", "torch.save, page cache"}
    assert found["save"].keys() == ways | {"plain write, fsync", "plain write, page cache"}
    ways = [(name, at) for name in ("microtron", "torch.load", "plain read") for at in (0, 1)]
    assert found["load"].keys() == {f"{n}, {('page cache', 'disk')[at]}" for n, at in ways}
    for row in [*found["save"].values(), *found["load"].values()]:
        (seconds,) = row["seconds"]
        assert row["gb_per_s"]["median"] == pytest.approx(found["bytes"] / 1e9 / seconds)
    stall, step_s = found["stall_s"], found["step_s"]["median"]
    assert stall.keys() >= {"disabled", "async"} and found["interval"] == 1000
    for mode, row in stall.items():
        share = 100 * row["median"] / (1000 * step_s)
        assert found["percent_of_step_time"][mode] == pytest.approx(share)
        assert found["call_s"][mode]["median"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.json"]  # nothing is left behind


def test_plain_files_are_as_long_as_asked(bench, tmp_path):
    checkpoint = bench("checkpoint")
    for size in (0, 5, checkpoint.PIECE, checkpoint.PIECE + 7):
        checkpoint.write_plain(tmp_path / "plain", size, sync=False)
        assert (tmp_path / "plain").stat().st_size == size
    checkpoint.read_plain(tmp_path / "plain")
    checkpoint.drop(tmp_path / "plain")


def test_the_first_of_each_is_not_kept(bench):
    said = {"a": iter(range(9)), "b": iter(range(10, 19))}
    found = bench("checkpoint").in_turn({n: lambda i=i: next(i) for n, i in said.items()}, 2)
    assert found == {"a": [1, 2], "b": [11, 12]}


def test_turns_are_taken_in_another_order_each_round(bench):
    said = []
    bench("common").interleave({n: lambda n=n: said.append(n) for n in "abc"}, 20, warmup=0)
    rounds = {"".join(said[i : i + 3]) for i in range(0, 60, 3)}
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(rounds) > 3


@pytest.mark.parametrize("parameters", [1_000_000, 20_000_000, 150_000_000])
def test_a_model_of_about_so_many_parameters(bench, parameters):
    from microtron.flavors import flavor
    from microtron.model.accounting import count_parameters

    options = [o.removeprefix("--model.args.") for o in bench("checkpoint").sized(parameters)]
    given = dict(o.split("=") for o in options if not o.startswith("--"))
    args = flavor("debug").override({name: int(value) for name, value in given.items()})
    assert count_parameters(args).total == pytest.approx(parameters, rel=0.15)
