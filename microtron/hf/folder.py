"""A Hugging Face folder: config.json and safetensors, looked at before anything is believed.

Weights are read from safetensors alone, which hold numbers and no code; pickles (.bin, .pt) are
refused. The index is checked against the shards, both ways, and every file must lie in the folder.
A link may leave it in one place only: into ``blobs``, where the hub's own cache keeps the files of
its ``snapshots``. MXFP4 weights appear as the bf16 tensors that they stand for.

    folder = Folder(path)
    folder.args, folder.names, folder.tensor("model.norm.weight")
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from microtron import dcp
from microtron.errors import UserError
from microtron.hf import keys, mxfp4
from microtron.hf.config import from_config
from microtron.model.args import ModelArgs

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download the folder again"


class Folder:
    """What is in the folder, by the names of transformers.

    Raises:
        UserError: it is no such folder, or what it says of itself does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no folder: name one with config.json and safetensors")
        self.config = self._json("config.json", "is this a Hugging Face folder?")
        self.args: ModelArgs = from_config(self.config)
        self._shard_of: dict[str, Path] = self._shards()

    def file(self, name: str) -> Path:
        """Where a file of the folder lies.

        Raises:
            UserError: it is missing, or lies elsewhere.
        """
        path, home = self.path / name, self.path.resolve()
        homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
            raise UserError(
                f"{self.path}: {name!r} leads out of the folder, to {path.resolve()}: "
                "copy the file into it, or name the folder that holds it"
            )
        if not path.is_file():
            raise UserError(f"{self.path}: {name} is missing: {AGAIN}")
        return path

    def _json(self, name: str, remedy: str) -> dict[str, Any]:
        if not (self.path / name).exists():
            raise UserError(f"{self.path} has no {name}: {remedy}")
        try:
            found = json.loads(self.file(name).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path / name} ({error}): {AGAIN}") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.path / name} is no table of fields: {AGAIN}")
        return found

    def _shards(self) -> dict[str, Path]:
        """Key -> the shard that holds it."""
        if not (self.path / INDEX).exists():
            if not (self.path / WEIGHTS).exists():
                raise self._no_weights()
            weights = self.file(WEIGHTS)
            return {key: weights for key in self._header(weights)}
        told = self._json(INDEX, AGAIN).get("weight_map")
        if not isinstance(told, dict) or not all(map(_is_name, told.values())):
            raise UserError(f"{self.path / INDEX} has no weight_map of names: {AGAIN}")
        shards = {name: self.file(name) for name in sorted(set(told.values()))}
        held: dict[str, str] = {}
        for name, path in shards.items():
            for key in self._header(path):
                if told.get(key) != name:
                    other = held.get(key) or told.get(key)
                    why = f"{other} has it too" if other else "the index does not know it"
                    raise UserError(f"{self.path}: {key} is in {name}, and {why}: {AGAIN}")
                held[key] = name
        missing = sorted(told.keys() - held.keys())
        if missing:
            raise UserError(
                f"{self.path}: {dcp.listed(missing)} should be in {told[missing[0]]} by the "
                f"index, and is not: {AGAIN}"
            )
        return {key: shards[name] for key, name in told.items()}

    def _no_weights(self) -> UserError:
        pickles = [p.name for s in ("*.bin", "*.pt", "*.pth") for p in sorted(self.path.glob(s))]
        if pickles:
            return UserError(
                f"{self.path} has its weights in {pickles[0]}, a pickle, which may run code: "
                "download the safetensors, or convert it where you trust it (save_pretrained)"
            )
        return UserError(f"{self.path} has no {WEIGHTS} and no {INDEX}: {AGAIN}")

    def _header(self, path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
        try:
            with safetensors.safe_open(path, framework="pt") as shard:
                slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118
                kinds = {key: (s.get_shape(), s.get_dtype()) for key, s in slices.items()}
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}): {AGAIN}") from None
        for key, (_, dtype) in kinds.items():
            if dtype not in DTYPES:
                raise UserError(f"{path}: {key} is {dtype}, which is not read here")
        return {key: (torch.Size(shape), DTYPES[dtype]) for key, (shape, dtype) in kinds.items()}

    @cached_property
    def stored(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Key -> (shape, dtype), as stored."""
        found = {}
        for path in dict.fromkeys(self._shard_of.values()):
            found |= self._header(path)
        return found

    @cached_property
    def names(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Key -> (shape, dtype), MXFP4 pairs being the one bf16 tensor that they stand for."""
        if "quantization_config" not in self.config:
            return dict(self.stored)
        found = {}
        for key, kind in self.stored.items():
            name, _, part = key.rpartition("_")
            if part == "blocks":
                scales = self.stored.get(f"{name}_scales")
                if scales is None or (kind[1], scales[1]) != (torch.uint8, torch.uint8):
                    raise UserError(f"{self.path}: {key} has no scales beside it: {AGAIN}")
                found[name] = (mxfp4.shape_of(kind[0], scales[0], name), torch.bfloat16)
            elif part != "scales" or f"{name}_blocks" not in self.stored:
                found[key] = kind
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its shard (MXFP4: dequantised)."""
        if name in self._shard_of:
            return self._stored_tensor(name)
        return mxfp4.dequantise(*(self._stored_tensor(f"{name}_{p}") for p in ("blocks", "scales")))

    def part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """A block of a tensor; nothing else of it is read, unless it is MXFP4."""
        where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        return (
            self._stored_tensor(name, where) if name in self._shard_of else self.tensor(name)[where]
        )

    def _stored_tensor(self, key: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        path = self._shard_of[key]
        try:
            # Opened for each tensor: the pages of a mapped file count until it is closed.
            with safetensors.safe_open(path, framework="pt") as shard:
                return shard.get_slice(key)[where] if where else shard.get_tensor(key)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: {key} cannot be read ({error}): {AGAIN}") from None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def as_ours(folder: Folder, args: ModelArgs) -> tuple[dcp.Specs, Callable[[str], torch.Tensor]]:
    """What a folder holds in our names: (name -> shape and dtype, name -> its values).

    Values are checked as they are read: a weight that is not finite is refused.

    Raises:
        UserError: names or shapes are not those of the architecture; told before anything is read.
    """
    known = keys.canonical(folder.names, args)
    claims = keys.claims(args)
    keys.match(claims, theirs=known)
    _check_head(folder, args, known)
    _check_shapes(folder, args, claims, known)
    shapes = keys.shapes(args)
    claim_of = {ours: claim for claim in claims for ours in claim.ours}
    specs = {}
    for name, shape in shapes.items():
        theirs = claim_of[name].theirs
        dtype = folder.names[known[theirs[0]]][1] if theirs else torch.float32
        specs[name] = (shape, dtype)
    waiting: dict[str, torch.Tensor] = {}  # read with a tensor that was asked for before

    def produce(name: str) -> torch.Tensor:
        if name not in waiting:
            claim = claim_of[name]
            values = [folder.tensor(known[key]) for key in claim.theirs]
            for key, value in zip(claim.theirs, values, strict=True):
                check_finite(value, f"{folder.path}: {known[key]}")
            waiting.update(zip(claim.ours, claim.from_hf(values), strict=True))
        return waiting.pop(name)

    return specs, produce


def check_finite(value: torch.Tensor, name: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        UserError: with how many there are.
    """
    # the two extremes tell, thirty times as fast as asking every value
    if value.numel() and not torch.isfinite(torch.stack(torch.aminmax(value))).all():
        wrong = value.numel() - int(torch.isfinite(value).sum())
        raise UserError(
            f"{name} holds {wrong:,} values that are not finite (of {value.numel():,}): "
            "a model with such weights computes nothing; take another checkpoint"
        )


def _check_head(folder: Folder, args: ModelArgs, known: dict[str, str]) -> None:
    """A tied model may store its head too, as long as it is the embedding."""
    if args.tie_embeddings and "lm_head.weight" in folder.names:
        (claim,) = (c for c in keys.claims(args) if "output.weight" in c.ours)
        embedding = known[claim.theirs[0]]
        if not torch.equal(folder.tensor("lm_head.weight"), folder.tensor(embedding)):
            raise UserError(
                f"{folder.path}: config.json ties the head to the embedding, and lm_head.weight "
                f"is not {embedding}: set tie_word_embeddings to false there"
            )


def _check_shapes(
    folder: Folder, args: ModelArgs, claims: list[keys.Claim], known: dict[str, str]
) -> None:
    shapes = keys.shapes(args)
    for claim in claims:
        ours = [torch.empty(shapes[name], device="meta") for name in claim.ours]
        for key, value in zip(claim.theirs, claim.to_hf(ours), strict=True):
            shape = folder.names[known[key]][0]
            if shape != value.shape:
                raise UserError(
                    f"{folder.path}: {known[key]} is {list(shape)}, and by config.json it is "
                    f"{list(value.shape)}: one of the two belongs to another model"
                )


def read_into(
    folder: Folder, args: ModelArgs, model: nn.Module, dtype: torch.dtype | None = None
) -> None:
    """Fills a model from a folder, one tensor in memory at a time; see `dcp.read_into`.

    Raises:
        UserError: names or shapes differ, or a weight is not finite.
    """
    specs, produce = as_ours(folder, args)
    dcp.fill(model, specs, produce, dtype, folder.path)
