"""The truth that cached generation answers to: one row after the other, the model's plain forward
over the whole context for every token.
"""

import torch

from microtron.infer.sampling import Sampler, Sampling
from microtron.model.model import Transformer


@torch.no_grad()
def generate(model: Transformer, rows: list[list[int]], params: Sampling) -> list[list[int]]:
    """The new tokens of each row, stop tokens left out; see `Engine.generate`."""
    return [_row(model, row, params) for row in rows]


def _row(model: Transformer, prompt: list[int], params: Sampling) -> list[int]:
    sampler, found = Sampler([params]), []
    device = model.tok_embeddings.weight.device
    while len(found) < params.max_new_tokens:
        logits = model(torch.tensor([prompt + found], device=device))[:, -1]
        (token,) = sampler(logits, [0])
        if token in params.stop_tokens:
            break
        found.append(token)
    return found
