"""Choosing a token: the filters are transformers', the draw follows the distribution."""

import pytest
import torch

from microtron.errors import UserError
from microtron.infer.sampling import Sampler, Sampling, draw, filtered

LOGITS = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 3
WAYS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (500, 1.0, 0.0),
    (0, 0.6, 0.0),
    (0, 0.01, 0.0),
    (0, 1.0, 0.2),
    (0, 1.0, 1.0),
    (20, 0.9, 0.05),
]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("top_k, top_p, min_p", WAYS)
def test_filters_are_those_of_transformers(top_k, top_p, min_p, temperature):
    from transformers.generation import logits_process as theirs

    expected = theirs.TemperatureLogitsWarper(temperature)(None, LOGITS)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = theirs.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = theirs.MinPLogitsWarper(min_p)(None, expected)
    got = filtered(LOGITS / temperature, top_k, top_p, min_p)
    assert torch.equal(got, expected)
    assert (got > float("-inf")).any(-1).all()


def test_draw_follows_the_distribution():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    numbers = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(draw(probs.expand(20000, -1), numbers), minlength=6) / 20000
    assert torch.allclose(shares, probs, atol=0.015) and (shares[probs == 0] == 0).all()
    edges = torch.tensor([0.0, 0.5, 0.8, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs.expand(4, -1), edges).tolist() == [1, 3, 4, 4]


def test_a_row_depends_on_its_seed_alone():
    ways = [Sampling(seed=s, temperature=t) for s, t in ((1, 1.0), (2, 1.0), (3, 0.0), (1, 2.0))]
    together, alone = Sampler(ways), [Sampler([way]) for way in ways]
    series = []
    for logits in LOGITS[:30]:
        tokens = together(logits.expand(4, -1), [0, 1, 2, 3])
        assert tokens == [sampler(logits[None], [0])[0] for sampler in alone]
        series.append(tokens)
    assert [tokens[2] for tokens in series] == LOGITS[:30].argmax(-1).tolist()
    assert [tokens[0] for tokens in series] != [tokens[1] for tokens in series]


def test_rows_that_have_ended_draw_nothing():
    ways = [Sampling(seed=1), Sampling(seed=2)]
    some, alone = Sampler(ways), Sampler(ways[1:])
    some(LOGITS[:2], [0, 1]), alone(LOGITS[1:2], [0])
    for logits in LOGITS[2:12, None]:
        assert some(logits, [1]) == alone(logits, [0])


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_beyond_the_tokenizer(temperature):
    logits = LOGITS.clone()
    logits[:, 45:] = 1e4
    sampler = Sampler([Sampling(temperature=temperature, vocab_size=45)] * 40)
    assert max(sampler(logits, list(range(40)))) < 45


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("min_p", 2.0),
        ("seed", -1),
    ],
)
def test_refusals(field, value):
    with pytest.raises(UserError, match=f"{field} = {value} cannot work: give"):
        Sampling(**{field: value})
