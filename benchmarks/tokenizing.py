"""Megabytes of UTF-8 text that a core tokenizes a second, by tokenizer; and the whole of prepare.

"tokenize" is ``Tokenizer.encode_array`` over documents in memory, per CPU second of the process (a
busy machine does not count). "prepare" is the whole command by wall clock, reading, hashing and
writing included, with one process and, where the source is large enough for more, one a core. "bpe"
is trained here by `microtron train-bpe` and run by tiktoken; "bpe (json)" is the same vocabulary by
the `tokenizers` library. Each figure is the median of ``--repeats``; the JSON keeps them all. (Not
named tokenize.py: that would shadow the standard library's module for every script beside it.)

    python benchmarks/tokenizing.py --out benchmarks/results/tokenizing.json
"""

import argparse
import contextlib
import io
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from common import facts, write_json

from microtron.data.prepare import POOL_BYTES, prepare
from microtron.data.sources import documents
from microtron.data.tokenizers import CharTokenizer, load_tokenizer
from microtron.data.train_bpe import train_bpe
from microtron.errors import UserError

PACKAGES = ("tiktoken", "tokenizers")


def measure(encode, texts, repeats):
    """CPU seconds of each pass over the texts, after one that is not counted."""
    encode(texts[0])
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for text in texts:
            encode(text)
        seconds.append(time.process_time() - start)
    return seconds


def tokenizers(folder, source, vocab_size, texts):
    """(label, tokenizer or the reason why there is none)."""
    bpe, plain = folder / "bpe", folder / "plain"
    with contextlib.redirect_stdout(io.StringIO()):
        train_bpe(source=source, vocab_size=vocab_size, out=bpe, max_bytes=4_000_000)
    plain.mkdir()
    shutil.copy(bpe / "tokenizer.json", plain)
    yield "byte", load_tokenizer("byte")
    yield "char", CharTokenizer("".join(set("".join(texts))))
    yield "bpe", load_tokenizer(str(bpe))
    yield "bpe (json)", load_tokenizer(str(plain))
    for name in ("gpt2", "o200k_harmony"):
        try:
            yield name, load_tokenizer(name)
        except UserError as error:
            yield name, str(error)


def run_prepare(folder, source, tokenizer, workers, repeats):
    """Wall seconds of each run of the command."""
    seconds = []
    for i in range(repeats):
        out = folder / f"{workers}-{i}"
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            info = prepare(source=source, tokenizer=tokenizer, out=out, workers=workers)
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(out)
    return sum(e.bytes for split in info.splits.values() for e in split), seconds


def main():
    """Measures every tokenizer, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="stdlib", help="as of `microtron prepare`")
    parser.add_argument("--max-bytes", type=int, default=4_000_000, help="of text to tokenize")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the BPE trained here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    texts, size = [], 0
    for document in documents(options.source, left_out=[]):
        if size >= options.max_bytes:
            break
        texts.append(document.text)
        size += len(document.text.encode())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'tokenize':16} {'vocabulary':>10} {'bytes/token':>12} {'MB/s per core':>14}")
        for label, made in tokenizers(folder, options.source, options.vocab_size, texts):
            if isinstance(made, str):
                print(f"{label:16} not measured: {made}")
                rows.append({"what": "tokenize", "tokenizer": label, "not_measured": made})
                continue
            seconds = measure(made.encode_array, texts, options.repeats)
            tokens = sum(made.encode_array(text).size for text in texts)
            rate = size / 1e6 / median(seconds)
            print(f"{label:16} {made.vocab_size:10,} {size / tokens:12.2f} {rate:14.1f}")
            rows.append(
                {
                    "what": "tokenize",
                    "tokenizer": label,
                    "vocab_size": made.vocab_size,
                    "bytes": size,
                    "tokens": tokens,
                    "cpu_s": seconds,
                    "mb_per_s": rate,
                }
            )
        print(f"\n{'prepare':16} {'workers':>10} {'MB':>12} {'MB/s':>14}")
        for label, spec in (("byte", "byte"), ("bpe", str(folder / "bpe"))):
            for workers in sorted({1, os.cpu_count() or 1}):
                total, seconds = run_prepare(folder, options.source, spec, workers, options.repeats)
                rate = total / 1e6 / median(seconds)
                print(f"{label:16} {workers:10} {total / 1e6:12.1f} {rate:14.1f}")
                rows.append(
                    {
                        "what": "prepare",
                        "tokenizer": label,
                        "workers": workers,
                        "bytes": total,
                        "wall_s": seconds,
                        "mb_per_s": rate,
                    }
                )
                if total < 2 * POOL_BYTES:
                    break  # prepare takes one process for so little
    if options.out:
        result = {"source": options.source, "repeats": options.repeats, "rows": rows, **facts()}
        result["versions"] |= {package: version(package) for package in PACKAGES}
        write_json(options.out, result)


if __name__ == "__main__":
    main()
