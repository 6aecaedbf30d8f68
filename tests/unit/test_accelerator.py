"""The device that TorchTitan sees, and the choice of threads."""

import importlib
import inspect
import sys

import pytest
import torch

from microtron import accelerator
from microtron import threads as thread_count


def test_torchtitan_got_the_device_that_is_there():
    from torchtitan.tools import utils

    assert utils.device_type == accelerator.DEVICE_TYPE
    assert utils.device_module.device_count() >= 1
    # The stand-in is not left behind for the rest of torch.
    assert "mock" not in repr(torch._utils._get_device_module).lower()
    assert torch.compile is not accelerator.compile_late
    if accelerator.DEVICE_TYPE == "cpu":
        assert torch._utils._get_available_device_type() is None
        assert 1e8 < utils.get_peak_flops("a CPU") < 1e14


def test_compiled_at_the_first_call(monkeypatch):
    asked = []

    def compiling(function, **options):
        asked.append(options)
        return lambda value: function(value) + 1

    monkeypatch.setattr(torch, "compile", compiling)
    late = accelerator.compile_late(abs, mode="max-autotune")
    assert asked == [] and late.__name__ == "abs"
    assert (late(-3), late(-5)) == (4, 6) and asked == [{"mode": "max-autotune"}]
    assert accelerator.compile_late(dynamic=True)(abs)(-3) == 4 and asked[1:] == [{"dynamic": True}]


def test_a_late_module_is_imported_when_it_is_needed(monkeypatch, tmp_path):
    """Once, by a call or by any other name; `import` alone, and what looks at all modules, are no
    need.
    """
    (tmp_path / "put_off.py").write_text("FIXED = 7\ndef build_sum(a, *, b): return a + b\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for ask in (lambda m: m.build_sum(3, b=4), lambda m: m.FIXED):
        late = accelerator.LateModule("put_off")
        monkeypatch.setitem(sys.modules, "put_off", late)
        import put_off
        from put_off import build_sum

        assert put_off is late and not hasattr(late, "__file__")
        assert inspect.getmodule(compile("0", "nowhere", "eval")) is None
        assert sys.modules["put_off"] is late
        assert ask(late) == build_sum(3, b=4) == 7
        assert sys.modules["put_off"] is importlib.import_module("put_off") is not late
        with pytest.raises(AttributeError):
            late.missing  # noqa: B018


def test_memory_is_the_process_s_own():
    device = accelerator.CpuDevice()
    peak = device.memory_stats()["active_bytes.all.peak"]
    total = device.get_device_properties().total_memory
    assert 50e6 < peak < total
    block = torch.ones(40_000_000)  # 160 MB, so that the peak moves
    assert device.memory_stats()["active_bytes.all.peak"] >= peak
    assert device.get_device_name() and block.sum() == 40_000_000


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pretend(monkeypatch, seconds, cores):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(thread_count.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(thread_count, "_probe", lambda: seconds[torch.get_num_threads()])


@pytest.mark.parametrize(
    "seconds, cores, ranks, chosen",
    [
        ({1: 0.02, 2: 0.20}, 2, 1, 1),  # spin-waiting: the second thread hurts
        ({1: 0.02, 2: 0.011}, 2, 1, 2),
        ({1: 0.02, 2: 0.018}, 2, 1, 1),  # hardly better: not worth it
        ({1: 0.08, 2: 0.04, 4: 0.02, 8: 0.03}, 8, 1, 4),
        ({1: 0.08, 2: 0.04, 4: 0.02, 8: 0.01}, 8, 4, 2),  # four ranks share eight cores
    ],
)
def test_the_probe_picks(monkeypatch, threads, seconds, cores, ranks, chosen):
    pretend(monkeypatch, seconds, cores)
    told = thread_count.pick_threads(ranks)
    assert torch.get_num_threads() == chosen
    assert told.startswith(f"{chosen} CPU thread") and "probe" in told


def test_omp_num_threads_wins(monkeypatch, threads):
    pretend(monkeypatch, {}, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" in thread_count.pick_threads()


def test_measured_peak_is_plausible():
    assert 1e8 < accelerator.measured_peak_flops(size=256, seconds=0.05) < 1e14
