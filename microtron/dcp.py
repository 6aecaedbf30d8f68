"""Steps of torch's distributed checkpoints (DCP), read and written tensor by tensor.

A step is a ``.metadata`` file, which is a pickle, and shards, in which each tensor or number is an
archive of `torch.save`. torch unpickles the metadata, and what is no tensor, without restraint:
whoever hands over a step may run code. Here the metadata may name torch's own record classes and
nothing else, the rest is read as plain data, and no process group is needed.

    tensors(step)                                  name -> shape and dtype of the model's tensors
    read(step, ["norm.weight"])                    some of them
    read_into(step, model)                         all of them, one in memory at a time
    write(out, specs, produce)                     a step that training starts from, likewise
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from microtron.dcp_metadata import problem as problem
from microtron.dcp_metadata import read_metadata, reason
from microtron.errors import UserError

Specs = dict[str, tuple[torch.Size, torch.dtype]]
# What TorchTitan keeps beside the model, whose tensors stand at the top.
_NOT_THE_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


def tensors(step: Path) -> Specs:
    """Name -> (shape, dtype) of the model's own tensors, optimizer state left out.

    Raises:
        UserError: as `read_metadata`.
    """
    return _model_specs(read_metadata(step))


def read(step: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some tensors by name, whole, on CPU, as they were saved.

    Raises:
        UserError: the step has no such tensor, or its shards cannot be read.
    """
    found = read_metadata(step)
    return {name: _read_tensor(step, found, name) for name in names}


def reader(step: Path) -> Callable[[str], torch.Tensor]:
    """`read` of one name at a time, for many: the metadata is read once.

    Raises:
        UserError: as `read_metadata`; the function: as `read`.
    """
    found = read_metadata(step)
    return lambda name: _read_tensor(step, found, name)


def read_into(step: Path, model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Fills a model's parameters and persistent buffers, one in memory at a time.

    Parameters on the meta device are made on CPU; others keep their device. ``dtype``: what
    floating-point tensors become; None: each keeps the model's. Buffers that are not saved (the
    frequencies of RoPE, expert counts) are the caller's to fill.

    Raises:
        UserError: names or shapes differ from the model's, or the step cannot be read.
    """
    found = read_metadata(step)
    fill(model, _model_specs(found), lambda name: _read_tensor(step, found, name), dtype, step)


def fill(
    model: nn.Module,
    specs: Specs,
    produce: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None,
    source: Path,
) -> None:
    """Puts ``produce(name)`` into every parameter and persistent buffer of a model.

    Raises:
        UserError: ``specs`` and the model differ in names or shapes; told before anything is read.
    """
    held = model.state_dict(keep_vars=True)
    missing, unknown = sorted(held.keys() - specs.keys()), sorted(specs.keys() - held.keys())
    if missing or unknown:
        told = [f"lacks {listed(missing)}"] * bool(missing)
        told += [f"has {listed(unknown)} besides"] * bool(unknown)
        raise UserError(f"{source} {' and '.join(told)}: it belongs to another architecture")
    for name, tensor in held.items():
        if tensor.shape != specs[name][0]:
            raise UserError(
                f"{source}: {name} is {list(specs[name][0])}, and the model's is "
                f"{list(tensor.shape)}: it belongs to another architecture"
            )
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    with torch.no_grad():
        for name, tensor in held.items():
            if id(tensor) not in made:
                made[id(tensor)] = _filled(tensor, produce(name), dtype)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, made[id(tensor)])


def _filled(held: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    kind = dtype if dtype is not None and held.is_floating_point() else held.dtype
    if not held.is_meta and held.dtype == kind:
        return held.copy_(value)
    value = value.to("cpu" if held.is_meta else held.device, kind)
    if isinstance(held, nn.Parameter):
        return nn.Parameter(value, requires_grad=held.requires_grad)
    return value


def listed(names: list[str], most: int = 4) -> str:
    """Some names for a message that stays one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_bytes(step: Path) -> None:
    """Reads everything that is no tensor as plain data, before DCP unpickles it without restraint.

    Raises:
        UserError: an entry would build a foreign object, or cannot be read.
    """
    found, seen = read_metadata(step), set()
    for index, info in found.storage_data.items():
        if isinstance(found.state_dict_metadata[index.fqn], TensorStorageMetadata):
            continue  # DCP, too, reads tensors with weights_only
        with open(step / info.relative_path, "rb") as shard:
            shard.seek(info.offset)
            raw = shard.read(info.length)
        digest = hashlib.sha256(raw).digest()
        if digest in seen:  # the same number, once for each parameter
            continue
        seen.add(digest)
        try:
            torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling damaged bytes raises
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if foreign:
                raise UserError(
                    f"{step}: entry {index.fqn} is not plain data (it names {foreign[1]}): do not "
                    "load this checkpoint"
                ) from None
            raise UserError(
                f"cannot load the checkpoint {step} (entry {index.fqn} is damaged): move it away "
                "to go on from an older step"
            ) from None


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder ``OUT.partial`` that becomes ``OUT`` at the end, or goes if the work fails.

    Raises:
        UserError: ``out`` exists, or cannot be written.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: name another folder, or remove it first")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill left
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror or error}): free the disk or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(out: Path, specs: Specs, produce: Callable[[str], torch.Tensor]) -> None:
    """Writes a step of plain tensors, one in memory at a time, beside ``out`` until it is whole.

    Raises:
        UserError: ``out`` exists or cannot be written, or a tensor is not as ``specs`` says.
    """
    with beside(out) as folder:
        write_step(folder, specs, produce)


