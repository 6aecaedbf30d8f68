"""Generation with a cache against transformers' ``generate``: same weights, same prompts, greedy.

    python benchmarks/generate.py --out benchmarks/results/generate.json
    python benchmarks/generate.py --device cuda --out benchmarks/results/generate_cuda.json

Both sides continue the same prompts by the same number of tokens in one process, taking turns, and
must choose the same first tokens. The peer gets its best: each implementation of its experts and
each kind of cache that runs here, the fastest counts. On a CPU in fp32 and one thread, on CUDA in
bf16.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import facts, interleave, summary, write_json  # noqa: E402
from train_step import peer  # noqa: E402

from microtron.infer.engine import Engine  # noqa: E402
from microtron.infer.sampling import Sampling  # noqa: E402
from microtron.model.args import ModelArgs  # noqa: E402
from microtron.model.model import Transformer  # noqa: E402

SHAPES = {
    "small": {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32}
    | {"num_experts": 8, "top_k": 4, "expert_dim": 256, "vocab_size": 4096},
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32}
    | {"num_experts": 4, "top_k": 2, "expert_dim": 64, "vocab_size": 256},
}


def candidates(
    ours: Transformer, theirs: torch.nn.Module, prompts: list[list[int]], tokens: int, compile: bool
) -> dict[str, Callable[[], list[list[int]]]]:
    """Name -> one generation, which returns the new tokens of each row."""
    engine = Engine(ours, compile=compile)
    greedy = Sampling(max_new_tokens=tokens, temperature=0)
    inputs = torch.tensor(prompts, device=engine.device)

    def generate(experts: str, cache: str | None) -> list[list[int]]:
        theirs.set_experts_implementation(experts)
        found = theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation=cache,
            pad_token_id=0,
        )
        return found[:, inputs.shape[1] :].tolist()

    found: dict[str, Callable] = {"microtron": lambda: engine.generate(prompts, greedy)}
    for experts in ("eager", "grouped_mm"):  # batched_mm is many times slower
        for cache in (None, "static"):
            name = f"transformers ({experts}, {cache or 'dynamic'} cache)"
            found[name] = lambda e=experts, c=cache: generate(e, c)
    return found


def measure(
    ours: Transformer, theirs: torch.nn.Module, batch: int, asked: argparse.Namespace
) -> dict[str, object]:
    """One batch size: tokens/s of every candidate."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, asked.prompt)
    prompts = torch.randint(ours.model_args.vocab_size, shape, generator=generator).tolist()
    calls = candidates(ours, theirs, prompts, asked.tokens, asked.compile)
    first = {name: [row[:8] for row in call()] for name, call in calls.items()}
    if asked.device == "cpu":  # bf16 has ties
        assert len(set(map(str, first.values()))) == 1, first  # else it compares nothing
    seconds = interleave(calls, asked.repeats, warmup=1)
    rows = {n: summary([batch * asked.tokens / s for s in v]) for n, v in seconds.items()}
    best = max((n for n in rows if n != "microtron"), key=lambda n: rows[n]["median"])
    ratio = rows["microtron"]["median"] / rows[best]["median"]
    for name, row in rows.items():
        told = f"{row['median']:8,.0f} tokens/s [{row['min']:,.0f} .. {row['max']:,.0f}]"
        print(f"batch {batch:2} {name:42} {told}")
    print(f"batch {batch:2}: {ratio:.2f}x {best}")
    where = spent(calls["microtron"], asked.tokens)
    step_ms = 1000 * batch / rows["microtron"]["median"]
    limits = {"step_ms": step_ms, "read_weights_ms": reading_ms(ours), "spent_ms": where}
    return {"batch": batch, "tokens_per_s": rows, "peer": best, "ratio": ratio, **limits}


def spent(call: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of a step by operator, under the profiler (which adds some to each)."""
    with torch.profiler.profile() as profiler:
        call()
    cuda = torch.cuda.is_available()
    rows = [
        (e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000 / steps)
        for e in profiler.key_averages()
    ]
    return dict(sorted(rows, key=lambda row: -row[1])[:10])


def reading_ms(model: torch.nn.Module) -> float:
    """What it takes to read every weight but the embedding once: no step of a full batch is
    shorter.
    """
    weights = [w.detach() for n, w in model.named_parameters() if "tok_embeddings" not in n]

    def read() -> None:
        for weight in weights:
            weight.sum()
        if weight.is_cuda:
            torch.cuda.synchronize()

    return 1000 * summary(interleave({"read": read}, 9, warmup=2)["read"])["median"]


def main() -> None:
    """Compares, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a shape that runs in seconds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile our step")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = torch.float32 if asked.device == "cpu" else torch.bfloat16
    fields = SHAPES["tiny" if asked.tiny else "small"]
    ours = Transformer(ModelArgs(**fields, window=128))
    ours.init_weights()
    theirs = peer(ours, asked.prompt + asked.tokens).to(asked.device, dtype).eval()
    theirs.config.use_cache = theirs.generation_config.use_cache = True
    theirs.generation_config.eos_token_id = None
    ours = ours.to(asked.device, dtype).eval()
    if ours.rope is not None:  # its frequencies stay in fp32
        ours.rope.init_weights()
    rows = [measure(ours, theirs, batch, asked) for batch in asked.batch]
    if asked.out:
        result = {"fields": fields, "prompt": asked.prompt, "tokens": asked.tokens}
        result |= {"dtype": str(dtype).removeprefix("torch."), "compile": asked.compile}
        write_json(asked.out, {**result, "rows": rows, **facts()})


if __name__ == "__main__":
    main()
