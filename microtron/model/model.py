"""The transformer: embedding, blocks, norm, head.

It follows gpt-oss (arXiv:2508.10925; github.com/openai/gpt-oss, torch/model.py). Any of its ends
may be missing (None), as a pipeline stage needs; it knows nothing of stages, meshes or optimizers.
"""

import torch
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.attention_core import resolve_backend
from microtron.model.block import Block
from microtron.model.head import Head
from microtron.model.init import init_parameters
from microtron.model.masks import build_masks
from microtron.model.norms import build_norm
from microtron.model.rope import RotaryEmbedding


class Transformer(nn.Module):
    """Tokens to logits, or to the summed loss when labels are given.

    Attributes that training sets, and that change nothing in inference:
        init_seed: seed of `init_weights`.
        step_tokens: tokens of the global batch, over which router losses are averaged; None: the
            tokens of each forward.
        place_parameter: see `init_parameters`.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.model_args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        learned = args.positions == "learned"
        self.pos_embeddings = nn.Embedding(args.max_positions, args.dim) if learned else None
        self.rope = None if learned else RotaryEmbedding(args)
        self.layers = nn.ModuleDict({str(i): Block(i, args) for i in range(args.n_layers)})
        self.norm = build_norm(args)
        self.output = Head(args)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.init_seed = 0
        self.step_tokens: int | None = None
        self.place_parameter = None
        self._masks: dict[tuple, dict[str, object]] = {}

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fills parameters and buffers after `to_empty`; `init.py` says why it is layout-proof."""
        if self.model_args.tie_embeddings and self.tok_embeddings and self.output:
            self.output.weight = self.tok_embeddings.weight  # `to_empty` has made two of them
        with torch.no_grad():
            init_parameters(self, self.model_args, self.init_seed, self.place_parameter)
        self.init_buffers(buffer_device)

    def init_buffers(self, device: torch.device | None = None) -> None:
        """Frequencies of RoPE, and what steers and counts the experts, as at step 0."""
        if self.rope is not None:
            self.rope.init_weights(device)
        for layer in self.layers.values():
            if layer.moe_enabled:
                layer.moe.init_buffers(device)

    def _masks_of(
        self, seq_len: int, device: torch.device, documents: torch.Tensor | None
    ) -> dict[str, object]:
        """Masks of a batch; without documents they are built once for each length."""
        backend = resolve_backend(self.model_args.attn_backend, device.type)
        if documents is not None:
            return build_masks(backend, seq_len, self.model_args.window, device, documents)
        key = (backend, seq_len, device)
        if key not in self._masks:
            if len(self._masks) >= 4:  # lengths that come and go must not pile up
                self._masks.clear()
            self._masks[key] = build_masks(backend, seq_len, self.model_args.window, device)
        return self._masks[key]

    def forward(
        self,
        tokens: torch.Tensor,
        attention_masks: dict[str, object] | None = None,
        positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass.

        Args:
            tokens: [B, S] int64, or hidden states [B, S, dim] on a later pipeline stage. Where a
                sequence is spread over ranks, tokens, labels and hidden states are this rank's part
                of S; positions, documents and masks always speak of the whole sequence.
            attention_masks: see `build_masks`; None: made here, causal, by document if these are
                given.
            positions: [B or 1, S] int64 for RoPE or the learned table; None: 0 .. S-1.
            labels: [B, S] int64 with -100 for "not a target"; only the last stage looks at them.
            documents: [B, S] number of the document of each token; None: one document.

        Returns:
            logits [B, S, V]; or the summed cross-entropy (fp32 scalar) with labels; or hidden
            states [B, S, dim] where there is no head.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        masks = attention_masks or self._masks_of(positions.shape[1], tokens.device, documents)
        rope = None if self.rope is None else self.rope(positions)
        h = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        if self.pos_embeddings is not None:
            h = h + self.pos_embeddings(positions)
        for layer in self.layers.values():
            h, counts = layer(h, rope, masks[layer.mask_kind], self.step_tokens)
            if counts is not None and self.training and torch.is_grad_enabled():
                layer.moe.tokens_per_expert += counts
        h = h if self.norm is None else self.norm(h)
        return h if self.output is None else self.output(h, labels)


def empty_model(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model whose parameters hold nothing yet, to be read into; its buffers are as at step 0.

    Parameters get ``dtype``; buffers keep theirs, so that routing stays in fp32.
    """
    with torch.device("meta"):
        model = Transformer(args)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.init_buffers(device)
    return model
