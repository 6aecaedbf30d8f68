"""A TOML file and a command line become one checked JobConfig, or one line that says why not.

TorchTitan's ConfigManager does the merging (command line over TOML over defaults). Before it runs, names
and types are checked here, so that a typo is told with the name that was probably meant; after it,
`resolve` replaces every ``auto`` and `check` compares fields with each other.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
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

_ARGUMENT = re.compile(r"--([\w.\-]+)(?:=(.*))?$", re.DOTALL)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
# TorchTitan's options that mean nothing here: set, they would be passed over in silence or fail late.
_NOT_HERE = (
    "job.custom_config_module", "model.converters", "model.tokenizer_path", "quantize",
    "optimizer.early_step_in_backward", "training.dataset", "training.dataset_path",
    "training.dataloader", "checkpoint.initial_load_in_hf", "checkpoint.initial_load_in_hf_quantized",
    "checkpoint.last_save_in_hf", "checkpoint.create_seed_checkpoint",
    "checkpoint.enable_ft_dataloader_checkpoints", "comm.mode", "memory_estimation",
    "fault_tolerance", "experimental", "validation.dataset", "validation.dataset_path",
    "validation.steps", "validation.dataloader", "debug.moe_force_load_balance",
)


def parse(argv: list[str]) -> JobConfig:
    """The run that ``argv`` describes, checked and with every ``auto`` resolved.

    Raises:
        UserError: a name, a type or a value is wrong.
        SystemExit: --help was asked for (code 0).
    """
    merged = ConfigManager._merge_configs(JobConfig, config.JobConfig)
    known = option_types(merged)
    given = check_arguments([a for a in argv if a not in ("-h", "--help")], known)
    file = given.get("job.config_file")
    if file is not None:
        check_table(read_toml(file), known, file)
    told = ["--help"] if {"-h", "--help"} & set(argv) else []
    job = _merge(["--job.custom_config_module=microtron.config", *as_tyro(given, known), *told])
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
        raise UserError(f"cannot read the run's TOML {path!r}: {error.strerror}; "
                        "train_configs/ holds ready ones") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}; mend that place, or start from one of those in "
                        "train_configs/") from None


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
    """Option -> its last value, as text. A value may stand behind "=" or a space; a bool may have none.

    Raises:
        UserError: an option that does not exist (with the closest name that does), a value of the wrong
            type, an argument that belongs to no option.
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
            raise UserError(f"argument {argument!r} belongs to no option: write --section.key=value, and "
                            "the items of a list with commas between them")
    for name, value in values.items():
        if value is None:
            raise UserError(f"option --{name} has no value: write --{name}=..., "
                            f"{describe(known[name])} is expected")
        if not any(matches(reading, known[name]) for reading in _readings(value)):
            raise UserError(f"option --{name}={value} has the wrong type: "
                            f"{describe(known[name])} is expected")
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


def _readings(text: str) -> list[Any]:
    """The values that a word of the command line can stand for."""
    items = text.split(",")
    found: list[Any] = [text, items, [items]]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            found.append([kind(item) for item in items])
            found.append(kind(text))
    if text.lower() in ("true", "false"):
        found.append(text.lower() == "true")
    return found + [None] * (text == "None")


def as_tyro(values: dict[str, str], known: dict[str, Any]) -> list[str]:
    """The same options in tyro's spelling."""
    argv = []
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        if known[name] is bool:
            argv.append(f"--{section}.{key if value.lower() == 'true' else 'no_' + key}")
        elif known[name] in (list[int], list[float]):
            argv += [f"--{name}", *filter(None, value.split(","))]
        else:
            optional_bool = bool in typing.get_args(_plain(known[name]))
            argv.append(f"--{name}={value.capitalize() if optional_bool else value}")
    return argv


def _plain(expected: Any) -> Any:
    """The annotation without its help text."""
    return typing.get_args(expected)[0] if typing.get_origin(expected) is Annotated else expected


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
    require(not job.metrics.enable_wandb or importlib.util.find_spec("wandb") is not None,
            "metrics.enable_wandb", "wandb is not installed: pip install wandb")
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
