"""A small dense GPT-2 style character model, trained as nanoGPT's CPU recipe trains: the peer of
shakespeare.py.

From the facts of github.com/karpathy/nanoGPT (README, "I only have a macbook"): 4 layers, 4 heads,
128 wide, context 64, batch 12, no dropout, no biases, learned positions, tied head, AdamW with lr
1e-3 decaying to 1e-4 by cosine over 2000 steps after 100 of warm-up, betas 0.9 and 0.99, weight
decay 0.1, clipping at 1. The code is ours.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


class Block(nn.Module):
    """Causal self-attention and a GELU MLP, pre-norm, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, WIDTH] -> the same."""
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharGPT(nn.Module):
    """tokens [B, S] -> logits [B, S, V]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * LAYERS) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The head shares the embedding's weights."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def learning_rate(step: int) -> float:
    """Linear warm-up over 100 steps, cosine from 1e-3 to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4


def validation_loss(model: CharGPT, data: torch.Tensor) -> float:
    """Mean loss over the whole split, windows of CONTEXT, each token a target once."""
    count = (len(data) - 1) // CONTEXT
    x = data[: count * CONTEXT].view(count, CONTEXT)
    y = data[1 : count * CONTEXT + 1].view(count, CONTEXT)
    with torch.no_grad():
        sums = [
            F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
            for a, b in zip(x.split(256), y.split(256), strict=True)
        ]
    return sum(sums) / y.numel()


def train(
    text: str, target: float, every: int = 50, seed: int = 1337, steps: int = STEPS
) -> dict[str, object]:
    """Runs the recipe to the first validation at or below ``target``, or to its end.

    Validation, every ``every`` steps, does not count as training time. ``reached`` is the point of
    the curve that ended it, None when none did. ``steps`` cuts the run, not the schedule.
    """
    torch.manual_seed(seed)
    alphabet = sorted(set(text))
    table = {c: i for i, c in enumerate(alphabet)}
    data = torch.tensor([table[c] for c in text])
    cut = int(0.9 * len(data))
    train_data, val_data = data[:cut], data[cut:]
    model = CharGPT(len(alphabet))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        fused=True,
    )
    seconds, reached, curve = 0.0, None, []
    for step in range(steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        starts = torch.randint(len(train_data) - CONTEXT, (BATCH,))
        rows = torch.stack([train_data[s : s + CONTEXT + 1] for s in starts.tolist()])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - began
        if (step + 1) % every == 0 or step + 1 == steps:
            val = validation_loss(model, val_data)
            curve.append({"step": step + 1, "time_s": seconds, "val_loss": val})
            print(
                f"baseline step {step + 1}: validation loss {val:.4f} after {seconds:.1f} s",
                flush=True,
            )
            if val <= target:
                reached = curve[-1]
                break
    return {
        "seed": seed,
        "reached": reached,
        "end": curve[-1],
        "tokens": curve[-1]["step"] * BATCH * CONTEXT,
        "val_tokens": (len(val_data) - 1) // CONTEXT * CONTEXT,
        "ms_per_step": 1e3 * seconds / curve[-1]["step"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }
