"""From what the loader gives to what the model takes: the same for training and validation."""

from dataclasses import dataclass

import torch

from microtron.model.masks import document_numbers


@dataclass(frozen=True)
class Part:
    """Which part of a batch's sequences a rank works on."""

    index: int = 0
    """Place in the context parallel group."""
    parts: int = 1
    """Parts a sequence is cut into."""
    hidden_cut: bool = False
    """Hidden states are cut further (sequence parallel), so a stage cannot tell S from them."""
    by_row: bool = False
    """Every tensor has B rows: a pipeline cuts them into micro-batches."""


def model_inputs(
    input_dict: dict[str, torch.Tensor], labels: torch.Tensor, part: Part | None = None
) -> tuple[torch.Tensor, dict[str, object]]:
    """Tokens, and the keyword arguments of `Transformer.forward`.

    Args:
        input_dict: ``input`` [B, S] int64; ``positions`` [B, S], restarting at each document, where
            documents are to be kept apart.
        labels: [B, S] int64, -100 where nothing is predicted.
        part: tokens and labels are cut to it; positions and documents stay whole, as attention
            needs them. None: everything.

    Returns:
        tokens [B, S / parts], and ``labels`` [B, S / parts]; ``positions`` [B or 1, S] and
        ``documents`` [B, S] where needed.
    """
    part = part or Part()
    tokens, positions = input_dict["input"], input_dict.get("positions")
    width = tokens.shape[1] // part.parts
    cut = slice(part.index * width, (part.index + 1) * width)
    extra: dict[str, object] = {"labels": labels[:, cut].contiguous()}
    if positions is not None:
        extra |= {"positions": positions, "documents": document_numbers(positions)}
    elif part.hidden_cut or part.parts > 1:
        count = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        extra["positions"] = count.expand_as(tokens) if part.by_row else count
    return tokens[:, cut].contiguous(), extra
