"""gpt-oss attention, one query at a time.

Written from the definition (github.com/openai/gpt-oss, torch/model.py, ``sdpa``): a head's softmax
runs over the keys the query may see and one more logit, the sink, which is not scaled and has no
value.
"""

import math

import torch


def may_see(query, key, window, document):
    """Whether position `query` may look at position `key`; a window of W is W keys with itself."""
    if key > query:
        return False
    if window is not None and key <= query - window:
        return False
    return document is None or document[query] == document[key]


def sink_attention(q, k, v, sinks=None, window=None, documents=None):
    """q [B, S, H, D], k and v [B, S, K, D], sinks [H] -> [B, S, H, D].

    documents: for each of the B rows the document numbers of its S tokens, or None.
    """
    batch, seq_len, heads, width = q.shape
    heads_per_kv = heads // k.shape[2]
    rows = []
    for b in range(batch):
        document = None if documents is None else documents[b]
        for t in range(seq_len):
            for h in range(heads):
                kv = h // heads_per_kv
                seen = [s for s in range(seq_len) if may_see(t, s, window, document)]
                logits = [(q[b, t, h] * k[b, s, kv]).sum() / math.sqrt(width) for s in seen]
                denominator = sum(torch.exp(logit) for logit in logits)
                if sinks is not None:
                    denominator = denominator + torch.exp(sinks[h])
                out = torch.zeros(width, dtype=q.dtype)
                for s, logit in zip(seen, logits, strict=True):
                    out = out + torch.exp(logit) / denominator * v[b, s, kv]
                rows.append(out)
    return torch.stack(rows).view(batch, seq_len, heads, width)
