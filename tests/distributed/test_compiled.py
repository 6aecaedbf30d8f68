"""Compiled blocks on every kind of mesh train as uncompiled ones in one process do.

The compiler's front and middle (tracing, functional collectives in the graph, autograd) run in all;
its code generator, half a minute a layout, in one.
"""

import pytest
import torch
from runs import SMALL, Run, assert_one_line

from microtron.certificate.layouts import GPT2, case
from microtron.certificate.processes import run_all

pytestmark = pytest.mark.slow
TRACED = ("--compile.enable", "--compile.backend=aot_eager")
FULL, SELECTIVE = (f"--activation_checkpoint.mode={m}" for m in ("full", "selective"))
CASES = [
    case("one", extra=TRACED),
    case("tp2, code generated", extra=("--compile.enable",), tp=2),
    case("ddp2", extra=TRACED, replicate=2),
    case("fsdp2, selective", extra=(*TRACED, SELECTIVE), shard=2),
    case("tp2, full", extra=(*TRACED, FULL), tp=2),
    case("cp2", extra=TRACED, cp=2),
    case("gpt2 x tp2", GPT2, TRACED, tp=2),
    case("pp2", extra=TRACED, pp=2),
    case("ep2, full", extra=(*TRACED, FULL), shard=2, ep=2),
    case("ep2 on tp2", extra=TRACED, tp=2, ep=2),
    case(  # the last one: its budget stays in the process
        "fsdp2, memory budget",
        extra=(
            *TRACED,
            "--activation_checkpoint.mode=memory_budget",
            "--activation_checkpoint.memory_budget=0.5",
        ),
        shard=2,
    ),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rows = {}
    run_all(CASES, tmp_path_factory.mktemp("compiled"), lambda r: rows.setdefault(r["layout"], r))
    return rows


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_compiled_layout_agrees(rows, name):
    assert rows[name]["verdict"] == "agrees", rows[name]


def poison():
    """A weight turns into NaN before step 2."""
    from microtron.train import Trainer

    plain = Trainer.train_step

    def step(self, batches):
        if self.step == 2:
            with torch.no_grad():
                self.model_parts[0].layers["1"].attention.wq.weight[0, 0] = float("nan")
        return plain(self, batches)

    Trainer.train_step = step


def test_the_first_bad_output_is_found_in_compiled_blocks(tmp_path):
    argv = [*SMALL, "--data.mock", "--training.steps=3", *TRACED]
    ended = Run(argv, tmp_path, prepare=poison).wait()
    assert ended.code == 1, ended.told
    assert_one_line(ended.err, "step 2 is not finite", "output of layers.1.attention.wq;")
