"""A TOML file and a command line become one checked JobConfig, or one line that says why not.

Command line over TOML over defaults, as TorchTitan's ConfigManager has it. Names and types are
checked first, so that a typo is told with the name that was probably meant; then `resolve` replaces
every ``auto``, and `check.py` looks at the values. ConfigManager itself prints --help alone: it
reads the source of every section for that, which took half a second of each start.
"""

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from typing import Annotated, Any, Literal

from microtron.accelerator import DEVICE_TYPE

import tomli
from torchtitan.config import ConfigManager, JobConfig

from microtron import config
from microtron.check import check
from microtron.errors import UserError

_ARGUMENT = re.compile(r"--([\w.\-]+)(?:=(.*))?$", re.DOTALL)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def parse(argv: list[str]) -> JobConfig:
    """The run that ``argv`` describes, checked and with every ``auto`` resolved.

    Raises:
        UserError: a name, a type or a value is wrong.
        SystemExit: --help was asked for (code 0).
    """
    merged = ConfigManager._merge_configs(JobConfig, config.JobConfig)
    known = option_types(merged)
    given = check_arguments([a for a in argv if a not in ("-h", "--help")], known)
    file, table = given.get("job.config_file"), {}
    if file is not None:
        table = read_toml(file)
        check_table(table, known, file)
    if {"-h", "--help"} & set(argv):
        shown = [] if file is None else [f"--job.config_file={file}"]  # its values as defaults
        ConfigManager().parse_args(
            ["--job.custom_config_module=microtron.config", *shown, "--help"]
        )
    values = {name: reading(text, known[name]) for name, text in given.items()}
    job = merge(merged, table, values)
    resolve(job)
    check(job)
    return job


def read_toml(path: str) -> dict[str, Any]:
    """The file's tables.

    Raises:
        UserError: there is no such file, or it is not TOML.
    """
    try:
        with open(path, "rb") as f:
            return tomli.load(f)
    except OSError as error:
        raise UserError(
            f"cannot read the run's TOML {path!r}: {error.strerror}; "
            "train_configs/ holds ready ones"
        ) from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not TOML: {error}; mend that place, or start from one of those "
            "in train_configs/"
        ) from None


