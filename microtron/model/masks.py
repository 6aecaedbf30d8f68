"""Who may look at whom: causal, window and document predicates, and the two forms made of them.

The dense bool mask (eager, sdpa) and the FlexAttention BlockMask come from the same predicate, so
they cannot disagree. A window of W means W keys, the token itself included.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import create_block_mask

Predicate = Callable[..., torch.Tensor]


def predicate(window: int | None, documents: torch.Tensor | None) -> Predicate:
    """``(batch, head, query, key) -> may look``, in FlexAttention's mask_mod form.

    Args:
        window: keys a query sees, itself included; None is every earlier key.
        documents: [B, S] document number of each token; None is one document.
    """

    def may_look(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        allowed = q >= k
        if window is not None:
            allowed = allowed & (q - k < window)
        if documents is not None:
            allowed = allowed & (documents[b, q] == documents[b, k])
        return allowed

    return may_look


def document_numbers(positions: torch.Tensor) -> torch.Tensor:
    """[B, S] positions that restart at 0 -> [B, S] number of the document within the row."""
    return (positions == 0).int().cumsum(dim=1)


def dense_mask(
    seq_len: int, window: int | None, documents: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """bool [B or 1, 1, S, S], True where a query (row) may look at a key (column)."""
    index = torch.arange(seq_len, device=device)
    batch = 1 if documents is None else documents.shape[0]
    b = torch.arange(batch, device=device)[:, None, None, None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    return predicate(window, documents)(b, zero, index[:, None], index[None, :]).expand(
        batch, 1, seq_len, seq_len
    )


def block_mask(
    seq_len: int, window: int | None, documents: torch.Tensor | None, device: torch.device
) -> "torch.nn.attention.flex_attention.BlockMask":
    """The same predicate as FlexAttention's block-sparse mask."""
    batch = None if documents is None else documents.shape[0]
    create = _compiled_block_mask() if device.type == "cuda" else create_block_mask
    return create(predicate(window, documents), batch, None, seq_len, seq_len, device=device)


@functools.cache
def _compiled_block_mask() -> Callable:
    """Uncompiled, it holds ten bytes for each pair of tokens of the batch at once."""
    return torch.compile(create_block_mask)


def build_masks(
    backend: str,
    seq_len: int,
    window: int,
    device: torch.device,
    documents: torch.Tensor | None = None,
) -> dict[str, object]:
    """The masks of a batch, built once and shared by all layers: ``{"window": ..., "full": ...}``.

    Args:
        backend: eager, sdpa, flex or blocked. None stands for plain causal in sdpa, whose kernels
            know it;
            blocked takes the number of keys in sight.
        documents: [B, S] number of each token's document, to keep them apart, or None.
    """
    spans = {"full": None, "window": window if window < seq_len else None}
    if backend == "blocked" and documents is None:
        return {kind: span or seq_len for kind, span in spans.items()}
    if backend == "flex":
        return {kind: block_mask(seq_len, span, documents, device) for kind, span in spans.items()}
    return {
        kind: None
        if backend == "sdpa" and span is None and documents is None
        else dense_mask(seq_len, span, documents, device)
        for kind, span in spans.items()
    }
