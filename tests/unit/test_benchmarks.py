"""benchmarks/: what its scripts share, and one_device.py tiny."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import microtron.accelerator  # noqa: F401  (before torchtitan)

import pytest
import torch
from runs import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    """A script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_no_script_hides_a_package():
    """A script's folder comes first in its path: transformers looks for `kernels`, for example."""
    utils = pytest.importorskip("transformers.utils.import_utils")
    asked = set(re.findall(r'_is_package_available\(\s*"(\w+)"', Path(utils.__file__).read_text()))
    assert "kernels" in asked
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert not scripts & (asked | sys.stdlib_module_names)


@pytest.mark.parametrize(
    "number, differs, told", [("abc1", 0, "abc1"), ("abc1", 1, "abc1-changed"), ("", 128, "")]
)
def test_the_commit_says_when_the_code_is_another(bench, monkeypatch, number, differs, told):
    def git(command, **options):
        code, out = (differs, "") if "diff" in command else (0, f"{number}\n")
        return subprocess.CompletedProcess(command, code, out)

    common = bench("common")
    monkeypatch.setattr(common.subprocess, "run", git)
    assert common.commit() == told


def test_peak_memory_is_counted_from_where_it_is_asked(bench):
    common, size = bench("common"), 2**26
    torch.ones(size, dtype=torch.uint8)
    before = common.reset_peak()
    if before is None:
        pytest.skip("not Linux")
    assert common.peak_bytes() - before < size // 2
    torch.ones(size, dtype=torch.uint8)
    assert common.peak_bytes() - before > size // 2


def test_one_device_wraps_and_compiles_as_it_says(bench, monkeypatch):
    one, seen = bench("one_device"), {}
    apply = importlib.import_module("microtron.parallel.apply")
    monkeypatch.setattr(apply, "_compile", lambda *given: seen.setdefault("compiled", True))
    wrap = apply.apply_dp
    monkeypatch.setattr(apply, "apply_dp", lambda *given: seen.setdefault("dp", wrap(*given)))
    toml = ROOT / "train_configs" / "debug.toml"
    for variant in ("plain", "fsdp2 + compile"):
        seen.clear()
        flags = [f for f in one.VARIANTS[variant] if f != "wrap"]
        other = "--compile.enable" if variant == "plain" else "--compile.no-enable"
        given = [*SMALL, "--training.global_batch_size=-1", other, *flags]  # whatever a TOML says
        told = one.run_variant(str(toml), given, 1, "wrap" in one.VARIANTS[variant])
        assert set(seen) == ({"compiled", "dp"} if "wrap" in one.VARIANTS[variant] else set())
        assert told["tokens_per_s"] > 0 and 1 < told["loss"] < 10
        lines = one.table({variant: told, "other": {"failed": "why"}}).splitlines()
        assert f"{told['tokens_per_s']:,.0f}" in lines[1] and lines[2].endswith("why")


def test_the_page_names_every_script():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    named = set(re.findall(r"`(\w+\.py)`", page))
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} <= named


def test_a_step_is_compared_with_the_fastest_and_with_the_same_weights(bench):
    pytest.importorskip("transformers")
    speeds = {"microtron": 16.0, "microtron (bf16 weights)": 15.0, "transformers (eager)": 7.0}
    speeds |= {"transformers (grouped_mm)": 8.0, "transformers (eager, bf16 weights)": 10.0}
    rows = {name: {"median": speed} for name, speed in speeds.items()}
    found = bench("train_step").compared(rows)
    assert (found["ours"], found["ratio"]) == ("microtron", 1.6)
    assert {k: pair["ratio"] for k, pair in found["by_weights"].items()} == {"fp32": 2, "bf16": 1.5}
    single = bench("train_step").compared({n: rows[n] for n in rows if "bf16" not in n})
    assert single["ratio"] == 2 and set(single["by_weights"]) == {"fp32"}
