"""A model to run, from a checkpoint of training or from a Hugging Face folder.

    loaded = load("outputs/debug/checkpoint/step-300")        # or the run's folder: its newest step
    loaded = load("exports/mine", device="cuda", dtype=torch.bfloat16)

The model is built without memory, given empty tensors of the wanted type on the wanted device, and
filled one tensor at a time, so a load needs one model and one tensor. Any layout's step will do.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from microtron import checkpoints, dcp
from microtron.data.tokenizers import Tokenizer, load_tokenizer
from microtron.errors import UserError
from microtron.hf.folder import check_finite
from microtron.model.args import ModelArgs
from microtron.model.model import Transformer, empty_model
from microtron.threads import pick_threads


@dataclass
class Loaded:
    """What `load` found.

    Attributes:
        model: in eval mode.
        tokenizer: None where the checkpoint brings none and none was named.
        prefix_ids: tokens that stand before a text that begins a document.
        stop_ids: tokens that end a text: eot, and what a Hugging Face folder names besides.
        max_tokens: the longest sequence it was made for, where that is known.
        path: the step or the folder that was read.
    """

    model: Transformer
    args: ModelArgs
    tokenizer: Tokenizer | None
    prefix_ids: list[int]
    stop_ids: tuple[int, ...]
    max_tokens: int | None
    path: Path
    kind: Literal["dcp", "hf"]

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises: UserError where there is none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.path} brings no tokenizer: name the one it was trained with by --tokenizer "
                "(byte, gpt2, ..., or a tokenizer.json)"
            )
        return self.tokenizer


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
) -> Loaded:
    """Loads a model and its tokenizer.

    Args:
        path: a step folder, a run's folder (its newest whole step), or a Hugging Face folder.
        device: cpu, cuda, cuda:1, ...
        dtype: of the parameters.
        tokenizer: a spec of `load_tokenizer`, in place of the checkpoint's own.

    Raises:
        UserError: no checkpoint there, one that is damaged or of an unknown architecture, a
            tokenizer that does not fit, no such device.
    """
    place, path = check_device(device), Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: name a checkpoint/step-N folder, the run it is in, or a "
            "Hugging Face folder on this disk (names of the hub are not downloaded)"
        )
    read = _load_hf if is_hf(path) else _load_step
    loaded = read(path, place, dtype, tokenizer)
    own = loaded.tokenizer
    if own is not None:
        if own.vocab_size > loaded.args.vocab_size:
            raise UserError(
                f"tokenizer {own.name} has {own.vocab_size:,} tokens, and the model in {path} "
                f"knows {loaded.args.vocab_size:,}: name its own tokenizer by --tokenizer"
            )
        loaded.prefix_ids = list(own.prefix_ids)
        loaded.stop_ids = tuple({own.eot_id: None} | dict.fromkeys(loaded.stop_ids))
    return loaded


def _load_step(
    path: Path, device: torch.device, dtype: torch.dtype, tokenizer: str | None
) -> Loaded:
    step = checkpoints.find_step(path)
    args = checkpoints.architecture(step)
    model = empty_model(args, device, dtype)
    dcp.read_into(step, model)
    for name, parameter in model.named_parameters():
        check_finite(parameter.detach(), f"{step}: {name}")
    if tokenizer is None:
        own = checkpoints.load_step_tokenizer(step)
    else:
        own = load_tokenizer(tokenizer, step / checkpoints.TOKENIZER)
    longest = args.max_positions or checkpoints.identity(step).get("seq_len")
    return Loaded(model.eval(), args, own, [], (), longest, step, "dcp")


def _load_hf(path: Path, device: torch.device, dtype: torch.dtype, tokenizer: str | None) -> Loaded:
    from microtron.hf.config import from_config
    from microtron.hf.folder import Folder, read_into

    folder = Folder(path)
    args = from_config(folder.config)
    model = empty_model(args, device, dtype)
    read_into(folder, args, model)
    own = None
    if tokenizer is not None or (path / "tokenizer.json").is_file():
        own = load_tokenizer(tokenizer or str(path), path if tokenizer == "char" else None)
    longest = args.max_positions or folder.config.get("max_position_embeddings")
    stops = _stops(path, folder.config)
    return Loaded(model.eval(), args, own, [], stops, longest, path, "hf")


def _stops(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that a Hugging Face folder names."""
    told = config.get("eos_token_id")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        told = json.loads((path / "generation_config.json").read_text()).get("eos_token_id", told)
    listed = told if isinstance(told, list) else [told]
    return tuple(token for token in listed if isinstance(token, int))


def is_hf(path: Path) -> bool:
    """Whether a folder is a Hugging Face model rather than a step or a run."""
    return (path / "config.json").is_file() and not (path / ".metadata").exists()


def check_device(name: str) -> torch.device:
    """The device. Raises: UserError where this machine has none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not known: give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} was asked for and torch sees {torch.cuda.device_count()} CUDA "
            "devices: give cpu, or a build of torch and a machine that have it"
        )
    return device


def choose(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """What ``auto`` means: CUDA and bfloat16 where there is one, else the CPU, with the number of
    threads that is fastest, and float32.

    Raises:
        UserError: no such dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print(pick_threads(), file=sys.stderr)
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype} is not known: give auto, float32 or bfloat16")
    return device, getattr(torch, dtype)