def write_step(folder: Path, specs: Specs, produce: Callable[[str], torch.Tensor]) -> None:
    """Shard and metadata into an existing folder.

    Not by `torch.distributed.checkpoint.save`: its writer keeps every tensor until the file is
    closed.

    Raises:
        UserError: a tensor has another shape or dtype than ``specs`` says.
    """
    stored: dict[MetadataIndex, filesystem._StorageInfo] = {}
    held: dict[str, TensorStorageMetadata] = {}
    name_of_shard = "__0_0.distcp"
    with open(folder / name_of_shard, "wb") as shard:
        for name, (shape, dtype) in specs.items():
            value = produce(name)
            if value.shape != shape or value.dtype != dtype:
                raise UserError(
                    f"{name} came as {list(value.shape)} {value.dtype}, and {list(shape)} "
                    f"{dtype} was announced"
                )
            start = shard.tell()
            _save(value, shard)
            del value
            zero = torch.Size([0] * len(shape))
            held[name] = TensorStorageMetadata(
                metadata.TensorProperties(dtype=dtype),
                shape,
                [metadata.ChunkStorageMetadata(zero, shape)],
            )
            stored[MetadataIndex(name, zero)] = filesystem._StorageInfo(
                name_of_shard, start, shard.tell() - start
            )
        shard.flush()
        os.fsync(shard.fileno())
    whole = Metadata(
        held, planner_data={n: (n,) for n in held}, storage_data=stored, version="1.0.0"
    )
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(whole, file)
        file.flush()
        os.fsync(file.fileno())


def _save(value: torch.Tensor, shard: BinaryIO) -> None:
    value = value.detach().cpu().contiguous()
    if value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()  # torch.save writes the whole storage behind a view
    torch.save(value, shard)


def _model_specs(found: Metadata) -> Specs:
    return {
        name: (held.size, held.properties.dtype)
        for name, held in found.state_dict_metadata.items()
        if isinstance(held, TensorStorageMetadata) and not name.startswith(_NOT_THE_MODEL)
    }


def _read_tensor(step: Path, found: Metadata, name: str) -> torch.Tensor:
    held = found.state_dict_metadata.get(name)
    if not isinstance(held, TensorStorageMetadata):
        raise UserError(f"{step} has no tensor {name}")
    whole = None
    for chunk in held.chunks:
        info = found.storage_data[MetadataIndex(name, chunk.offsets)]
        part = _read_chunk(step, name, info)
        if part.shape != chunk.sizes or part.dtype != held.properties.dtype:
            raise UserError(
                f"{step}: {name} holds {list(part.shape)} {part.dtype}, and its metadata says "
                f"{list(chunk.sizes)} {held.properties.dtype}: copy the step again"
            )
        if part.shape == held.size:
            return part
        whole = torch.empty(held.size, dtype=part.dtype) if whole is None else whole
        begin = zip(chunk.offsets, chunk.sizes, strict=True)
        whole[tuple(slice(offset, offset + size) for offset, size in begin)] = part
    if whole is None:  # a tensor without values, saved in no part
        return torch.empty(held.size, dtype=held.properties.dtype)
    return whole


def _read_chunk(step: Path, name: str, info: filesystem._StorageInfo) -> torch.Tensor:
    try:
        with open(step / info.relative_path, "rb") as shard:
            shard.seek(info.offset)
            raw = io.BytesIO(shard.read(info.length))
        value = torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading damaged bytes raises
        raise UserError(
            f"{step}: {name} cannot be read from {info.relative_path} ({reason(error)}): "
            "copy the step again or name another"
        ) from None
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{step}: {name} is no tensor but a {type(value).__name__}")
    return value
