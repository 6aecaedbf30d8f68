"""A TOML file and a command line become one checked JobConfig, or one line that says why not.

TorchTitan's ConfigManager does the merging (command line over TOML over defaults). Before it runs, names
and types are checked here, so that a typo is told with the name that was probably meant; after it,
`resolve` replaces every ``auto`` and `check` compares fields with each other.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from typing import Annotated, Any, Literal

from microtron.accelerator import DEVICE_TYPE

import tomli
from torchtitan.config import ConfigManager, JobConfig

from microtron import config
from microtron.errors import UserError
from microtron.flavors import flavor

_ARGUMENT = re.compile(r"--([\w.\-]+)(?:=.*)?$", re.DOTALL)


def parse(argv: list[str]) -> JobConfig:
    """The run that ``argv`` describes, checked and with every ``auto`` resolved.

    Raises:
        UserError: a name, a type or a value is wrong.
        SystemExit: --help was asked for (code 0).
    """
    merged = ConfigManager._merge_configs(JobConfig, config.JobConfig)
    known = option_types(merged)
    check_names([a for a in argv if a not in ("-h", "--help")], known)
    file = config_file(argv)
    if file is not None:
        check_table(read_toml(file), known, file)
    job = _merge(["--job.custom_config_module=microtron.config", *argv])
    resolve(job)
    check(job)
    return job


def config_file(argv: list[str]) -> str | None:
    """The TOML that the command line names, if any."""
    for i, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == "__job.config_file":
            return value or (argv[i + 1] if i + 1 < len(argv) else "")
    return None


def read_toml(path: str) -> dict[str, Any]:
    """The file's tables.

    Raises:
        UserError: there is no such file, or it is not TOML.
    """
    try:
        with open(path, "rb") as f:
            return tomli.load(f)
    except OSError as error:
        raise UserError(f"cannot read the run's TOML {path!r}: {error.strerror}; "
                        "train_configs/ holds ready ones") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


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


def check_names(argv: list[str], known: dict[str, Any]) -> None:
    """Refuses options that do not exist.

    Raises:
        UserError: with the closest name that does.
    """
    for argument in argv:
        match = _ARGUMENT.match(argument)
        if match is None:
            if argument.startswith("-") and not re.match(r"-[\d.]", argument):
                raise UserError(f"option {argument!r} is not of the form --section.key=value")
            continue
        name = match[1].replace("-", "_")
        section, _, key = name.rpartition(".")
        positive = f"{section}.{key.removeprefix('no_')}"
        if name not in known and not (positive in known and known[positive] is bool):
            raise UserError(f"option --{match[1]} does not exist{closest(name, known)}")


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
                raise UserError(f"{file}: {name} = {value!r} has the wrong type: "
                                f"{describe(expected)} is expected")
        elif any(k.startswith(name + ".") for k in known) and isinstance(value, dict):
            check_table(value, known, file, name + ".")
        else:
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
        return f"a list of {describe(inner[0])}"
    return getattr(expected, "__name__", str(expected))


def _merge(argv: list[str]) -> JobConfig:
    """ConfigManager's work, its boxed complaints turned into one line."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return ConfigManager().parse_args(argv)
    except SystemExit as stop:
        if not stop.code:
            print(out.getvalue())
            raise
        told = re.sub(r"[─-╿]+|-{5,}", " ", err.getvalue() + out.getvalue())
        told = re.split("Argument helptext|For full helptext", told)[0].strip()
        raise UserError(f"{told} (./run_train.sh --help explains the options)") from None


def resolve(job: JobConfig) -> None:
    """Replaces every ``auto`` by what this machine gets."""
    cuda = DEVICE_TYPE == "cuda"
    if job.training.mixed_precision_param == "auto":
        job.training.mixed_precision_param = "bfloat16" if cuda else "float32"
    if job.checkpoint.async_mode == "auto":
        job.checkpoint.async_mode = "async" if cuda else "disabled"
    if job.validation.seq_len == -1:
        job.validation.seq_len = job.training.seq_len


