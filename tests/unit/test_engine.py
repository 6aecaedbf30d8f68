"""Cached generation answers to `uncached`: same tokens, same logits, whatever the model's shape."""

import itertools

import pytest
import torch
from helpers import build_random, tiny_args

from microtron.errors import UserError
from microtron.infer import uncached
from microtron.infer.engine import Engine
from microtron.infer.sampling import Sampling

FAST = {"attn_backend": "auto", "experts_backend": "auto"}
GPT2 = {
    "num_experts": 0,
    "norm": "layer",
    "positions": "learned",
    "max_positions": 60,
    "activation": "gelu",
    "sinks": False,
    "n_kv_heads": 4,
    "window_pattern": "L",
    "tie_embeddings": True,
}
MODELS = {
    "truth": {},  # eager attention, experts in a loop
    "fast": FAST,
    "long_window": FAST | {"window": 64},
    "windows_only": FAST | {"window_pattern": "S", "window": 3},
    "full_only": FAST | {"window_pattern": "L"},
    "no_sinks": FAST | {"sinks": False},
    "mqa": FAST | {"n_kv_heads": 1},
    "mha_qk_norm": FAST | {"n_kv_heads": 4, "qk_norm": True},
    "yarn": FAST | {"rope_factor": 4.0, "rope_original_len": 64},
    "no_bias": FAST | {"attention_bias": False, "mlp_bias": False},
    "selection_bias": FAST | {"load_balance": "bias"},
    "dense": FAST | {"num_experts": 0},
    "gpt2": FAST | GPT2,
    "llama": FAST | {"num_experts": 0, "activation": "swiglu", "sinks": False, "mlp_bias": False},
    "softcap": FAST | {"logit_softcap": 5.0, "tie_embeddings": True},
}
# Shorter and longer than the window, and a ring that goes round several times; unequal in a batch.
GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(61, (n,), generator=GENERATOR).tolist() for n in (1, 3, 17, 30)]
GREEDY = Sampling(max_new_tokens=22, temperature=0)
SEEDED = Sampling(max_new_tokens=22, temperature=1.3, top_k=20, top_p=0.9, seed=5)


def build(name):
    model = build_random(tiny_args(**MODELS[name])).eval()
    with torch.no_grad():
        model.tok_embeddings.weight *= 3
        for name, parameter in model.named_parameters():
            if "bias" in name:  # else they alone would choose the tokens
                parameter *= 0.2
    for layer in model.layers.values():
        if layer.moe_enabled and layer.moe.expert_bias is not None:
            layer.moe.expert_bias.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
    return model


@torch.no_grad()
def logits_of(model, row):
    """[len(row), V] by the model's plain forward."""
    return model(torch.tensor([row]))[0]


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached(name):
    model = build(name)
    for params in (GREEDY, SEEDED):
        expected = uncached.generate(model, PROMPTS, params)
        if not model.model_args.tie_embeddings:  # a tied model repeats itself
            assert len(set(itertools.chain(*expected))) > 9  # else it would be no test
        for chunk in (2048, 4):
            assert Engine(model, chunk_tokens=chunk).generate(PROMPTS, params) == expected


@pytest.mark.parametrize("name", ["truth", "fast", "windows_only", "gpt2"])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_logits_of_prefill_extend_and_select(name, chunk):
    model = build(name)
    engine = Engine(model, chunk_tokens=chunk)
    cache, logits = engine.prefill(PROMPTS, 31)  # and it has to grow
    for row, got in zip(PROMPTS, logits, strict=True):
        assert torch.allclose(got, logits_of(model, row)[-1], atol=1e-5)
    counts, new = [9, 0, 4, 1], torch.randint(61, (4, 9), generator=GENERATOR)
    got = engine.extend(cache, new, counts)
    rows = [
        row + new[b, :n].tolist() for b, (row, n) in enumerate(zip(PROMPTS, counts, strict=True))
    ]
    for b, (row, n) in enumerate(zip(rows, counts, strict=True)):
        assert torch.allclose(got[b, :n], logits_of(model, row)[len(row) - n :], atol=1e-5)
    index = [2, 0, 0, 3, 1]
    several = cache.select(index)
    more = torch.randint(61, (5, 6), generator=GENERATOR)
    got = engine.extend(several, more, torch.full((5,), 6))
    for b, old in enumerate(index):
        row = rows[old] + more[b].tolist()
        assert torch.allclose(got[b], logits_of(model, row)[-6:], atol=1e-5)
    assert cache.lengths == [len(row) for row in rows]  # the cache it was taken from is untouched
    last = engine.extend(cache, more[:4, :1], [1, 1, 1, 1])
    for b, row in enumerate(rows):
        expected = logits_of(model, row + more[b, :1].tolist())[-1]
        assert torch.allclose(last[b, 0], expected, atol=1e-5)


def test_rows_do_not_touch_each_other():
    """A row alone, in a batch, and beside rows that end early: the same tokens."""
    model = build("fast")
    params = [Sampling(n, 1.0, seed=s) for n, s in ((3, 1), (20, 2), (1, 3), (12, 4))]
    together = Engine(model).generate(PROMPTS, params)
    assert [len(row) for row in together] == [3, 20, 1, 12]
    for row, way, got in zip(PROMPTS, params, together, strict=True):
        assert Engine(model).generate([row], way) == [got]


