"""The chunked loss where each rank holds a part of the vocabulary.

The same arithmetic as `model/head.py`, a chunk of tokens at a time; the softmax needs three numbers
a token from the other ranks (maximum, sum, the target's logit), and no logit ever travels.
"""

import functools

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

from microtron.model.head import IGNORE, Head, softcapped
from microtron.parallel.collectives import all_gather


def split_vocabulary(head: Head, group: dist.ProcessGroup) -> None:
    """The head's weight is this rank's rows; logits, where they are asked for, are gathered."""
    head.chunk_loss = functools.partial(chunk_loss, group=group)

    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return all_gather(out, out.dim() - 1, group) if out.dim() == 3 else out

    head.register_forward_hook(hook)


def chunk_loss(
    raw: torch.Tensor,
    labels: torch.Tensor,
    cap: float,
    z: float,
    need: bool,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """raw [n, V/ranks], labels [n] -> summed loss over the whole vocabulary, gradient of this part
    [n, V/ranks] fp32.
    """
    logits = softcapped(raw.float(), cap)
    valid = (labels != IGNORE).float()
    target = labels - group.rank() * raw.shape[1]
    mine = (target >= 0) & (target < raw.shape[1])
    target = target.where(mine, 0).unsqueeze(-1)
    top = functional.wait_tensor(functional.all_reduce(logits.amax(-1), "max", group))
    shares = (logits - top.unsqueeze(-1)).exp_()
    own = torch.stack((shares.sum(-1), logits.gather(-1, target).squeeze(-1) * mine))
    total, picked = functional.wait_tensor(functional.all_reduce(own, "sum", group))
    lse = total.log() + top
    loss = ((z * lse.square() + lse - picked) * valid).sum()
    if not need:
        return loss, None
    grad = shares.div_(total.unsqueeze(-1))
    if z:
        grad *= (1 + 2 * z * lse).unsqueeze(-1)
    grad.scatter_add_(-1, target, -mine.to(grad.dtype).unsqueeze(-1))
    grad *= valid.unsqueeze(-1)
    if cap:
        grad *= 1 - (logits / cap).square()
    return loss, grad
