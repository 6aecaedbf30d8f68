"""MXFP4, the 4-bit format in which gpt-oss is published, turned into bf16; never written.

Microscaling formats (arXiv:2310.10537): blocks of 32 values of 4 bits (sign, two bits of exponent,
one of mantissa) share one power of two. Two values lie in a byte, the first in its low half.
"""

import torch

from microtron.errors import UserError

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower eight codes; then their negatives
BIAS = 127


def dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """An expert weight as transformers holds it, one expert at a time.

    Args:
        blocks: [E, out, in / 32, 16] uint8.
        scales: [E, out, in / 32] uint8, exponents of two with a bias of 127.

    Returns:
        [E, in, out] bf16: stored rows are outputs, and the product is ``x @ w``.
    """
    experts, rows, groups, _ = blocks.shape
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.bfloat16)
    whole = torch.empty(experts, groups * 32, rows, dtype=torch.bfloat16)
    for expert in range(experts):
        codes = blocks[expert].int()  # [out, groups, 16]
        values = torch.stack((table[codes & 0xF], table[codes >> 4]), dim=-1).flatten(-2)
        exponents = scales[expert].int().unsqueeze(-1) - BIAS
        whole[expert] = torch.ldexp(values, exponents).flatten(1).t()
    return whole


def shape_of(blocks: torch.Size, scales: torch.Size, name: str) -> torch.Size:
    """[E, in, out] of a pair of stored tensors.

    Raises:
        UserError: their shapes do not belong together.
    """
    if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3]:
        raise UserError(
            f"{name}: blocks {list(blocks)} and scales {list(scales)} are no MXFP4 weight "
            "([E, out, n, 16] and [E, out, n]): download the folder again"
        )
    return torch.Size((blocks[0], blocks[2] * 32, blocks[1]))
