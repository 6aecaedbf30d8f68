"""The table of names as TorchTitan's state_dict_adapter: a run that starts from a HF folder.

    ./run_train.sh RECIPE --checkpoint.initial_load_in_hf --checkpoint.initial_load_path=DIR

TorchTitan turns the model's state into names of transformers (`to_hf`), lets DCP fill these from
the folder, and turns them back (`from_hf`). gpt-oss only changes names: every rank reads its own
part. GPT-2 and Llama change shapes too; theirs are gathered, filled whole, and spread again. A
pipeline stage asks for its own layers. The reader is ours: it knows the names in use, MXFP4, and
what is wrong with a folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from microtron import checkpoints
from microtron.errors import UserError
from microtron.hf import keys
from microtron.hf.folder import Folder, as_ours, check_finite
from microtron.model.args import ModelArgs

_RENAMING = (keys.SAME[0], keys.TIED[0])  # ways that a part of a tensor goes as well as a whole one


class Adapter(BaseStateDictAdapter):
    """Our state dict <-> that of transformers, in whatever layout."""

    def __init__(self, model_args: ModelArgs, hf_assets_path: str | None) -> None:
        self.args, self.hf_assets_path = model_args, hf_assets_path
        self.fqn_to_index_mapping = None
        self._layout: dict[str, tuple[Any, Any]] = {}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Names and shapes of transformers; a collective where tensors have to be gathered.

        Raises:
            UserError: a selection bias is not zero.
        """
        found = {}
        for claim in self._claims(state_dict):
            values = [state_dict[name] for name in claim.ours]
            if claim.to_hf not in _RENAMING:
                values = [self._gathered(n, v) for n, v in zip(claim.ours, values, strict=True)]
            # DCP fills tensors in place: views of other tensors would take the values with them.
            turned = [v.contiguous() for v in claim.to_hf(values)]
            found.update(zip(claim.theirs, turned, strict=True))
        return found

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Our names and layouts again; what has no counterpart there is left out."""
        found = {}
        for claim in keys.claims(self.args):
            if claim.theirs and claim.theirs[0] in hf_state_dict:
                values = claim.from_hf([hf_state_dict[name] for name in claim.theirs])
                for name, value in zip(claim.ours, values, strict=True):
                    found[name] = self._spread(name, value)
        return found

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> StorageReader:
        """A reader of the folder, by canonical names; MXFP4 is known by its config."""
        return FolderReader(Folder(path), self.args)

    def _claims(self, state_dict: dict[str, Any]) -> list[keys.Claim]:
        """The claims on this state dict, which may be that of a pipeline stage."""
        here = [c for c in keys.claims(self.args) if any(n in state_dict for n in c.ours)]
        keys.match(here, ours=state_dict)
        return here

    def _gathered(self, name: str, value: Any) -> torch.Tensor:  # noqa: ANN401
        if not isinstance(value, DTensor):
            return value
        self._layout[name] = (value.device_mesh, value.placements)
        return value.full_tensor()

    def _spread(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, DTensor) or name not in self._layout:
            return value
        mesh, placements = self._layout[name]
        return distribute_tensor(value.contiguous(), mesh, placements, src_data_rank=None)


def check_folder(path: str | Path, args: ModelArgs) -> None:
    """Refuses a folder that a run of this architecture cannot start from.

    Raises:
        UserError: it is damaged, or another architecture; with the fields that differ.
    """
    folder = Folder(path)
    there = dataclasses.asdict(folder.args)
    told = checkpoints.differing(there, args)
    if told:
        raise UserError(
            f"{path} holds another architecture ({told}): set these fields in [model.args]; "
            "`microtron convert from-hf` writes a recipe that has them"
        )
    as_ours(folder, args)


class FolderReader(StorageReader):
    """DCP's view of a folder: each tensor one piece, of which any part may be read."""

    def __init__(self, folder: Folder, args: ModelArgs) -> None:
        self.folder = folder
        self.known = keys.canonical(folder.names, args)

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Names, shapes and dtypes."""
        held, stored = {}, {}
        for name, actual in self.known.items():
            shape, dtype = self.folder.names[actual]
            zero = torch.Size([0] * len(shape))
            held[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), shape, [ChunkStorageMetadata(zero, shape)]
            )
            stored[MetadataIndex(name, zero)] = actual
        return Metadata(held, storage_data=stored)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object
    ) -> None:
        """Nothing: every rank reads for itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies what the plan asks for, part by part.

        Raises:
            UserError: a weight is not finite, or its shard cannot be read.
        """
        for item in sorted(plan.items, key=lambda item: item.storage_index.fqn):
            actual = self.known[item.storage_index.fqn]
            value = self.folder.part(actual, item.storage_offsets, item.lengths)
            check_finite(value, f"{self.folder.path}: {actual}")
            target = planner.resolve_tensor(item).detach()
            target.copy_(value)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """It is handed over, never looked up."""
        return False
