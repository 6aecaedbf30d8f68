"""``microtron <command>``: a table of commands, each imported only when it is called.

Run ``microtron`` for the list and ``microtron <command> --help`` for the options of one.
"""

import importlib
import sys

from microtron.errors import UserError

# command -> (module:function, one line of help). The function's arguments are its options (tyro).
COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("microtron.data.prepare:prepare", "documents -> token shards (.bin + dataset.json)"),
    "train-bpe": ("microtron.data.train_bpe:train_bpe", "train a byte-level BPE tokenizer on documents"),
}


def usage() -> str:
    """The list of commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: microtron COMMAND [OPTIONS]\n\ncommands:\n" + "\n".join(lines) + (
        "\n\n`microtron COMMAND --help` explains the options; ./run_train.sh trains."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 1 refused, 2 no such command)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    import tyro

    target = COMMANDS[argv[0]][0]
    module, function = target.split(":")
    try:
        tyro.cli(getattr(importlib.import_module(module), function), args=argv[1:],
                 prog=f"microtron {argv[0]}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
