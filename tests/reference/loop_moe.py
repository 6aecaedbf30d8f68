"""The gpt-oss mixture of experts, one token at a time.

Written from the definition (github.com/openai/gpt-oss, torch/model.py, ``MLPBlock``): top-k on the
raw router logits, softmax over the k; the weights multiply the experts' outputs, biases included.
"""

import torch


def gated(hidden, alpha=1.702, limit=7.0):
    """hidden: 2 I numbers gate0, up0, gate1, up1, ... -> I numbers."""
    out = []
    for i in range(0, hidden.shape[0], 2):
        gate, up = hidden[i], hidden[i + 1]
        top = torch.full_like(gate, limit)
        gate = torch.minimum(gate, top)
        up = torch.maximum(torch.minimum(up, top), -top)
        out.append(gate / (1 + torch.exp(-alpha * gate)) * (up + 1))
    return torch.stack(out)


def expert(x, gate_up, gate_up_bias, down, down_bias, limit=7.0):
    """One token [dim] through one expert."""
    return gated(x @ gate_up + gate_up_bias, limit=limit) @ down + down_bias


def choose(logits, top_k, selection_bias=None):
    """The k experts with the highest logits; the bias takes part in the choice alone."""
    rank = logits if selection_bias is None else logits + selection_bias
    return sorted(range(len(rank)), key=lambda e: rank[e].item(), reverse=True)[:top_k]


def moe(
    x,
    gate,
    gate_bias,
    gate_up,
    gate_up_bias,
    down,
    down_bias,
    top_k,
    selection_bias=None,
    limit=7.0,
):
    """x [N, dim]; gate [E, dim]; expert weights [E, in, out] -> ([N, dim], tokens per expert)."""
    rows, counts = [], [0] * gate.shape[0]
    for token in x:
        logits = gate @ token + gate_bias
        chosen = choose(logits, top_k, selection_bias)
        total = sum(torch.exp(logits[e]) for e in chosen)
        out = torch.zeros_like(token)
        for e in chosen:
            weight = torch.exp(logits[e]) / total
            answer = expert(token, gate_up[e], gate_up_bias[e], down[e], down_bias[e], limit)
            out = out + weight * answer
            counts[e] += 1
        rows.append(out)
    return torch.stack(rows), counts