def overrides(job: JobConfig) -> dict[str, Any]:
    """The fields of [model.args] that were given."""
    return {k: v for k, v in dataclasses.asdict(job.model.args).items() if v is not None}


def check(job: JobConfig) -> None:
    """Compares fields with each other.

    Raises:
        UserError: with the field, the value and the remedy.
    """
    def require(ok: bool, name: str, remedy: str) -> None:
        if not ok:
            section, key = name.rsplit(".", 1)
            value = job
            for part in [*section.split("."), key]:
                value = getattr(value, part)
            raise UserError(f"{name} = {value!r} cannot work: {remedy}")

    require(job.model.name == "microtron", "model.name", "write microtron")
    flavor(job.model.flavor).override(overrides(job))
    for name in ("training.steps", "training.seq_len", "training.local_batch_size",
                 "checkpoint.interval", "metrics.log_freq", "validation.freq",
                 "validation.local_batch_size", "sample.tokens", "training.gc_freq"):
        section, key = name.split(".")
        require(getattr(getattr(job, section), key) >= 1, name, "give a positive number")
    require(job.training.max_norm > 0, "training.max_norm", "give a number above 0 (1e9: off)")
    require(job.optimizer.lr > 0, "optimizer.lr", "give a learning rate above 0")
    require(job.optimizer.name in ("Adam", "AdamW"), "optimizer.name", "choose Adam or AdamW")
    require(job.lr_scheduler.warmup_steps >= 0, "lr_scheduler.warmup_steps", "give 0 or more steps")
    ratio = job.lr_scheduler.decay_ratio
    require(ratio is None or 0 <= ratio <= 1, "lr_scheduler.decay_ratio",
            "give the share of the steps that decays, from 0 to 1")
    require(job.checkpoint.keep_latest_k != 1 and job.checkpoint.keep_latest_k >= 0,
            "checkpoint.keep_latest_k", "keep 2 or more (one may be half-written), or 0 for all")
    require(job.validation.val_tokens == -1 or job.validation.val_tokens > 0,
            "validation.val_tokens", "give a number of tokens, or -1 for the whole split")
    require(job.validation.val_target is None or job.validation.enable, "validation.val_target",
            "set validation.enable = true, or there is no loss to compare with")
    require(0 < job.data.val_fraction < 1, "data.val_fraction", "give a share between 0 and 1")
    require(job.data.prefetch >= 0, "data.prefetch", "give 0 or more batches")
    require(job.sample.temperature >= 0, "sample.temperature", "give 0 (greedy) or more")
    require(job.sample.top_k >= 0, "sample.top_k", "give 0 (all tokens) or more")
    require(bool(job.data.dirs) or job.data.mock, "data.dirs",
            "name a dataset folder made by `microtron prepare`, or set data.mock = true")
    require(not job.data.weights or len(job.data.weights) == len(job.data.dirs), "data.weights",
            f"give one weight for each of the {len(job.data.dirs)} folders in data.dirs")
    p = job.profiling
    require(not p.enable_profiling or p.profile_freq >= p.profiler_active + p.profiler_warmup,
            "profiling.profile_freq", "give at least profiler_active + profiler_warmup = "
            f"{p.profiler_active + p.profiler_warmup} steps")
    require(not p.enable_memory_snapshot or DEVICE_TYPE == "cuda",
            "profiling.enable_memory_snapshot", "it records the CUDA allocator; leave it out on CPU")
    if job.checkpoint.async_mode == "async_with_pinned_mem":
        require(DEVICE_TYPE == "cuda", "checkpoint.async_mode", "it needs CUDA; use async")
    if job.model.args.attn_backend == "flex":
        require(DEVICE_TYPE == "cuda", "model.args.attn_backend",
                "FlexAttention trains on CUDA only; use sdpa")
