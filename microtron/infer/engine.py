"""Cached generation: prefill a batch of prompts, then one token a row and step.

    engine = Engine(model)
    tokens = engine.generate([[256, 72, 105]], Sampling(max_new_tokens=20, temperature=0))

The engine runs a shallow copy of the model (the parameters are the model's own) whose attention
keeps a cache (`attention.py`) and whose experts are made for few tokens (`experts.py`); embedding,
norms, positions and head are the model's. The head runs only where logits are asked for.
`uncached.py` is the slow obvious twin, and the model that was handed in stays as it was.
"""

import copy
from collections.abc import Callable

import torch

from microtron.errors import UserError
from microtron.infer.attention import CachedAttention, ChunkStep, FirstStep, TokenStep
from microtron.infer.experts import FewTokens
from microtron.infer.kv_cache import Cache, LayerCache
from microtron.infer.linear import Product
from microtron.infer.sampling import Sampler, Sampling
from microtron.model.model import Transformer

CHUNK_TOKENS = 2048  # prompt tokens of a row that go through the model at once
MASK_CELLS = 2**26  # queries x keys of a later chunk: its mask stays below 64 MiB

# Called with (row, token) for each new token; True ends the row.
OnToken = Callable[[int, int], bool | None]


class Engine:
    """Prefill, extend and generate with one model.

    Weights are taken when the engine is made: a model that trains on needs a new one.

    Args:
        model: any dtype and device.
        compile: compile the step for one token (torch.compile, static shapes).
        chunk_tokens: prompt tokens of a row that go through the model at once.
    """

    def __init__(
        self, model: Transformer, *, compile: bool = False, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self.args = model.model_args
        self.body = cached_copy(model)
        self.head = model.output
        Product([model.output], bag=False)
        weight = model.tok_embeddings.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.chunk_tokens = chunk_tokens
        self.token_step = (
            torch.compile(self._token, dynamic=False, fullgraph=True) if compile else None
        )

    @torch.inference_mode()
    def prefill(self, rows: list[list[int]], capacity: int) -> tuple[Cache, torch.Tensor]:
        """Runs whole prompts.

        Args:
            rows: the tokens of each row, at least one.
            capacity: tokens a row will have in the end; a larger cache grows by copying.

        Returns:
            the cache, and logits [B, V] of what follows each row.
        """
        assert rows and all(rows), "a row has at least one token"
        longest = max(map(len, rows))
        self.check_length(longest)
        capacity = max(capacity, longest)
        if self.token_step is not None:  # lengths that differ little share their code
            capacity += -capacity % 128
        cache = Cache.empty(self.args, len(rows), capacity, self.device, self.dtype)
        return cache, self.append(cache, rows)

    @torch.inference_mode()
    def append(self, cache: Cache, rows: list[list[int]]) -> torch.Tensor:
        """Runs more of every row, at least one token, part by part, in place; returns the logits
        [B, V] of what follows.
        """
        longest = max(map(len, rows))
        last = torch.empty(len(rows), self.args.dim, device=self.device, dtype=self.dtype)
        start = 0
        while start < longest:
            width = min(self.chunk_tokens, longest - start)
            seen = max(cache.lengths)
            if seen:
                width = min(width, max(64, MASK_CELLS // (len(rows) * (seen + width))))
            parts = [row[start : start + width] for row in rows]
            hidden = self._run(cache, *self._padded(parts))
            ends = [b for b, row in enumerate(rows) if start < len(row) <= start + width]
            last[ends] = hidden[ends, [len(parts[b]) - 1 for b in ends]]
            start += width
        return self.head(last)

    @torch.inference_mode()
    def extend(
        self, cache: Cache, tokens: torch.Tensor, lengths: torch.Tensor | list[int]
    ) -> torch.Tensor:
        """Appends tokens to every row, in place.

        Args:
            tokens: [B, n], each row's tokens on the left.
            lengths: [B] how many of them each row has, 0 too; the others are padding.

        Returns:
            logits [B, n, V]; those of padding mean nothing.
        """
        lengths = torch.as_tensor(lengths).tolist()
        return self.head(self._run(cache, tokens.to(self.device), lengths))

    def generate(
        self,
        rows: list[list[int]],
        params: Sampling | list[Sampling],
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """Continues each row; its tokens depend on its prompt and its own params alone.

        Args:
            rows: the prompts, at least one token each.
            params: for all rows, or one for each.
            on_token: called with (row, token) as they come; True ends the row.

        Returns:
            the new tokens of each row, stop tokens left out.

        Raises:
            UserError: a row would grow beyond a learned table of positions.
        """
        params = [params] * len(rows) if isinstance(params, Sampling) else params
        ends = [len(row) + p.max_new_tokens for row, p in zip(rows, params, strict=True)]
        self.check_length(max(ends) - 1)  # the last token is not looked at
        cache, logits = self.prefill(rows, max(ends))
        return self.continue_from(cache, logits, params, on_token)

    @torch.inference_mode()
    def continue_from(
        self,
        cache: Cache,
        logits: torch.Tensor,
        params: list[Sampling],
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """`generate` from a cache and the logits [B, V] of what follows its rows.

        With one row the cache holds every token but the last one returned.
        """
        sampler, found = Sampler(params), [[] for _ in params]
        rows = list(range(len(params)))  # the caller's row of each row of the batch
        while True:
            going: dict[int, int] = {}  # row of the batch -> its token
            live = [place for place, row in enumerate(rows) if row >= 0]
            wanted = logits if len(live) == len(rows) else logits[live]
            tokens = sampler(wanted, [rows[place] for place in live])
            for place, token in zip(live, tokens, strict=True):
                row = rows[place]
                if token in params[row].stop_tokens:
                    continue
                found[row].append(token)
                ended = on_token is not None and on_token(row, token)
                if not ended and len(found[row]) < params[row].max_new_tokens:
                    going[place] = token
            if not going:
                return found
            if len(going) < len(rows) and self.token_step is None:
                cache, rows = cache.select(list(going)), [rows[place] for place in going]
                going = dict(enumerate(going.values()))
            rows = [row if place in going else -1 for place, row in enumerate(rows)]
            batch = torch.tensor([[going.get(i, 0)] for i in range(len(rows))], device=self.device)
            logits = self.extend(cache, batch, [int(row >= 0) for row in rows])[:, 0]

    def check_length(self, tokens: int) -> None:
        """Raises: UserError for more tokens than a learned table has positions."""
        if self.args.positions == "learned" and tokens > self.args.max_positions:
            raise UserError(
                f"{tokens:,} tokens do not fit: this model has learned "
                f"{self.args.max_positions:,} positions; shorten the prompt or ask for fewer tokens"
            )

    def _padded(self, parts: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
        """Rows side by side, zeros on the right, and their lengths."""
        lengths = [len(part) for part in parts]
        width = max(lengths)
        padded = [part + [0] * (width - len(part)) for part in parts]
        return torch.tensor(padded, device=self.device), lengths

    def _run(self, cache: Cache, tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """tokens [B, n] into the cache -> hidden states [B, n, dim], normed for the head."""
        rows, width = tokens.shape
        self.check_length(max(n + c for n, c in zip(cache.lengths, counts, strict=True)))
        cache.grow(max(cache.lengths) + width)
        if width == 1 and self.token_step is not None:
            starts = torch.tensor(cache.lengths, device=self.device)
            hidden = self.token_step(cache.layers, tokens, starts)
        else:
            if width == 1:
                step = TokenStep(cache.layers, cache.lengths)
            else:
                kind = ChunkStep if any(cache.lengths) else FirstStep
                step = kind(cache, width, counts, self.args.attn_backend, self.args.window)
            positions = self._positions(cache.lengths, width)
            hidden = self.body(tokens, {"window": step, "full": step}, positions)
        cache.lengths = [n + c for n, c in zip(cache.lengths, counts, strict=True)]
        return hidden

    def _token(
        self, layers: list[LayerCache], tokens: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """One token a row in shapes that never change, for the compiler: starts [B]."""
        step = TokenStep(layers, starts)
        positions = starts[:, None]
        if self.args.positions == "learned":
            positions = positions.clamp(max=self.args.max_positions - 1)
        return self.body(tokens, {"window": step, "full": step}, positions)

    def _positions(self, lengths: list[int], width: int) -> torch.Tensor:
        """[B or 1, n]: where the new tokens stand; padding beyond a learned table at its end."""
        starts = lengths[:1] if len(set(lengths)) == 1 else lengths
        starts = torch.tensor(starts, device=self.device)
        positions = starts[:, None] + torch.arange(width, device=self.device)
        if self.args.positions == "learned":
            positions = positions.clamp(max=self.args.max_positions - 1)
        return positions


def cached_copy(model: Transformer) -> Transformer:
    """The model without its head, its attention and experts replaced; parameters are shared."""
    own = [*model.parameters(), *model.buffers()]
    body = copy.deepcopy(model, {id(tensor): tensor for tensor in own})
    body.output = None
    for i, block in enumerate(body.layers.values()):
        window = body.model_args.window if block.mask_kind == "window" else None
        block.attention = CachedAttention(block.attention, i, window)
        if block.moe_enabled:
            block.moe = FewTokens(block.moe)
    return body.eval()
