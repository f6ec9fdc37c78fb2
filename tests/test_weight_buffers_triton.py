"""The weights of all stages in one buffer and out of it, by one launch each, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreter import require_interpreter

require_interpreter()

from msd_kernels.dispatch import stage_weights  # noqa: E402
from msd_kernels.runtime import weight_buffers  # noqa: E402

SHAPES = {
    "convolutions": [(5, 7, 3, 3), (40, 33, 3, 3), (1, 2, 3, 3)],
    "matrices": [(48, 40), (3, 129)],
    "biases": [(384,), (256,), (32,)],
    "ten stages": [(s + 1, 2 * s + 3, 3, 3) for s in range(10)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_weight_buffers_hold_what_pytorch_puts_there(shapes, dtype, generator):
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[0] = weights[0].transpose(0, -1).contiguous().transpose(0, -1)
    buffer = weight_buffers.pack(weights, dtype)
    assert torch.equal(buffer, stage_weights.joined(weights, dtype))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_weight_buffers_give_back_what_is_wanted(shapes, generator):
    wanted = [stage % 3 != 1 for stage in range(len(shapes))]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    found = weight_buffers.unpack(stage_weights.joined(weights), shapes, wanted)
    for part, weight, flag in zip(found, weights, wanted, strict=True):
        assert (part is None) != flag
        if flag:
            assert part.is_contiguous()
            assert torch.equal(part, weight)


def test_a_weight_without_memory_is_refused():
    weight = torch.randn(4, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[4, 4\] has no memory"):
        weight_buffers.pack([weight, torch.randn(4, 4)], torch.float32)
