"""benchmarks/gemm.py: what it times computes the same."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gemm(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gemm")


@pytest.mark.parametrize("inward, outward", [(8, 24), (24, 8)])
def test_candidates_compute_the_same(gemm, inward, outward):
    found = {name: make() for name, make in gemm.candidates(40, inward, outward).items()}
    if "onednn" not in found:
        pytest.skip("torch was built without oneDNN")
    torch.testing.assert_close(found["onednn"], found["mkl"])
    ours, theirs = (found[f"{n}, weight gradient"] for n in ("onednn", "mkl"))
    torch.testing.assert_close(ours if ours.shape == theirs.shape else ours.t(), theirs)
    assert found["bf16"].dtype == torch.bfloat16


def test_it_runs_and_writes(gemm, monkeypatch, tmp_path):
    monkeypatch.setattr(gemm, "SHAPES", [(40, 8, 24)])
    monkeypatch.setattr(gemm, "new_shape_s", lambda: 1e-4)
    out = tmp_path / "gemm.json"
    monkeypatch.setattr(sys, "argv", ["gemm.py", "--repeats", "1", "--out", str(out)])
    gemm.main()
    written = json.loads(out.read_text())
    assert written["rows"][0]["shape"] == [40, 8, 24]
    assert written["rows"][0]["gflops"]["mkl"]["median"] > 0
