"""From what the loader gives to what the model takes: the same for training and validation."""

import torch

from microtron.model.args import ModelArgs
from microtron.model.attention_core import resolve_backend
from microtron.model.masks import build_masks


def model_inputs(
    input_dict: dict[str, torch.Tensor], labels: torch.Tensor, args: ModelArgs
) -> tuple[torch.Tensor, dict[str, object]]:
    """Tokens, and the keyword arguments of `Transformer.forward`.

    Args:
        input_dict: ``input`` [B, S] int64; ``positions`` [B, S], restarting at each document, where
            documents are to be kept apart. Masks are then built here, once for all layers.
        labels: [B, S] int64, -100 where nothing is predicted.
    """
    tokens, positions = input_dict["input"], input_dict.get("positions")
    extra: dict[str, object] = {"labels": labels}
    if positions is not None:
        backend = resolve_backend(args.attn_backend, tokens.device.type)
        extra["positions"] = positions
        extra["attention_masks"] = build_masks(
            backend, tokens.shape[1], args.window, tokens.device, positions
        )
    return tokens, extra
