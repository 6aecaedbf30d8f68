"""A sample of the model's text while it trains: the whole context again for every token, nothing
cached.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


@torch.no_grad()
def sample(
    next_logits: Callable[[torch.Tensor, int], torch.Tensor],
    tokenizer: object,
    prompt: str,
    *,
    tokens: int,
    length: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> str:
    """Continues ``prompt`` by up to ``tokens`` tokens; stops at the tokenizer's document separator.

    Args:
        next_logits: (tokens [1, length] on ``device``, index) -> logits [V] of what follows it.
        length: tokens the model sees at once; shorter contexts are padded on the right, where a
            causal model cannot look, so that every pass has one shape.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest; 0: all.
    """
    generator = torch.Generator().manual_seed(seed)
    context = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    start = len(context)
    for _ in range(tokens):
        window = context[-length:]
        batch = F.pad(torch.tensor([window], device=device), (0, length - len(window)))
        logits = next_logits(batch, len(window) - 1)[: tokenizer.vocab_size].float().cpu()
        token = choose(logits, temperature, top_k, generator)
        if token == tokenizer.eot_id:
            break
        context.append(token)
    return tokenizer.decode(context[start:])


def choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token of logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        kept = logits.topk(min(top_k, logits.numel()))
        logits = torch.full_like(logits, float("-inf")).scatter(0, kept.indices, kept.values)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
