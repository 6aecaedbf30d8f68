"""The certificate: every layout agrees with one process, and every broken one does not.

All layouts that are selected run once, in one call, so that processes start once for each number of
ranks; a test then looks at its own row, and a failure names its layout. `pytest -k tp2` runs those
alone.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from broken import Broken
from mutants import MUTANTS

from microtron import cli
from microtron.certificate import certify as command
from microtron.certificate import processes, ranks
from microtron.certificate.layouts import RUN, all_cases
from microtron.certificate.verdict import TOLERANCE, compare, distance, verdict, worst_of
from microtron.loss import summed_loss
from microtron.parallel.layout import OPTIONS
from microtron.parallel.tp import sum_replicated_gradients

CASES = {c.name: c for c in command.runnable()}
MAX_NORM = next(float(o.partition("=")[2]) for o in RUN if o.startswith("--training.max_norm="))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="session")
def truths(tmp_path_factory):
    """A folder that keeps what single processes found."""
    return tmp_path_factory.mktemp("certificate")


def selected(request, parameter):
    """The values of a parameter of this file that this session will test."""
    ours = [item for item in request.session.items if item.path == Path(__file__)]
    specs = [item.callspec for item in ours if hasattr(item, "callspec")]
    return [spec.params[parameter] for spec in specs if parameter in spec.params]


@pytest.fixture(scope="session")
def rows(request, truths):
    """Layout -> its row."""
    rows = {}
    cases = [CASES[name] for name in selected(request, "layout")]
    processes.run_all(cases, truths, lambda row: rows.setdefault(row["layout"], row))
    return rows


@pytest.fixture(scope="session")
def caught(request, truths):
    """Mutant -> its row."""
    rows, mutants = {}, selected(request, "mutant")
    assert len({m.name for m in mutants} - CASES.keys()) == len(mutants)
    processes.run_all(
        [replace(CASES[m.layout], name=m.name) for m in mutants],
        truths,
        lambda row: rows.setdefault(row["layout"], row),
        {m.name: m.broken for m in mutants},
    )
    return rows


def by_time():
    """Every layout; the large ones of dense models, which MoE has done too, are slow tests."""
    for name, case in CASES.items():
        slow = name.endswith(", dense") and case.ranks >= 4
        yield pytest.param(name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("layout", list(by_time()))
def test_layout_agrees(rows, truths, layout):
    row = rows[layout]
    assert row["verdict"] == "agrees", row["traceback"] or row["verdict"]
    assert not row["missing"] and all(row[kind] <= most for kind, most in TOLERANCE.items())
    truth = torch.load(ranks.truth_folder(CASES[layout], truths) / "truth.pt", weights_only=True)
    clipped = [step["norm"] > 1.2 * MAX_NORM for step in truth["steps"]]
    assert clipped == [True] * 3, "a wrong norm would not change the weights"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mistake_is_caught(caught, mutant):
    row = caught[mutant.name]
    assert not row["traceback"], f"it raised instead of being compared: {row['traceback']}"
    assert row["verdict"] != "agrees"
    if mutant.kind == "missing":
        assert any(re.search(mutant.where, name) for name in row["missing"]), row
    else:
        assert row[mutant.kind] > 10 * TOLERANCE[mutant.kind], row
        assert re.search(mutant.where, row["worst"][mutant.kind]), row
    if mutant.kind == "norm":  # and clipping by it
        assert row["weights"] > 10 * TOLERANCE["weights"], row


def test_what_must_be_there():
    """The layouts that the certificate was asked for, for MoE and, where it applies, for dense."""
    names = {c.name for c in all_cases()}
    both = "ddp2, fsdp2, fsdp4, hsdp 2x2, tp2, tp4, tp8, pp2 1F1B, pp2 GPipe, pp2 LoopedBFS, "
    both += "pp2 Interleaved1F1B, pp2 InterleavedZeroBubble, pp2 ZBVZeroBubble, "
    both += "pp4 Interleaved1F1B, cp2, cp4, pp2 x dp2, pp2 x tp2, cp2 x tp2, pp2 x dp2 x tp2, "
    both += "accumulate4, ac full, ac selective"
    moe = "ep2, ep4, ep2 x etp2, sep4, tp2 x ep2, pp2 x ep2, fsdp2 x cp2 x ep2"
    shapes = "gpt2 x fsdp2, gpt2 x ddp2, gpt2 x tp2, gpt2 x cp2, gpt2 x cp2 x tp2, gpt2 x pp2, "
    shapes += "gpt2 tied x fsdp2, gpt2 tied x tp2, llama x fsdp2, llama x tp2"
    asked = {*both.split(", "), *moe.split(", "), *(f"{n}, dense" for n in both.split(", "))}
    asked |= set(shapes.split(", "))
    assert asked <= names
    assert len(names) == len(all_cases())
    for case in all_cases():
        given = {a.partition("=")[0]: a.partition("=")[2] for a in case.options}
        degrees = {n: int(given.get(f"--parallelism.{o}", 1)) for n, o in OPTIONS.items()}
        spans = {n: d for n, d in degrees.items() if n not in ("ep", "etp")}
        assert math.prod(spans.values()) == case.ranks, case


# --- a layout that cannot finish -------------------------------------------------------------


@contextmanager
def on_rank_1(act):
    if os.environ["RANK"] == "1":
        act()
    yield


def _raise():
    raise ValueError("broken\nin two lines")


def failing():
    """Rank 1 raises."""
    return on_rank_1(_raise)


def dying():
    """Rank 1 is killed."""
    return on_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL))


def hanging():
    """Rank 1 does not come."""
    return on_rank_1(lambda: time.sleep(60))


def test_others_run_when_a_layout_cannot(truths):
    """Each takes its processes with it: the rest go on in new ones."""
    plain = CASES["pp2 1F1B, dense"]
    names = {"first": None, "fails": failing, "dies": dying, "hangs": hanging, "last": None}
    rows = []
    processes.run_all(
        [replace(plain, name=name) for name in names],
        truths,
        rows.append,
        {name: how for name, how in names.items() if how},
        patience_s=6,
    )
    assert [row["layout"] for row in rows] == list(names)
    first, fails, dies, hangs, last = rows
    assert first["verdict"] == last["verdict"] == "agrees"
    assert re.fullmatch(r"rank 1: ValueError at ranks\.py:\d+: broken", fails["verdict"])
    assert 'raise ValueError("broken' in fails["traceback"]
    assert dies["verdict"] == "rank 1 ended with exit code -9"
    assert hangs["verdict"] == "nothing was heard for 6 s"
    stacks = hangs["traceback"].split("rank 1:")
    assert "in three_steps" in stacks[0] and "in on_rank_1" in stacks[1]
    for row in (fails, dies, hangs):
        assert row["loss"] != row["loss"] and row["ranks"] == 2 and row["traceback"]
    left = [rank for server in psutil.Process().children() for rank in server.children()]
    assert not psutil.wait_procs(left, timeout=5)[1]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)]
)
def test_nothing_is_left_behind(number, code):
    argv = [sys.executable, "-m", "microtron.cli", "certify", "--only", "tp4"]
    pipe = subprocess.PIPE
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background not
    run = subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeding)
    try:
        parent, end = psutil.Process(run.pid), time.monotonic() + 150
        while len(family := parent.children(recursive=True)) < 6:  # two servers, four ranks
            assert time.monotonic() < end and run.poll() is None
            time.sleep(0.05)
        run.send_signal(number)
        _, told = run.communicate(timeout=20)
        assert run.returncode == code
        assert number == signal.SIGKILL or told == "interrupted\n"
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        run.kill()


# --- the command -----------------------------------------------------------------------------


def row_of(case, **changes):
    """A row as `run_all` reports it."""
    about = {"layout": case.name, "ranks": case.ranks, "seconds": 1.5, "worst": {}, "missing": []}
    return {
        **about,
        **dict.fromkeys(TOLERANCE, 0.0),
        "verdict": "agrees",
        "traceback": "",
        **changes,
    }


@pytest.mark.parametrize(
    "bad, code", [({}, 0), ({"verdict": "off", "loss": NAN, "traceback": "T\n"}, 1)]
)
def test_table_and_code(bad, code, monkeypatch, capsys, tmp_path):
    def run_all(cases, folder, report):
        for case in cases:
            report(row_of(case, **(bad if case.name == "tp2" else {})))

    monkeypatch.setattr(command, "run_all", run_all)
    out = tmp_path / "made" / "table.json"
    argv = ["certify", "--world-size", "2", "--only", "tp2", "pp2 1F1B", "--out", str(out)]
    assert cli.main(argv) == code
    told = capsys.readouterr()
    agreed = 5 if code == 0 else 4
    assert f"{agreed} of 5 layouts agree" in told.out and "tp2 documents" in told.out
    assert told.err == ("\n--- tp2 ---\nT\n\n" if code else "")
    table = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    found = {row["layout"]: row for row in table["layouts"]}
    assert len(found) == 5 and found["tp2"]["loss"] == (None if code else 0.0)
    assert table["machine"]["torch"] == torch.__version__


def test_a_layout_without_a_row_does_not_agree(monkeypatch):
    monkeypatch.setattr(command, "run_all", lambda cases, folder, report: report(row_of(cases[0])))
    assert cli.main(["certify", "--only", "tp2"]) == 1


@pytest.mark.parametrize(
    "options, told",
    [
        (["--only", "tp2", "tp3"], "--only 'tp3': no layout's name begins so"),
        (["--only", "tp8", "--world-size", "4"], "leaves no layout: give 8 or more"),
        (["--world-size", "0"], "--world-size 0 leaves no layout: give 1 or more"),
        (["--out", "/proc/no/table.json"], "/proc/no/table.json cannot be written"),
    ],
)
def test_refused(options, told, capsys):
    assert cli.main(["certify", *options]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and told in err


def test_a_torch_too_old_for_some(monkeypatch, capsys):
    monkeypatch.setattr(command.metadata, "version", lambda name: "2.11.0+cpu")
    ran = []
    monkeypatch.setattr(command, "run_all", lambda cases, *rest: ran.extend(c.name for c in cases))
    cli.main(["certify", "--only", "pp2"])
    assert "pp2 1F1B" in ran and not [name for name in ran if "ZeroBubble" in name]
    assert "left out" in capsys.readouterr().out
    assert cli.main(["certify", "--only", "pp2 ZBV"]) == 1
    assert "torch 2.11.0+cpu cannot run pp2 ZBVZeroBubble" in capsys.readouterr().err


def test_list(capsys):
    assert cli.main(["certify", "--list", "--only", "tp8"]) == 0
    assert capsys.readouterr().out == "tp8         8\ntp8, dense  8\n"


# --- what is compared ------------------------------------------------------------------------


def test_distance():
    a = torch.tensor([3.0, 4.0])
    assert distance(a, a) == 0.0
    assert distance(a, torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)
    assert distance(torch.zeros(2), torch.zeros(2)) == 0.0
    assert distance(a, torch.zeros(2)) > 1e30
    assert distance(a, torch.tensor([3.0, 5.0]), least=34.0) == pytest.approx(1 / 34)
    for other in (None, torch.zeros(3), torch.tensor([NAN, 4.0]), torch.tensor([INF, 4.0])):
        assert distance(other, a) == INF
        assert distance(a, other) == INF or other is not None and other.isinf().any()


def result_of(loss=2.0, norm=1.0, grad=1.0, weight=1.0, names=("a", "b")):
    """What a rank, or the single process, has."""
    grads = {name: torch.tensor([grad, 1.0]) for name in names}
    step = {"loss": loss, "norm": norm, "grads": grads}
    weights = {name: torch.tensor([weight, 1.0]) for name in names}
    return {"steps": [step], "weights": {**weights, "buffer": torch.ones(2)}}


@pytest.mark.parametrize(
    "kind, where", [("loss", "step 1"), ("norm", "step 1"), ("grads", "at step 1"), ("weights", "")]
)
@pytest.mark.parametrize("wrong", [2.1, NAN, INF])
def test_compare_and_verdict(kind, where, wrong):
    option = {"grads": "grad", "weights": "weight"}.get(kind, kind)
    result = compare(result_of(**{option: wrong}), result_of())
    assert [k for k in TOLERANCE if result[k] > 0] == [kind]
    assert result[kind] == (INF if wrong != 2.1 else pytest.approx(result[kind]))
    told = verdict({**result, "missing": []})
    assert told.startswith(f"{kind} off by ") and where in told and ";" not in told


def test_what_is_within_tolerance_agrees():
    result = compare(
        result_of(loss=2.000001, norm=1.000005, grad=1.0001, weight=1.0001), result_of()
    )
    assert result["parameters"] == ["a", "b", "buffer"] and 0 < result["loss"] < 1e-6
    assert verdict({**result, "missing": []}) == "agrees"
    assert verdict({**result, "missing": ["c", "d"]}) == "never compared: c, d"
    assert verdict({**result, "loss": NAN, "missing": []}).startswith("loss off by nan")


def test_a_gradient_that_is_not_there():
    """Of a parameter that this rank has; another stage's may be missing."""
    ours = result_of()
    del ours["steps"][0]["grads"]["b"]
    result = compare(ours, result_of())
    assert result["grads"] == INF and result["worst"]["grads"] == "b at step 1"
    assert compare(result_of(names=("a",)), result_of())["grads"] == 0.0
    more = compare(result_of(names=("a", "b", "c")), result_of())
    assert more["grads"] == more["weights"] == INF


