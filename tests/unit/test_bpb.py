"""Scores of continuations and bits per byte: against plain forwards, one at a time."""

import math

import pytest
import torch
from helpers import build_random, tiny_args

from microtron.data.tokenizers import ByteTokenizer, CharTokenizer
from microtron.errors import UserError
from microtron.evals import score
from microtron.evals.bpb import bits_per_byte, read_text, windows
from microtron.evals.score import Scorer
from microtron.infer.kv_cache import Cache

TEXT = "The füll moon rose; 'twas late, and nobody had locked the door of the barn. " * 2


@pytest.fixture(scope="module")
def model():
    return build_random(tiny_args(vocab_size=264, attn_backend="auto", window=7)).eval()


@torch.no_grad()
def slowly(model, context, continuation):
    """log-probabilities [continuation], from one plain forward."""
    logits = model(torch.tensor([[*context, *continuation][:-1]]))[0, len(context) - 1 :]
    found = logits.double().log_softmax(-1)
    return found.gather(-1, torch.tensor(continuation)[:, None]).squeeze(-1), logits.argmax(-1)


def some_pairs():
    ids = torch.randint(257, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    shared = [ids[:9], ids[20:23], ids[40:70]]
    pairs = [(c, ids[100 + i : 101 + 2 * i]) for c in shared for i in range(4)]  # one token: i = 0
    pairs += [(ids[i : 2 * i], ids[200 : 200 + i]) for i in (1, 5, 17, 30)]
    pairs += [(shared[0], [3]), (shared[0], [3]), (ids[90:92], [5])]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2))
    return [pairs[i] for i in order]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_plain_forwards(model, batch_size):
    pairs = some_pairs()
    found = Scorer(model, 100, batch_size).score(pairs)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        truth, _ = slowly(model, context, continuation)
        assert logprob == pytest.approx(truth.sum().item(), abs=1e-4)
        assert not greedy


def test_greedy_is_told_of_all_tokens(model, monkeypatch):
    context, likeliest = [256, 65, 66], []
    for _ in range(4):
        likeliest.append(slowly(model, context + likeliest, [0])[1].item())
    wrong = [*likeliest[:3], (likeliest[3] + 1) % 257]
    pairs = [(context, likeliest), (context, wrong), (context, likeliest[:1])]
    scorer = Scorer(model, 100)
    for logits in (score._LOGITS, 264 * 2):  # all tokens of a continuation at once, and not
        monkeypatch.setattr(score, "_LOGITS", logits)
        assert [s.greedy for s in scorer.score(pairs)] == [True, False, True]  # cached
        assert [scorer.score([pair])[0].greedy for pair in pairs] == [True, False, True]


def test_few_logits_at_once_change_nothing(model, monkeypatch):
    pairs = some_pairs()
    expected = Scorer(model, 100).score(pairs)
    monkeypatch.setattr(score, "_LOGITS", 264 * 3)
    for mine, wanted in zip(Scorer(model, 100).score(pairs), expected, strict=True):
        assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_no_batch_has_more_rows_than_asked_for(model, monkeypatch):
    """Whole documents share the separator as their context, and tasks without contexts do too."""
    pairs = [([256], [65 + i] * (1 + i)) for i in range(9)]
    pairs += [([256, 65], [65 + i] * (1 + i)) for i in range(9)]
    scorer, rows = Scorer(model, 100, batch_size=4), []
    body = scorer.engine.body
    monkeypatch.setattr(
        scorer.engine, "body", lambda x, *rest: (rows.append(x.shape[0]), body(x, *rest))[1]
    )
    found = scorer.score(pairs)
    assert max(rows) == 4
    for (context, continuation), score_ in zip(pairs, found, strict=True):
        truth, _ = slowly(model, context, continuation)
        assert score_.logprob == pytest.approx(truth.sum().item(), abs=1e-4)


def test_whole_rows_need_no_cache(model, monkeypatch):
    monkeypatch.setattr(Cache, "empty", None)
    (found,) = Scorer(model, 100).score([([256, 65], [66, 67])])
    truth, _ = slowly(model, [256, 65], [66, 67])
    assert found.logprob == pytest.approx(truth.sum().item(), abs=1e-4)


def test_long_contexts_are_cut_and_long_continuations_refused(model):
    context, continuation = list(range(30)), list(range(40, 50))
    (found,) = Scorer(model, 16).score([(context, continuation)])
    truth, _ = slowly(model, context[-7:], continuation)  # 7 + 10 - 1 = 16
    assert found.logprob == pytest.approx(truth.sum().item(), abs=1e-4)
    with pytest.raises(UserError, match="continuation of 10 tokens.*--max-length"):
        Scorer(model, 9).score([(context, continuation)])


@pytest.mark.parametrize("count, window, stride", [(50, 8, 3), (50, 8, 8), (7, 8, 2), (16, 8, 1)])
def test_windows_score_each_token_once_in_the_longest_context(count, window, stride):
    ids = list(range(1, count + 1))
    scored = []
    for number, (context, continuation) in enumerate(windows(ids, 0, window, stride)):
        seen = len(context) + len(continuation) - 1
        assert seen == min(window, count) if number == 0 else seen == window
        assert len(continuation) <= (window if number == 0 else stride)
        before = [0, *ids][: continuation[0]]
        assert context == before[-len(context) :]
        scored += continuation
    assert scored == ids


@pytest.mark.parametrize("window, stride", [(40, 40), (40, 13), (1000, 500)])
def test_bits_per_byte_by_hand(model, window, stride):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    nats, done = 0.0, 0
    while done < len(ids):  # window by window, each token alone
        for target in range(done, min(done + (stride if done else window), len(ids))):
            end = min((done + stride) if done else window, len(ids))
            context = [256, *ids][max(end - window, 0) : target + 1]
            nats -= slowly(model, context, [ids[target]])[0].item()
        done = end
    found = bits_per_byte(Scorer(model, window), tokenizer, TEXT, prefix=256, stride=stride)
    assert found.bpb == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert (found.tokens, found.bytes) == (len(ids), len(TEXT.encode()))


def test_bytes_are_those_of_the_text_for_any_tokenizer(model):
    tokenizer = CharTokenizer(TEXT)
    found = bits_per_byte(Scorer(model, 64), tokenizer, TEXT, prefix=tokenizer.eot_id, stride=32)
    assert (found.tokens, found.bytes) == (len(TEXT), len(TEXT.encode())) and "ü" in TEXT
    assert found.bpb == pytest.approx(
        found.loss * found.tokens / math.log(2) / found.bytes, rel=1e-12
    )


def test_texts_that_cannot_be_read(tmp_path):
    for name, content in {"none": None, "empty": b"", "binary": b"\xff\xfe"}.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_text(path)
    (tmp_path / "dos").write_bytes(b"a\r\nb")
    assert read_text(tmp_path / "dos") == "a\r\nb"
