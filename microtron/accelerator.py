"""CUDA if there is one, else CPU with gloo. Import this module before torchtitan.

It is the one module that works at import: TorchTitan 0.2.2 decides on its device while being
imported and falls back to "cuda" when there is none; it imports triton, which a CPU build of torch
does not bring, for kernels that microtron does not use; and it imports `datasets` and, on a CPU,
torch's compiler, which took a third of the start and which a run asks for seldom. These are settled
here, and nothing else.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"


class CpuDevice:
    """What TorchTitan asks of a device module, answered for the CPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch.cpu, name)

    @staticmethod
    def device_count() -> int:
        """Ranks share one CPU."""
        return 1

    @staticmethod
    def set_device(device: object) -> None:
        """There is only one."""

    @staticmethod
    def current_device() -> int:
        """There is only one."""
        return 0

    @staticmethod
    def get_device_name(device: object = None) -> str:
        """The processor's name."""
        return cpu_name()

    @staticmethod
    def get_device_properties(device: object = None) -> SimpleNamespace:
        """Its memory, in bytes."""
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return SimpleNamespace(total_memory=pages * size)

    @staticmethod
    def memory_stats(device: object = None) -> dict[str, int]:
        """The process's peak resident set stands for active and reserved memory."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    @staticmethod
    def reset_peak_memory_stats() -> None:
        """The system keeps one peak a process."""

    @staticmethod
    def empty_cache() -> None:
        """There is none."""


def cpu_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class LateModule(types.ModuleType):
    """A module that is imported when a function of it is called, or anything else is asked of it.

    ``from module import build_x`` gives a function that imports the module first.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what importing asks of any module
            raise AttributeError(name)
        if name.startswith("build_"):
            return lambda *given, **options: getattr(self._real(), name)(*given, **options)
        return getattr(self._real(), name)

    def _real(self) -> types.ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


def compile_late(function: Callable | None = None, **options: object) -> Callable:
    """`torch.compile` at the first call: the compiler takes a second to import."""
    if function is None:  # a decorator with options alone
        return functools.partial(compile_late, **options)

    @functools.cache
    def made() -> Callable:
        return torch.compile(function, **options)

    return functools.wraps(function)(lambda *given, **named: made()(*given, **named))


@contextlib.contextmanager
def _seen_as_accelerator() -> Iterator[None]:
    """While TorchTitan is imported, the CPU is the device, and what it compiles at once waits."""
    find = torch._utils._get_device_module
    with (
        mock.patch("torch._utils._get_available_device_type", lambda: "cpu"),
        mock.patch(
            "torch._utils._get_device_module",
            lambda kind: CpuDevice() if kind == "cpu" else find(kind),
        ),
        mock.patch("torch.compile", compile_late),
    ):
        yield


def _settle() -> None:
    kernels = "torchtitan.models.moe.kernels"
    if importlib.util.find_spec("triton") is None and kernels not in sys.modules:
        stand_in = types.ModuleType(kernels, "TorchTitan's triton kernels; not used here.")
        stand_in.generate_permute_indices = None
        sys.modules[kernels] = stand_in
    texts = "torchtitan.hf_datasets.text_datasets"
    sys.modules.setdefault(texts, LateModule(texts))
    if DEVICE_TYPE == "cpu":
        with _seen_as_accelerator():
            import torchtitan.tools.utils as titan_utils
        titan_utils.get_peak_flops = lambda name: measured_peak_flops()


@functools.cache
def measured_peak_flops(size: int = 768, seconds: float = 0.15) -> float:
    """FLOP/s of an fp32 matrix product with the threads in use: the CPU's ceiling for MFU."""
    from microtron.model.cpu_product import product

    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


_settle()