@pytest.mark.parametrize(
    "right, got, agrees", [(1e-8, -1e-8, True), (1e-3, 1.0002e-3, False)], ids=["faint", "small"]
)
def test_a_gradient_that_is_nothing_but_rounding(right, got, agrees):
    """It may differ as it likes, and nothing else may: beside all of them, whose norm is 1."""
    ours, truth = result_of(), result_of()
    truth["steps"][0]["grads"]["a"] = torch.tensor([right, 0.0])
    ours["steps"][0]["grads"]["a"] = torch.tensor([got, 0.0])
    told = verdict({**compare(ours, truth), "missing": []})
    assert (told == "agrees") == agrees, told


def test_the_first_step_that_is_off_speaks():
    ours, truth = result_of(), result_of()
    for run in (ours, truth):
        run["steps"] = [result_of()["steps"][0] for _ in range(3)]
    ours["steps"][1]["grads"]["a"] += 0.01
    ours["steps"][2]["grads"]["b"] += 1
    result = compare(ours, truth)
    assert result["worst"]["grads"] == "a at step 2" and result["grads"] < 0.1
    other = compare(result_of(grad=1.0001), result_of())  # within tolerance, and earlier
    assert worst_of([other, result])["worst"]["grads"] == "a at step 2"
    ours["steps"][0]["grads"]["b"] *= 1.001
    assert worst_of([result, compare(ours, truth)])["worst"]["grads"] == "b at step 1"