def option_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted option name -> annotation, for every leaf of a config dataclass."""
    found = {}
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        if dataclasses.is_dataclass(f.type):
            found |= option_types(f.type, name + ".")
        else:
            found[name] = f.type
    return found


def closest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` for the likeliest known name, or how to list them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        last = name.rsplit(".", 1)[-1]
        near = [k for k in known if k.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {near[0]}?" if near else "; ./run_train.sh --help lists them all"


def check_arguments(argv: list[str], known: dict[str, Any]) -> dict[str, str]:
    """Option -> its last value, as text. It may stand behind "=" or a space; a bool may have none.

    Raises:
        UserError: an option that does not exist (with the closest name that does), a value of the
            wrong type, an argument that belongs to no option.
    """
    values: dict[str, str | None] = {}
    waiting = ""  # the option whose value may be the next argument
    for argument in argv:
        match = _ARGUMENT.match(argument)
        if match is not None:
            name, value = _known_name(match[1].replace("-", "_"), match[2], known)
            values[name], waiting = value, name if value is None else ""
        elif argument.startswith("-") and not re.match(r"-[\d.]", argument):
            raise UserError(f"option {argument!r} is not of the form --section.key=value")
        elif waiting:
            before = values[waiting]
            values[waiting] = argument if before is None else f"{before},{argument}"
            waiting = waiting if typing.get_origin(known[waiting]) is list else ""
        else:
            raise UserError(
                f"argument {argument!r} belongs to no option: write "
                "--section.key=value, and the items of a list with commas between them"
            )
    for name, value in values.items():
        if value is None:
            raise UserError(
                f"option --{name} has no value: write --{name}=..., "
                f"{describe(known[name])} is expected"
            )
        try:
            reading(value, known[name])
        except ValueError:
            raise UserError(
                f"option --{name}={value} is refused: {describe(known[name])} is expected"
            ) from None
    return values


def _known_name(name: str, value: str | None, known: dict[str, Any]) -> tuple[str, str | None]:
    """The option, and its value where the name alone says it (--section.key, --section.no_key)."""
    section, _, key = name.rpartition(".")
    positive = f"{section}.{key.removeprefix('no_')}"
    if known.get(name) is bool:
        return name, "true" if value is None else value
    if known.get(positive) is bool and value is None:
        return positive, "false"
    if name not in known:
        raise UserError(f"option --{name} does not exist{closest(name, known)}")
    return name, value


def reading(text: str, expected: Any) -> Any:  # noqa: ANN401
    """The value that a word of the command line stands for, where ``expected`` is annotated.

    Raises:
        ValueError: it stands for none.
    """
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return reading(text, inner[0])
    if origin in (typing.Union, types.UnionType):
        for kind in sorted(inner, key=lambda kind: kind is not types.NoneType):
            with contextlib.suppress(ValueError):
                return reading(text, kind)
    elif origin is list:
        kind = inner[0]
        if typing.get_origin(kind) is list:
            return [reading(text, kind)]
        return [reading(item, kind) for item in text.split(",")]
    elif origin is Literal and text in inner or expected is str:
        return text
    elif expected is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif expected in (int, float):
        return expected(text)
    elif expected is types.NoneType and text == "None":
        return None
    raise ValueError(text)


def merge(cls: type, table: dict[str, Any], values: dict[str, Any], prefix: str = "") -> Any:  # noqa: ANN401
    """A config dataclass: ``values`` (dotted names) over the TOML's ``table`` over its defaults.

    Raises:
        UserError: a section's own check refuses its values.
    """
    made = {}
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        if dataclasses.is_dataclass(f.type):
            made[f.name] = merge(f.type, table.get(f.name, {}), values, f"{name}.")
        elif name in values:
            made[f.name] = values[name]
        elif f.name in table:
            made[f.name] = table[f.name]
    try:
        return cls(**made)
    except (ValueError, AssertionError) as error:  # TorchTitan's, in __post_init__
        told = f"section {prefix.rstrip('.')} is refused: {' '.join(str(error).split())}"
        raise UserError(f"{told} (./run_train.sh --help explains the options)") from None


def check_table(table: dict[str, Any], known: dict[str, Any], file: str, prefix: str = "") -> None:
    """Refuses unknown keys and wrong types in a TOML table.

    Raises:
        UserError: with the key, the value and what was expected.
    """
    for key, value in table.items():
        name = prefix + key
        if name in known:
            expected = known[name]
            if not matches(value, expected):
                raise UserError(
                    f"{file}: {name} = {value!r} is refused: {describe(expected)} is expected"
                )
        elif any(k.startswith(name + ".") for k in known) and isinstance(value, dict):
            check_table(value, known, file, name + ".")
        else:
            if any(k.startswith(name + ".") for k in known):
                raise UserError(
                    f"{file}: {name} = {value!r} is a section, not a key: write "
                    f"[{name}] and its keys below it"
                )
            kind = "section" if isinstance(value, dict) else "key"
            near = {k.rsplit(".", 1)[0] for k in known} if kind == "section" else known
            raise UserError(f"{file}: there is no {kind} {name}{closest(name, near)}")


def matches(value: Any, expected: Any) -> bool:
    """Whether a TOML value fits an annotation (int, float, bool, str, Literal, list, unions)."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return matches(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(matches(v, inner[0]) for v in value)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is expected


def describe(expected: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return describe(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(kind) for kind in inner if kind is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is list:
        return f"a list, each item {describe(inner[0])},"
    return _WORDS.get(expected, str(expected))


def resolve(job: JobConfig) -> None:
    """Replaces every ``auto`` by what this machine gets."""
    cuda = DEVICE_TYPE == "cuda"
    if job.training.mixed_precision_param == "auto":
        job.training.mixed_precision_param = "bfloat16" if cuda else "float32"
    if job.checkpoint.async_mode == "auto":
        job.checkpoint.async_mode = "async" if cuda else "disabled"
    if job.validation.seq_len == -1:
        job.validation.seq_len = job.training.seq_len
