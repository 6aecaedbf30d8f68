"""Small models with every term switched on, and how tests compare tensors."""

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.model import Transformer

# Every width differs from every other, so that a swapped or transposed one cannot go unseen.
TINY = {
    "dim": 40,
    "n_layers": 2,
    "vocab_size": 61,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "window": 5,
    "window_pattern": "SL",
    "attn_backend": "eager",
    "num_experts": 4,
    "top_k": 2,
    "expert_dim": 24,
    "hidden_dim": 24,
    "experts_backend": "loop",
    "load_balance": "none",
}

# The dense shapes of two other families; to be added to TINY.
GPT2 = {
    "norm": "layer",
    "positions": "learned",
    "max_positions": 64,
    "activation": "gelu",
    "sinks": False,
    "window_pattern": "L",
    "tie_embeddings": True,
    "dim": 64,  # which the heads share out
    "n_kv_heads": 4,
    "num_experts": 0,
    "hidden_dim": 72,
}
LLAMA = {
    "activation": "swiglu",
    "sinks": False,
    "window_pattern": "L",
    "num_experts": 0,
    "hidden_dim": 72,
    "attention_bias": False,
    "mlp_bias": False,
}


def tiny_args(**overrides):
    """ModelArgs of a model that runs in milliseconds."""
    return ModelArgs(**(TINY | overrides))


def build(args, seed=0):
    """A Transformer with weights as at step 0."""
    model = Transformer(args)
    model.init_seed = seed
    model.init_weights()
    return model


def randomise(module, seed=0):
    """Random values in every parameter: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            matrix = parameter.dim() > 1 and "bias" not in name
            parameter.copy_(
                1 + 0.3 * noise
                if "norm" in name
                else noise * parameter.shape[1] ** -0.5
                if matrix
                else noise
            )
    return module


def build_random(args, seed=0):
    """A Transformer in which every term matters."""
    return randomise(build(args, seed), seed)


def tokens_of(args, batch=2, seq_len=12, seed=0):
    """Random tokens [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(args.vocab_size, (batch, seq_len), generator=generator)


def rel(actual, expected):
    """Distance relative to the norm of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def assert_same_loss(model, theirs, seq_len):
    """Logits, and the loss, of one of transformers' models; both are left with gradients."""
    tokens = tokens_of(model.model_args, seq_len=seq_len)
    labels = tokens.roll(-1, dims=1)
    labels[:, -3:] = -100
    expected = theirs(tokens).logits
    assert (model(tokens) - expected).abs().max() < 1e-4

    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    ours = model(tokens, labels=labels)
    ours.backward()
    assert rel(ours.detach(), loss.detach()) < 1e-5


def grads_of(module: nn.Module):
    """Gradients by parameter name."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_grads(actual, expected, tolerance):
    """Every gradient of `expected` is non-zero and matched by norm."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None and actual[name] is not None, name
        assert grad.norm() > 0, f"{name} has no gradient: the test is blind to it"
        assert rel(actual[name], grad) < tolerance, f"{name}: {rel(actual[name], grad)}"
