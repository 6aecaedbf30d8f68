"""``microtron convert to-hf``: a step of any layout -> a folder that transformers loads.

    microtron convert to-hf outputs/debug exports/debug
    microtron convert to-hf outputs/debug/checkpoint/step-300 exports/debug --dtype bfloat16

A step's metadata says every name and shape, so the shards are planned, and everything that can be
refused is refused, before a weight is read. Then one tensor at a time is read, checked, cast and
written at its place in its shard: memory is that of the largest tensor. The folder is made beside
OUT and takes its name only after the gate (`gate.py`) has compared logits in transformers.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
import tyro
from tqdm import tqdm

from microtron import checkpoints, dcp
from microtron.data.tokenizers import Tokenizer
from microtron.errors import UserError
from microtron.hf import card, gate, keys
from microtron.hf.config import to_config
from microtron.hf.folder import DTYPES, INDEX, WEIGHTS, check_finite
from microtron.hf.tokenizer_files import write_tokenizer
from microtron.model.args import ModelArgs

Dtype = Literal["keep", "float32", "bfloat16", "float16"]


def to_hf(
    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    dtype: Dtype = "keep",
    max_shard_gib: float = 5.0,
    gate: bool = True,
    overwrite: bool = False,
) -> None:
    """Converts a checkpoint to a Hugging Face folder, and compares the two in transformers.

    Args:
        ckpt: A checkpoint/step-N folder, or a run's folder for its newest step.
        out: The folder to write.
        dtype: Of the weights; keep: as the checkpoint has them.
        max_shard_gib: Weights go to a new file when one would grow beyond this.
        gate: Load the export in transformers and compare logits on a text; refuse it if they part.
        overwrite: Replace an export that is there already.

    Raises:
        UserError: no whole checkpoint; an architecture or weights that transformers cannot have;
            OUT exists; the gate found a difference.
    """
    step = checkpoints.find_step(ckpt)
    print(f"converting {step}", file=sys.stderr)
    export(step, out, dtype=dtype, max_shard_gib=max_shard_gib, check=gate, overwrite=overwrite)


def export(
    step: Path,
    out: Path,
    *,
    dtype: Dtype = "keep",
    max_shard_gib: float = 5.0,
    check: bool = True,
    overwrite: bool = False,
) -> Path:
    """Writes a step as a Hugging Face folder; ``check``: with the gate. Returns ``out``.

    Raises: UserError, as `to_hf`.
    """
    step, out = Path(step), Path(out).expanduser()
    wanted = None if dtype == "keep" else getattr(torch, dtype)
    about, args = checkpoints.identity(step), checkpoints.architecture(step)
    tokenizer = checkpoints.load_step_tokenizer(step)
    check_vocabulary(args, tokenizer, step)
    parts = plan(step, args, wanted)
    shards = split(parts, max_shard_gib)
    if check:
        gate.check_possible(args)
    with placing(out, overwrite) as folder:
        write_weights(step, parts, shards, folder)
        facts = describe(args, tokenizer, about, parts)
        write_configs(folder, args, tokenizer, facts)
        passed = gate.compare(step, folder, args, tokenizer, wanted) if check else None
        whole = out.resolve()  # a run exports to its own folder hf/
        name = whole.parent.name if whole.name == "hf" else whole.name
        text = card.model_card(name, args, tokenizer, about, facts["dtype"], step, passed)
        (folder / "README.md").write_text(text)
    size = sum(part.nbytes for part in parts)
    told = f"; {passed}" if passed else ""
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    if warned := card.vllm_differs(args):
        print(f"note: {warned}", file=sys.stderr)
    print(f"wrote {out}: {size / 1e6:,.1f} MB of weights in {files}{told}")
    return out


@dataclass
class Part:
    """One claim of `keys.claims` and what becomes of it; ``begins``: in its shard, in bytes."""

    claim: keys.Claim
    dtype: torch.dtype
    shapes: list[torch.Size]
    begins: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(shape.numel() for shape in self.shapes) * self.dtype.itemsize


def plan(step: Path, args: ModelArgs, dtype: torch.dtype | None) -> list[Part]:
    """Every tensor of the export by name, shape and dtype; no weight is read.

    Raises: UserError: no such architecture in transformers, names or shapes that do not fit it, or
        a selection bias of the experts that is not zero.
    """
    keys.architecture(args)
    held, claims = dcp.tensors(step), keys.claims(args)
    keys.match(claims, ours=held)
    for name, shape in keys.shapes(args).items():
        if held[name][0] != shape:
            raise UserError(
                f"{step}: {name} is {list(held[name][0])} and its architecture says {list(shape)}; "
                "the step is damaged or its microtron.json belongs to another"
            )
    parts, read = [], dcp.reader(step)
    for claim in claims:
        if not claim.theirs:  # nothing to write: asked whether it may be left out
            claim.to_hf([read(name) for name in claim.ours])
            continue
        made = claim.to_hf([torch.empty(held[n][0], device="meta") for n in claim.ours])
        kept = held[claim.ours[0]][1]
        parts.append(Part(claim, dtype or kept, [tensor.shape for tensor in made], []))
    return parts


def split(parts: list[Part], max_shard_gib: float) -> list[list[Part]]:
    """The parts by file, each no larger than asked unless one part is; sets ``begins``.

    Raises: UserError for a size that is not positive.
    """
    if not max_shard_gib > 0:
        raise UserError(f"--max-shard-gib {max_shard_gib} holds nothing; give a positive number")
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.nbytes > max_shard_gib * 2**30:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    for shard in shards:
        at = 0
        for part in sorted(shard, key=lambda p: -p.dtype.itemsize):  # so that each is aligned
            for shape in part.shapes:
                part.begins.append(at)
                at += shape.numel() * part.dtype.itemsize
    return shards


def write_weights(step: Path, parts: list[Part], shards: list[list[Part]], folder: Path) -> None:
    """Every shard, and the index where there are several.

    Raises: UserError for a weight that is not finite, before or after the cast.
    """
    total = sum(part.nbytes for part in parts)
    weight_map = {}
    read = dcp.reader(step)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="weights", disable=not sys.stderr.isatty()
    )
    with bar:
        for i, shard in enumerate(shards):
            many = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            name = WEIGHTS if len(shards) == 1 else many
            with open(folder / name, "wb") as file:
                _write_shard(file, shard, read, bar.update)
            weight_map |= {key: name for part in shard for key in part.claim.theirs}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)


def _write_shard(
    file: BinaryIO,
    shard: list[Part],
    read: Callable[[str], torch.Tensor],
    progress: Callable[[int], object],
) -> None:
    """The safetensors layout: length of the header, header as JSON, tensors end to end
    (github.com/huggingface/safetensors, "Format"). Its own writer would hold the whole shard."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for part in sorted(shard, key=lambda p: p.begins[0]):
        for name, shape, begin in zip(part.claim.theirs, part.shapes, part.begins, strict=True):
            end = begin + shape.numel() * part.dtype.itemsize
            facts = {"dtype": codes[part.dtype], "shape": list(shape)}
            header[name] = {**facts, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for part in shard:
        for begin, value in zip(part.begins, _values(part, read), strict=True):
            file.seek(8 + len(text) + begin)
            file.write(value.reshape(-1).view(torch.uint8).numpy())
            progress(value.nbytes)
            del value  # before the next is read
    file.flush()
    os.fsync(file.fileno())


def _values(part: Part, read: Callable[[str], torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors of a part as the export has them."""
    values = [read(name) for name in part.claim.ours]
    for name, value in zip(part.claim.ours, values, strict=True):
        check_finite(value, name)
    for name, value in zip(part.claim.theirs, part.claim.to_hf(values), strict=True):
        cast = value.to(part.dtype).contiguous()
        if cast.dtype != value.dtype:
            check_finite(cast, f"{name} as {_name(part.dtype)}")
        yield cast


def describe(
    args: ModelArgs, tokenizer: Tokenizer | None, about: dict[str, Any], parts: list[Part]
) -> dict[str, Any]:
    """What the JSON files of an export tell alike: longest sequence, special ids, dtype."""
    length = args.max_positions
    if not length:
        length = int(about.get("seq_len") or args.rope_original_len)
        if args.rope_factor > 1:
            length = max(length, round(args.rope_factor * args.rope_original_len))
    ids = {}
    if tokenizer is not None:
        first = (tokenizer.prefix_ids or [tokenizer.eot_id])[0]
        ids = {"bos_token_id": first} | dict.fromkeys(
            ("eos_token_id", "pad_token_id"), tokenizer.eot_id
        )
    return {"length": length, "ids": ids, "dtype": _name(parts[0].dtype)}


def write_configs(
    folder: Path, args: ModelArgs, tokenizer: Tokenizer | None, facts: dict[str, Any]
) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    config = to_config(args, max_positions=facts["length"], dtype=facts["dtype"], **facts["ids"])
    _write_json(folder / "config.json", config)
    generation: dict[str, Any] = dict(facts["ids"])
    if tokenizer is not None:
        padding = range(tokenizer.vocab_size, args.vocab_size)
        if padding:  # rows that no text trains, and that stand for nothing
            generation["suppress_tokens"] = list(padding)
        write_tokenizer(tokenizer, folder, max_length=facts["length"])
    _write_json(folder / "generation_config.json", generation)


def check_vocabulary(args: ModelArgs, tokenizer: Tokenizer | None, step: Path) -> None:
    """Raises: UserError for a tokenizer with more ids than the model has rows."""
    if tokenizer is not None and tokenizer.vocab_size > args.vocab_size:
        raise UserError(
            f"{step}: its tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids and the "
            f"model {args.vocab_size:,} rows; the two do not belong together"
        )


@contextmanager
def placing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place at the end, or goes if the work fails.

    Raises: UserError: ``out`` exists (with ``overwrite``: and is no export), or cannot be written.
    """
    if not (out.exists() or out.is_symlink()):
        with dcp.beside(out) as folder:
            yield folder
        return
    if not overwrite:
        raise UserError(f"{out} exists already: name another folder, or pass --overwrite")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not (empty or (out / "config.json").is_file()):
        raise UserError(f"{out} is no export, and is left as it is: name another folder")
    fresh, old = (out.with_name(f"{out.name}.microtron-{end}") for end in ("new", "old"))
    for left in (fresh, old):  # by a kill; nobody else names a folder so
        shutil.rmtree(left, ignore_errors=True)
    with dcp.beside(fresh) as folder:
        yield folder
    os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
