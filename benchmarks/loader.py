"""Tokens per second that one process loads from the page cache, by seq_len, batch size and options.

Shuffled uint16 windows of a shard that was just written (so it is cached), one loader per row of
the table, no training beside it. "thread" is the loader as training uses it (prefetch 2); "inline"
is the same work without the thread. Each number is the median of ``--repeats`` timings of
``--seconds`` after a warm-up; the JSON keeps them all.

    python benchmarks/loader.py --out benchmarks/results/loader.json
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from common import facts, write_json

from microtron.data.loader import TokenLoader
from microtron.data.shards import DatasetInfo, ShardInfo, ShardWriter, TokenizerInfo

VOCAB = 50304
EOT = 50256
DOCUMENT_TOKENS = 500  # on average


def write_dataset(folder: Path, tokens: int) -> None:
    """One uint16 shard of random ids with an eot about every DOCUMENT_TOKENS."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train_000000.bin", "uint16") as shard:
        while shard.tokens < tokens:
            ids = rng.integers(0, EOT, min(1 << 24, tokens - shard.tokens), dtype=np.uint16)
            ids[rng.random(ids.size, dtype=np.float32) < 1 / DOCUMENT_TOKENS] = EOT
            shard.write(ids)
    entry = ShardInfo(shard.path.name, shard.tokens, sha256=shard.sha256)
    DatasetInfo(
        TokenizerInfo("random", "0" * 16, VOCAB, EOT), "benchmark", "uint16", {"train": [entry]}
    ).save(folder)


def measure(loader: TokenLoader, seconds: float, repeats: int) -> list[float]:
    """Tokens per second of each repeat."""
    batches, size = iter(loader), loader.batch_size * loader.seq_len
    for _ in islice(batches, 1 + 2_000_000 // size):
        pass
    rates = []
    for _ in range(repeats):
        start, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            for _ in islice(batches, 1 + 200_000 // size):
                done += size
        rates.append(done / spent)
    loader.close()
    return rates


def main() -> None:
    """Measures every loader, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, args.tokens)
        start = time.perf_counter()
        options = dict(rank=0, world_size=1, seed=0, vocab_size=VOCAB, tokenizer_fingerprint=None)
        TokenLoader([folder], None, "train", seq_len=1024, batch_size=1, **options)
        verify_s = time.perf_counter() - start
        print(f"first check of {args.tokens / 1e6:.0f} M tokens: {verify_s:.2f} s")
        print(
            f"{'seq_len':>8} {'batch':>6} {'positions':>10} {'thread':>10} {'inline':>10}"
            "   M tokens/s"
        )
        for seq_len in (256, 1024, 2048):
            for batch_size in (1, 8, 32, 128):
                for positions in (False, True):
                    row = {"seq_len": seq_len, "batch_size": batch_size, "positions": positions}
                    for mode, prefetch in (("thread", 2), ("inline", 0)):
                        loader = TokenLoader(
                            [folder],
                            None,
                            "train",
                            seq_len=seq_len,
                            batch_size=batch_size,
                            document_positions=positions,
                            prefetch=prefetch,
                            **options,
                        )
                        row[mode] = measure(loader, args.seconds, args.repeats)
                    rows.append(row)
                    print(
                        f"{seq_len:8} {batch_size:6} {'yes' if positions else 'no':>10} "
                        f"{median(row['thread']) / 1e6:10.0f} {median(row['inline']) / 1e6:10.0f}"
                    )
    if args.out:
        told = {"unit": "tokens per second and process", "rows": rows, "verify_s": verify_s}
        told |= {"tokens": args.tokens, "dtype": "uint16", "document_tokens": DOCUMENT_TOKENS}
        write_json(args.out, told | facts())


if __name__ == "__main__":
    main()
