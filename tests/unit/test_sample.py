"""Samples: padding on the right must not matter, choices must follow the distribution."""

import pytest
import torch
from helpers import build_random, tiny_args

from microtron.data.tokenizers import load_tokenizer
from microtron.sample import choose, sample

BYTES = load_tokenizer("byte")


@pytest.fixture(scope="module")
def model():
    return build_random(tiny_args(vocab_size=264))


def greedy_by_hand(model, prompt, tokens, length):
    """Each token from an unpadded pass over the context."""
    context = [BYTES.eot_id, *BYTES.encode(prompt)]
    start = len(context)
    model.eval()
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([context[-length:]]))[0, -1, : BYTES.vocab_size]
        token = int(logits.argmax())
        if token == BYTES.eot_id:
            break
        context.append(token)
    return BYTES.decode(context[start:])


def of(model):
    """What the trainer hands to sample, for one process."""
    return lambda tokens, index: model(tokens)[0, index]


@pytest.mark.parametrize("length", [4, 16])
def test_greedy_equals_unpadded_passes(model, length):
    text = sample(of(model), BYTES, "ab", tokens=9, length=length, temperature=0, top_k=0, seed=0)
    assert text == greedy_by_hand(model, "ab", 9, length)
    assert text


def test_seed_decides(model):
    def draw(seed):
        options = {"tokens": 12, "length": 16, "temperature": 1.5, "top_k": 0, "seed": seed}
        return sample(of(model), BYTES, "x", **options)

    assert draw(1) == draw(1) != draw(2)


def test_choose_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, 0.7, 0, generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.03)
    assert {choose(logits, 5.0, 2, generator) for _ in range(200)} == {0, 1}
    assert choose(logits, 0, 0, generator) == 0


def test_stops_at_the_separator():
    def ends(tokens, index):
        logits = torch.zeros(264)
        logits[BYTES.eot_id] = 9.0
        return logits

    text = sample(ends, BYTES, "x", tokens=5, length=8, temperature=0, top_k=0, seed=0)
    assert text == ""
