"""MXFP4 as transformers reads it, to the last bit."""

import pytest
import torch

from microtron.errors import UserError
from microtron.hf.mxfp4 import dequantise, shape_of


def packed(experts, rows, groups, seed=0):
    """Random blocks and scales; every code and exponent of every size occurs."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=generator)
    scales = torch.randint(100, 140, (experts, rows, groups), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def test_bits_equal_those_of_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed(3, 10, 4)  # 10 outputs, 128 inputs: not square
    scales[0, 0] = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)  # to the ends of bf16
    ours = dequantise(blocks.clone(), scales.clone())
    theirs = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    assert ours.shape == theirs.shape == shape_of(blocks.shape, scales.shape, "w")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours.view(torch.int16), theirs.contiguous().view(torch.int16))


def test_by_hand():
    """Byte 0x2B at scale 2^1: low half 0xB is -1.5, high half 0x2 is 1.0."""
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 3] = 0x2B
    found = dequantise(blocks, torch.full((1, 1, 1), 128, dtype=torch.uint8))
    assert found.shape == (1, 32, 1)
    assert found[0, 6:8, 0].tolist() == [-3.0, 2.0] and found.count_nonzero() == 2


def test_shapes_that_do_not_belong_together():
    blocks, scales = packed(2, 4, 3)
    for b, s in ((blocks[..., :8], scales), (blocks, scales[:, :, :2]), (blocks[0], scales[0])):
        with pytest.raises(UserError, match=r"gate_up_proj: blocks .* no MXFP4 weight"):
            shape_of(b.shape, s.shape, "gate_up_proj")
