"""A mistake in the plans: a few words of a source file that say something else while a run lasts.

`Broken` compiles the file with other words and hands the new code to the functions that exist, so
that whoever imported them runs it too. Words that the file does not hold exactly once are an error:
a mistake that nobody makes any more must not pass for one that is caught.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


@dataclass(frozen=True)
class Broken:
    """``file`` (a module's path in the package) where each old text reads new."""

    file: str
    edits: tuple[tuple[str, str], ...]

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        """The context in which it is broken."""
        return _swapped(self)

    @property
    def module(self):
        """The module, imported."""
        return importlib.import_module(
            "microtron." + self.file.removesuffix(".py").replace("/", ".")
        )

    def text(self) -> str:
        """The source with its mistakes."""
        source = inspect.getsource(self.module)
        for old, new in self.edits:
            assert source.count(old) == 1, f"{self.file} holds {source.count(old)} times {old!r}"
            source = source.replace(old, new)
        return source


def functions_of(code: CodeType) -> Iterator[CodeType]:
    """The code of functions and methods of a module; not of functions within functions."""
    for const in code.co_consts:
        if isinstance(const, CodeType) and not const.co_name.startswith("<"):
            if const.co_flags & inspect.CO_NEWLOCALS:
                yield const
            else:  # a class body
                yield from functions_of(const)


def _function(module, qualname: str) -> FunctionType:
    """The function of that name, out of its decorators."""
    found = functools.reduce(inspect.getattr_static, qualname.split("."), module)
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    return inspect.unwrap(found)


@contextlib.contextmanager
def _swapped(broken: Broken) -> Iterator[None]:
    name = broken.module.__file__
    right = compile(inspect.getsource(broken.module), name, "exec")
    wrong = compile(broken.text(), name, "exec")
    before: dict[FunctionType, CodeType] = {}
    for old, new in zip(functions_of(right), functions_of(wrong), strict=True):
        if old != new:
            function = _function(broken.module, old.co_qualname)
            before[function] = function.__code__
            function.__code__ = new
    assert before, f"nothing of {broken.file} that runs has changed"
    try:
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code


class OwnPart(DefaultReduceScatter):
    """In place of FSDP2's reduce-scatter: each rank keeps its part of what it has itself."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        """The signature of `DefaultReduceScatter`."""
        with torch.no_grad():
            output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
