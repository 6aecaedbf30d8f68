"""``microtron generate``: continues prompts with a checkpoint or a Hugging Face folder.

    microtron generate --checkpoint outputs/debug --prompt 'def main' --max-new-tokens 100
    microtron generate --checkpoint exports/mine --prompt-file prompts.txt --temperature 0

The prompt and what follows it go to stdout, token by token; figures go to stderr.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from microtron.errors import UserError
from microtron.infer.engine import Engine
from microtron.infer.load import Loaded, choose, load
from microtron.infer.sampling import Sampling
from microtron.infer.text import generate_text


def generate(
    checkpoint: Path,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    prompt_file: Path | None = None,
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    num_samples: int = 1,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Continues prompts.

    Args:
        checkpoint: A step (any layout), a run's folder (its newest step), or a Hugging Face folder.
        prompt: A text to continue; may be repeated. Default: the beginning of a document.
        prompt_file: A file with one prompt a line, used after those of --prompt.
        max_new_tokens: Tokens at most, for each.
        temperature: Divides the logits; 0 is greedy.
        top_k: Choose among the k likeliest tokens; 0: all.
        top_p: Choose among the likeliest tokens that hold this much probability.
        min_p: Leave out tokens below this share of the likeliest one's probability.
        seed: Of the first sample; the next ones count up from it.
        stop: A text that ends the continuation; may be repeated.
        num_samples: Continuations of each prompt.
        batch_size: Continuations computed together; no text depends on it.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on CUDA, else float32), float32 or bfloat16.
        compile: Compile the step for one token: pays for long texts.
        tokenizer: Instead of the checkpoint's own: byte, gpt2, ..., or a tokenizer.json.

    Raises:
        UserError: an option or the checkpoint cannot work.
    """
    params = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, seed)
    for name, value in (("num-samples", num_samples), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} {value} cannot work: give 1 or more")
    texts = [*prompt, *read_prompts(prompt_file)] or [""]
    loaded = load(checkpoint, **_device(device, dtype), tokenizer=tokenizer)
    engine = Engine(loaded.model, compile=compile)
    params = replace(
        params, stop_tokens=loaded.stop_ids, vocab_size=loaded.need_tokenizer().vocab_size
    )
    texts = [text for text in texts for _ in range(num_samples)]
    ways = [replace(params, seed=seed + i % num_samples) for i in range(len(texts))]
    print_continued(engine, loaded, texts, ways, stop, batch_size)


def _device(device: str, dtype: str) -> dict[str, object]:
    chosen, kind = choose(device, dtype)
    return {"device": chosen, "dtype": kind}


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a file, empty ones left out. Raises: UserError where it cannot be read."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read --prompt-file {path} ({getattr(error, 'strerror', None) or error}): name "
            "a UTF-8 text, a prompt a line"
        ) from None
    return [line for line in lines if line]


def prompt_tokens(loaded: Loaded, text: str) -> list[int]:
    """A document that begins with ``text``. Raises: UserError where that is no token at all."""
    tokens = [*loaded.prefix_ids, *loaded.need_tokenizer().encode(text)]
    if not tokens:
        raise UserError(
            "the prompt is empty and this tokenizer begins a text with nothing: give a --prompt"
        )
    return tokens


def print_continued(
    engine: Engine,
    loaded: Loaded,
    texts: list[str],
    params: list[Sampling],
    stop: tuple[str, ...],
    batch_size: int,
) -> None:
    """Prompts and continuations, the first of a batch as it comes, the others after it; a line of
    dashes between them.
    """
    rows = [prompt_tokens(loaded, text) for text in texts]
    longest = max(len(row) + p.max_new_tokens for row, p in zip(rows, params, strict=True))
    engine.check_length(longest - 1)  # before anything is printed
    if loaded.max_tokens is not None and longest > loaded.max_tokens:
        print(
            f"note: up to {longest:,} tokens, and this model was trained on {loaded.max_tokens:,} "
            "at once; what follows may make no sense",
            file=sys.stderr,
        )
    began = time.perf_counter()
    came: list[float] = []
    count = 0

    def on_text(row: int, piece: str) -> None:
        came.append(time.perf_counter())
        if row == 0:
            print(piece, end="", flush=True)

    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        print("---\n" * bool(start) + texts[start], end="", flush=True)
        try:
            found, made = generate_text(
                engine, loaded.tokenizer, rows[part], params[part], stop, on_text
            )
        finally:  # what is said next, of an interruption too, stands on a line of its own
            print(flush=True)
        count += made
        for prompt, text in zip(texts[part][1:], found[1:], strict=True):
            print(f"---\n{prompt}{text}", flush=True)
    seconds = time.perf_counter() - began
    first = (came[0] if came else began + seconds) - began
    print(
        f"{sum(map(len, rows)):,} prompt tokens, first text after {first:.2f} s; "
        f"{count:,} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s",
        file=sys.stderr,
    )
