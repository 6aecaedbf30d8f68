"""How the next token is chosen from logits: temperature, top-k, top-p, min-p, in that order (as in
transformers), then one uniform number a token.

Each row draws from a generator of its own, on the CPU, so its tokens depend on its seed and its
prompt alone: not on the rows beside it, nor on the device but for rounding.
"""

import math
from dataclasses import dataclass

import torch

from microtron.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How one row is continued.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that hold this much probability together."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end a row; they are not part of what is returned."""
    vocab_size: int | None = None
    """The tokenizer's: logits beyond it belong to no token. None: all of the model's."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "give 1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "give 0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "give 0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "give a share above 0, up to 1 (all)"),
            "min_p": (0 <= self.min_p <= 1, "give a share from 0 (off) to 1"),
            "seed": (0 <= self.seed < 2**63, "give a whole number from 0 up"),
        }
        for name, (ok, remedy) in checks.items():
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)} cannot work: {remedy}")


class Sampler:
    """Chooses for rows that each have their own way and their own random numbers."""

    def __init__(self, params: list[Sampling]) -> None:
        self.params = params
        self.generators = [torch.Generator().manual_seed(p.seed) for p in params]

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> list[int]:
        """One token for each of ``rows``: logits [len(rows), V]."""
        chosen = [0] * len(rows)
        for way, members in self._alike(rows).items():
            temperature, top_k, top_p, min_p, vocab_size = way
            part = logits if len(members) == len(rows) else logits[members]
            part = part[:, :vocab_size]
            if temperature == 0:
                tokens = part.argmax(-1)
            else:
                kept = filtered(part.float() / temperature, top_k, top_p, min_p)
                tokens = draw(kept.softmax(-1), self._uniform([rows[m] for m in members]))
            for member, token in zip(members, tokens.tolist(), strict=True):
                chosen[member] = token
        return chosen

    def _alike(self, rows: list[int]) -> dict[tuple, list[int]]:
        """Places in ``rows`` by what is done to their logits."""
        groups: dict[tuple, list[int]] = {}
        for place, row in enumerate(rows):
            p = self.params[row]
            way = (p.temperature, p.top_k, p.top_p, p.min_p, p.vocab_size)
            groups.setdefault(way, []).append(place)
        return groups

    def _uniform(self, rows: list[int]) -> torch.Tensor:
        """The next number of each row's generator, [len(rows)] in [0, 1)."""
        numbers = [torch.rand(1, generator=self.generators[r], dtype=torch.float64) for r in rows]
        return torch.cat(numbers)


def filtered(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Logits [B, V] with -inf where a token may not be chosen; the likeliest always may."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        out = probs.cumsum(-1) - probs >= top_p  # what stands before it already holds top_p
        out[:, 0] = False
        logits = logits.masked_fill(out.scatter(-1, index, out), -math.inf)
    if min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [B] by inversion: probs [B, V], uniform [B] -> the first token at which the summed
    probability passes ``uniform``.
    """
    summed = probs.double().cumsum(-1)
    wanted = uniform.to(probs.device)[:, None] * summed[:, -1:]
    return torch.searchsorted(summed, wanted, right=True).squeeze(-1).clamp(max=probs.shape[1] - 1)
