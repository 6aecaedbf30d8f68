"""The metadata of a DCP step, read without unpickling foreign objects, and held to its shards.

torch's own reader hands ``.metadata`` to pickle, which runs whatever a file names. Here it may name
torch's record classes and nothing else, and the shards it points to must lie in the step's folder.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from microtron.errors import UserError

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "pathlib":  # where the step was once written: not asked
            return _path_as_text
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _path_as_text(*parts: str) -> str:
    return "/".join(map(str, parts))


def read_metadata(step: Path) -> Metadata:
    """What a step holds and where; no foreign object is built.

    Raises:
        UserError: it is missing or damaged, names foreign classes, or points out of the folder.
    """
    try:
        return _read_metadata(step)
    except _Unreadable as error:
        raise UserError(f"{step} is no whole checkpoint: {error}; name another step") from None


def problem(step: Path) -> str | None:
    """Why a step cannot be read (metadata, then the shards' lengths); None: it looks whole."""
    try:
        found = _read_metadata(step)
        for name, end in _ends(found).items():
            if not (step / name).is_file():
                return f"shard {name} is missing"
            size = (step / name).stat().st_size
            if size < end:
                return f"shard {name} is truncated ({size:,} of {end:,} bytes)"
    except _Unreadable as error:
        return str(error)
    return None


def reason(error: BaseException) -> str:
    """The first line of what is often a page, and not a long one."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")


class _Unreadable(Exception):
    """Why, in the words of `problem`."""


def _read_metadata(step: Path) -> Metadata:
    try:
        with open(step / ".metadata", "rb") as file:
            found = _MetadataUnpickler(file).load()
    except OSError:
        raise _Unreadable("half-written (no .metadata)" if step.is_dir() else "not there") from None
    except Exception as error:  # whatever unpickling damaged bytes raises
        raise _Unreadable(f"unreadable .metadata ({reason(error)})") from None
    try:
        _check_metadata(step, found)
    except (AttributeError, TypeError, ValueError) as error:
        raise _Unreadable(f"unreadable .metadata ({reason(error)})") from None
    return found


def _check_metadata(step: Path, found: Metadata) -> None:
    """Records of the right kinds, chunks that fill their tensors, shards inside the folder."""
    if not isinstance(found, Metadata):
        raise TypeError(f"it holds a {type(found).__name__}")
    for name in {info.relative_path for info in found.storage_data.values()}:
        if not (step / name).resolve().is_relative_to(step.resolve()):
            raise _Unreadable(f"its metadata points out of the folder, to {name!r}")
    for index, info in found.storage_data.items():
        if index.fqn not in found.state_dict_metadata:
            raise ValueError(f"{index.fqn} is stored and not described")
        if min(info.offset, info.length) < 0 or getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored in a way that is not known here")
    for name, held in found.state_dict_metadata.items():
        if isinstance(held, TensorStorageMetadata):
            _check_chunks(name, held, found)


def _check_chunks(name: str, held: TensorStorageMetadata, found: Metadata) -> None:
    if not isinstance(held.properties.dtype, torch.dtype):
        raise TypeError(f"{name} has no dtype")
    count = 0
    for chunk in held.chunks:
        if min(*chunk.offsets, *chunk.sizes, 0, 0) < 0:
            raise ValueError(f"a part of {name} lies outside of it")
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(held.size) or any(e > s for e, s in zip(ends, held.size, strict=True)):
            raise ValueError(f"a part of {name} lies outside of it")
        if MetadataIndex(name, chunk.offsets) not in found.storage_data:
            raise ValueError(f"a part of {name} is not stored")
        count += chunk.sizes.numel()
    if count != held.size.numel():
        raise ValueError(f"{name} is stored with {count} of its {held.size.numel()} values")
    if _overlap(held.chunks):  # then another part of it would be left unset
        raise ValueError(f"two parts of {name} overlap")


def _overlap(chunks: list[ChunkStorageMetadata]) -> bool:
    """Whether two parts share a value; looked for along the dimension with the most cuts."""
    boxes = [
        [(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
        if chunk.sizes.numel()
    ]
    if len(boxes) < 2:
        return False
    cut = max(range(len(boxes[0])), key=lambda dim: len({box[dim] for box in boxes}))
    reaching: list[list[tuple[int, int]]] = []  # beyond where the next part begins
    for box in sorted(boxes, key=lambda box: box[cut]):
        reaching = [other for other in reaching if other[cut][1] > box[cut][0]]
        for other in reaching:
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                return True
        reaching.append(box)
    return False


def _ends(found: Metadata) -> dict[str, int]:
    """Shard -> the bytes it must have."""
    ends: dict[str, int] = {}
    for info in found.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends
