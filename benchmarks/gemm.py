"""Matrix products of a CPU's training step by the two libraries that torch brings: GFLOP/s.

    python benchmarks/gemm.py --out benchmarks/results/gemm.json

fp32 products go to MKL unless `model/cpu_product.py` sends them to oneDNN; this is where that is
seen to pay, or not, on a processor. bf16 goes to oneDNN by itself. "new shape" is what the first
product of a number of rows costs beyond the second: oneDNN makes a kernel for each.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import facts, interleave, summary, write_json  # noqa: E402

from microtron.model import cpu_product  # noqa: E402

SHAPES = [
    (2048, 128, 128),
    (1088, 128, 256),
    (2048, 256, 256),
    (2048, 256, 4096),
    (2048, 512, 1024),
]


def by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, whatever `has_onednn` says."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def candidates(rows: int, inward: int, outward: int) -> dict[str, Callable[[], torch.Tensor]]:
    """A layer's product and its weight's gradient, as `cpu_product.inner` asks for it."""
    x, weight = torch.randn(rows, inward), torch.randn(outward, inward)
    grad = torch.randn(rows, outward)
    found = {
        "mkl": lambda: torch.mm(x, weight.t()),
        "mkl, weight gradient": lambda: torch.mm(grad.t(), x),
    }
    if cpu_product.onednn_operators():
        found["onednn"] = lambda: by_onednn(x, weight.t())
        narrow = (lambda: by_onednn(x.t(), grad)) if inward < outward else None
        found["onednn, weight gradient"] = narrow or (lambda: by_onednn(grad.t(), x))
    half, half_weight = x.bfloat16(), weight.bfloat16()
    found["bf16"] = lambda: torch.mm(half, half_weight.t())
    return found


def new_shape_s(inward: int = 128, outward: int = 128, tried: int = 40) -> float | None:
    """Median seconds that a new number of rows costs oneDNN once."""
    if not cpu_product.onednn_operators():
        return None
    weight, costs = torch.randn(inward, outward), []
    for rows in range(701, 701 + 7 * tried, 7):
        x, seconds = torch.randn(rows, inward), []
        for _ in range(2):
            began = time.perf_counter()
            by_onednn(x, weight)
            seconds.append(time.perf_counter() - began)
        costs.append(seconds[0] - seconds[1])
    return statistics.median(costs)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for shape in SHAPES:
        flops = 2 * shape[0] * shape[1] * shape[2]
        seconds = interleave(candidates(*shape), asked.repeats)
        speed = {n: summary([flops / s / 1e9 for s in values]) for n, values in seconds.items()}
        rows.append({"shape": shape, "gflops": speed})
        told = ", ".join(f"{n} {s['median']:,.0f}" for n, s in speed.items())
        print(f"{' x '.join(map(str, shape)):18} {told}")
    once = new_shape_s()
    print(
        "a new shape costs oneDNN", "nothing: it is not here" if once is None else f"{once:.1e} s"
    )
    if asked.out:
        result = {"rows": rows, "new_shape_s": once, "chosen": cpu_product.has_onednn()}
        write_json(asked.out, {**result, **facts()})


if __name__ == "__main__":
    main()
