"""``microtron <command>``: a table of commands, each imported only when it is called.

Run ``microtron`` for the list and ``microtron <command> --help`` for the options of one.
"""

import contextlib
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable

from microtron import __version__
from microtron.errors import UserError, unboxed

# command -> (module:function, one line of help). The function's arguments are its options (tyro).
COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": (
        "microtron.data.prepare:prepare",
        "documents -> token shards (.bin + dataset.json)",
    ),
    "train-bpe": (
        "microtron.data.train_bpe:train_bpe",
        "train a byte-level BPE tokenizer on documents",
    ),
    "estimate": (
        "microtron.scaling.estimate:estimate",
        "memory, communication and least time of a run, without a GPU",
    ),
    "certify": (
        "microtron.certificate.certify:certify",
        "compare every parallel layout with one process",
    ),
    "convert to-hf": (
        "microtron.hf.to_hf:to_hf",
        "a checkpoint -> a Hugging Face folder, checked in transformers",
    ),
    "convert from-hf": (
        "microtron.hf.from_hf:from_hf",
        "a Hugging Face folder (gpt-oss, GPT-2, Llama) -> a checkpoint",
    ),
    "generate": ("microtron.infer.generate:generate", "continue a prompt"),
    "chat": ("microtron.infer.chat:chat", "talk with a checkpoint"),
    "eval": ("microtron.evals.run:evaluate", "scores, beside GPT-2's"),
    "push": ("microtron.hf.push:push", "upload an exported folder to the Hugging Face hub"),
}


def usage() -> str:
    """The list of commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: microtron COMMAND [OPTIONS]\n\ncommands:\n"
        + "\n".join(lines)
        + ("\n\n`microtron COMMAND --help` explains the options; ./run_train.sh trains.")
    )


def bind(function: Callable[..., object], command: str, argv: list[str]) -> Callable[[], object]:
    """The function with its options from ``argv``, not yet called.

    Raises:
        UserError: the options do not fit it.
        SystemExit: --help was asked for (code 0).
    """
    import tyro

    @functools.wraps(function)
    def bound(**options: object) -> Callable[[], object]:
        return functools.partial(function, **options)

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(bound, args=argv, prog=f"microtron {command}")
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(
            f"{unboxed(told.getvalue())} (`microtron {command} --help` explains the options)"
        ) from None


def _unknown(argv: list[str]) -> int:
    """Says what there is, for a command that is not there or is only half of one."""
    half = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if half and argv[1:] in ([], ["-h"], ["--help"]):
        lines = [f"  {name}  {COMMANDS[name][1]}" for name in half]
        print("\n".join([f"usage: microtron {argv[0]} COMMAND [OPTIONS]", "", *lines]))
        return 0 if argv[1:] else 2
    wanted = " ".join(argv[:2]) if half else argv[0]
    there = ", ".join(half or COMMANDS)
    print(f"error: no command {wanted!r}; there are: {there}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 1 refused, 2 no such command)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"microtron {__version__}")
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    command, options = " ".join(argv[:words]), argv[words:]
    if command not in COMMANDS:
        return _unknown(argv)
    module, function = COMMANDS[command][0].split(":")
    try:
        code = bind(getattr(importlib.import_module(module), function), command, options)()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