def test_stop_tokens_and_callbacks_end_rows():
    model = build("fast")
    free = Engine(model).generate(PROMPTS, GREEDY)
    stop = free[3][5]
    params = Sampling(max_new_tokens=22, temperature=0, stop_tokens=(stop,))
    expected = [list(itertools.takewhile(lambda t: t != stop, row)) for row in free]
    heard = [[] for _ in PROMPTS]
    got = Engine(model).generate(PROMPTS, params, lambda row, token: heard[row].append(token))
    assert got == expected == heard and len(got[3]) < 22
    assert uncached.generate(model, PROMPTS, params) == expected
    got = Engine(model).generate(PROMPTS, GREEDY, lambda row, token: row == 1)
    assert got[1] == free[1][:1] and got[0] == free[0]


def test_padded_vocabulary_is_never_chosen():
    model = build("fast")
    with torch.no_grad():
        model.output.weight[50:] *= 40  # nothing would be likelier
    params = Sampling(max_new_tokens=30, temperature=1.0, vocab_size=50)
    assert max(itertools.chain(*Engine(model).generate(PROMPTS, params))) < 50
    free = Sampling(max_new_tokens=30, temperature=1.0)
    assert max(itertools.chain(*Engine(model).generate(PROMPTS, free))) >= 50


def test_the_model_stays_as_it_was():
    model = build("softcap")
    tokens = torch.tensor(PROMPTS[3:])
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(tokens)
        Engine(model).generate(PROMPTS, GREEDY)
        assert torch.allclose(model(tokens), before, atol=1e-5)
    assert list(model.state_dict()) == names
    assert model.output.weight is model.tok_embeddings.weight


def test_weights_are_not_stored_twice():
    model = build("fast")
    engine = Engine(model)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(model)}
    for tensor in [*tensors(engine.body), *(p for p in products(engine.body))]:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
    assert sum(held.values()) == sum(t.nbytes for t in tensors(model))


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def products(body):
    for layer in body.layers.values():
        for product in (layer.attention.qkv, layer.attention.wo):
            yield from (t for t in (product.weight, product.bias) if t is not None)


def test_learned_positions_have_an_end():
    model = build("gpt2")  # 60 positions
    engine = Engine(model)
    params = Sampling(max_new_tokens=31, temperature=0)
    assert engine.generate(PROMPTS[3:], params) == uncached.generate(model, PROMPTS[3:], params)
    too_many = Sampling(max_new_tokens=32, temperature=0)
    with pytest.raises(UserError, match=r"61 tokens do not fit: this model has learned 60"):
        engine.generate(PROMPTS[3:], too_many)
    cache, _ = engine.prefill(PROMPTS[3:], 60)
    with pytest.raises(UserError, match="61 tokens"):
        engine.extend(cache, torch.zeros(1, 31, dtype=torch.long), [31])


def test_a_prompt_in_chunks_needs_less_memory_than_its_square(monkeypatch):
    """Later chunks get narrower as the cache grows, and the result is the same."""
    from microtron.infer import engine as module

    model = build("fast")
    row = [torch.randint(61, (600,), generator=GENERATOR).tolist()]
    expected = logits_of(model, row[0])[-1]
    monkeypatch.setattr(module, "MASK_CELLS", 80 * 600)
    engine, widths = Engine(model, chunk_tokens=200), []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda c, t, n: widths.append(t.shape[1]) or run(c, t, n))
    _, logits = engine.prefill(row, 600)
    assert torch.allclose(logits[0], expected, atol=1e-5)
    assert widths[0] == 200 and all(64 <= w <= 120 for w in widths[1:-1]) and sum(widths) == 600


@pytest.mark.parametrize("name", ["fast", "gpt2"])
def test_the_compiled_step_is_one_graph(name, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile(f, backend="eager", **options)
    )
    model = build(name)
    params = [Sampling(n, 0) for n in (4, 9, 6, 9)]
    expected = [
        row[: p.max_new_tokens]
        for p, row in zip(params, Engine(model).generate(PROMPTS, GREEDY), strict=True)
    ]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert Engine(model, compile=True).generate(PROMPTS, params) == expected


def test_bfloat16():
    model = build("fast").bfloat16()
    model.rope.init_weights()
    got = Engine(model).prefill(PROMPTS, 40)[1]
    for row, logits in zip(PROMPTS, got, strict=True):
        expected = logits_of(model, row)[-1]
        assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fast", "no_sinks", "gpt2"])
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_on_cuda(name, compile):
    widths = {"dim": 64, "expert_dim": 64, "hidden_dim": 64}
    model = build_random(tiny_args(**MODELS[name] | widths)).eval().cuda()
    params = Sampling(max_new_tokens=12, temperature=0)
    expected = uncached.generate(model, PROMPTS, params)
    assert Engine(model, compile=compile).generate(PROMPTS, params) == expected
    half = model.bfloat16()
    if half.rope is not None:
        half.rope.init_weights()
    cache, _ = Engine(half, compile=compile).prefill(PROMPTS, 40)
    new = torch.randint(61, (4, 1), generator=GENERATOR)
    got = Engine(half, compile=compile).extend(cache, new, [1] * 4)[:, 0].float()
    with torch.no_grad():
        for row, token, logits in zip(PROMPTS, new.tolist(), got, strict=True):
            expected = half(torch.tensor([row + token], device="cuda"))[0, -1].float()
            assert (logits - expected).norm() < 0.05 * expected.norm()