def test_worst_of_ranks():
    first = compare(result_of(loss=2.1, names=("a",)), result_of())
    second = compare(result_of(grad=NAN, names=("b",)), result_of())
    whole = worst_of([first, second])
    assert whole["loss"] == first["loss"] and whole["worst"]["loss"] == "step 1"
    assert whole["grads"] == INF and whole["worst"]["grads"] == "b at step 1"
    assert whole["parameters"] == ["a", "b", "buffer"]


# --- how plans are broken --------------------------------------------------------------------


def test_a_broken_function_is_broken_where_it_was_imported_and_only_meanwhile():
    broken = Broken("loss.py", (("return pred", "return pred + 1"),))
    for _ in range(2):
        assert summed_loss(1, None) == 1
        with pytest.raises(ZeroDivisionError), broken():
            assert summed_loss(1, None) == 2
            raise ZeroDivisionError
    decorated = Broken("parallel/tp.py", (("by_group: dict", "1 / 0; by_group: dict"),))
    with decorated(), pytest.raises(ZeroDivisionError):
        sum_replicated_gradients([])
    sum_replicated_gradients([])


def test_a_mistake_must_be_possible():
    for edits in ((("no such words", ""),), (("labels", "x"),)):  # none, and more than one
        with pytest.raises(AssertionError, match="loss.py holds"):
            Broken("loss.py", edits).text()
    with (
        pytest.raises(AssertionError, match="nothing"),
        Broken("loss.py", (("Where the loss", "There the loss"),))(),
    ):
        pass
