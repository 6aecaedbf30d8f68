"""What a run really keeps and sends, to hold the formulas to: a look at every tensor operation.

    with Watch() as watch:
        loss = model(tokens, labels=labels)
        watch.kept_bytes([model])       # activations alive now
    watch.sent                          # collectives so far

Storages are followed by weak references, so what autograd, checkpointing or a pipeline keeps is
counted wherever it is kept; saved-tensor hooks would miss what a checkpoint's cache holds.
"""

import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Collective -> which of its arguments counts (of a gather the whole, so times the ranks), and how
# often a ring sends it.
_COLLECTIVES = {
    "_c10d_functional.all_gather_into_tensor": ("all-gather", "input", 1),
    "_c10d_functional.reduce_scatter_tensor": ("reduce-scatter", "input", 1),
    "_c10d_functional.all_reduce": ("all-reduce", "input", 2),
    "_c10d_functional.all_to_all_single": ("all-to-all", "input", 1),
    "c10d._allgather_base_": ("all-gather", "second", 1),
    "c10d._reduce_scatter_base_": ("reduce-scatter", "second", 1),
    "c10d.allreduce_": ("all-reduce", "list", 2),
    "c10d.send": ("send", "list", 1),
}


class Watch(TorchDispatchMode):
    """Follows storages and collectives while it is entered.

    Attributes:
        sent: (collective, ranks of its group) -> bytes that this rank sends on a ring.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.sent: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        name = str(func).rpartition(".")[0]
        if name in _COLLECTIVES:
            self._count(name, args)
        return out

    def _count(self, name: str, args: tuple) -> None:
        kind, which, times = _COLLECTIVES[name]
        group = next(g for g in map(_group, reversed(args)) if g is not None)
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = {"input": args[:1], "second": args[1:2], "list": args[0]}[which]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if kind == "all-gather":
            size *= len(ranks)
        share = 1.0 if kind == "send" else times * (len(ranks) - 1) / len(ranks)
        self.sent[kind, ranks] += size * share

    def kept_bytes(self, parts: list[nn.Module], optimizer: object = None) -> int:
        """Bytes alive that operations made, but for parameters, their gradients, FSDP2's gathered
        copies of both, buffers and the optimizer's state.
        """
        known = {s._cdata for part in parts for s in _standing(part)}
        known |= {state.untyped_storage()._cdata for state in map(_local, _states(optimizer))}
        alive = (ref() for key, ref in self.storages.items() if key not in known)
        return sum(s.nbytes() for s in alive if s is not None)


def _group(argument: object) -> dist.ProcessGroup | None:
    """The process group that a collective's argument is, or names; None: it is neither."""
    try:
        if isinstance(argument, str):
            return dist.distributed_c10d._resolve_process_group(argument)
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
    except (KeyError, LookupError, RuntimeError, ValueError):
        pass  # a reduction, by name or by object
    return None


def _standing(part: nn.Module) -> list[torch.UntypedStorage]:
    """Storages of parameters, buffers and gradients, gathered or not."""
    tensors: list[torch.Tensor] = [*part.parameters(), *part.buffers()]
    tensors += [p.grad for p in part.parameters() if p.grad is not None]
    for module in part.modules():
        if isinstance(module, FSDPModule):
            for p in _sharded(module):
                whole = getattr(p, "_unsharded_param", None)
                tensors += [*p.all_gather_outputs, whole, p.unsharded_accumulated_grad]
    return [_local(t).untyped_storage() for t in tensors if t is not None]


def _sharded(module: FSDPModule) -> list:
    """FSDP2's own view of a module's parameters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one
    groups = [state._fsdp_param_group] if groups is None else groups
    return [p for group in groups if group is not None for p in group.fsdp_params]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _states(optimizer: object) -> list[torch.Tensor]:
    """The tensors of an optimizer, or of TorchTitan's container of several."""
    every = getattr(optimizer, "optimizers", [] if optimizer is None else [optimizer])
    states = (state for one in every for state in one.state.values())
    return [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]


def standing_bytes(parameters: list[nn.Parameter], optimizer: object) -> dict[str, int]:
    """Bytes of this rank's parameters, gradients and optimizer state."""

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in map(_local, tensors))

    return {
        "parameters": size(parameters),
        "gradients": size([p.grad for p in parameters if p.grad is not None]),
        "optimizer": size(_states(optimizer)),
    }
