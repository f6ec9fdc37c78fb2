"""One small call of every op in each of its forms, as a function of plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import parts_of
from msd_kernels import (
    StageBatch,
    attention,
    group_norm,
    grouped_conv2d,
    grouped_linear,
    resample2d,
)
from msd_kernels.ops import attention as attention_op
from msd_kernels.ops import group_norm as group_norm_op
from msd_kernels.ops import grouped_conv2d as grouped_conv2d_op
from msd_kernels.ops import grouped_linear as grouped_linear_op
from msd_kernels.ops import resample2d as resample2d_op


@dataclass(frozen=True)
class Call:
    """One call of an op as a function of tensors of ``shapes``."""

    shapes: Sequence[tuple[int, ...]]
    function: Callable[..., Tensor]

    def leaves(
        self, generator: torch.Generator, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> list[Tensor]:
        return [
            torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
            for shape in self.shapes
        ]


def cotangent_of(y: Tensor) -> Tensor:
    """Random, and the same in every call."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.device, y.dtype)


def forward_and_backward(
    call: Call, leaves: Sequence[Tensor], function: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """The result and the gradients of all leaves."""
    y = (function or call.function)(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent_of(y))]


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {position} differs by up to {(a - b).abs().max():.3e}"


def strided(t: Tensor) -> Tensor:
    """The same values, every second element of twice the memory; between them is NaN."""
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def packed_size(counts: Sequence[int], channels: Sequence[int], pixels: int = 1) -> tuple[int]:
    return (sum(n * c for n, c in zip(counts, channels, strict=True)) * pixels,)


def dense_norm(side: int) -> Call:
    def function(x, weight, bias, scale, shift):
        x = x.contiguous(memory_format=torch.channels_last)
        return group_norm(x, 2, weight, bias, scale=scale, shift=shift, activation="silu")

    return Call([(3, 6, side, side), (6,), (6,), (3, 6), (3, 6)], function)


def plain_norm(side: int) -> Call:
    return Call([(2, 4, side, side)], lambda x: group_norm(x, 2))


def stage_norm(side: int) -> Call:
    counts, channels = (2, 0, 1), (6, 4, 2)
    vectors = [(c,) for c in channels]

    def function(x, weight, bias, scale, shift):
        return group_norm(
            StageBatch(x, counts, channels, side, side),
            (3, 2, 1),
            parts_of(weight, vectors),
            parts_of(bias, vectors),
            scale=StageBatch(scale, counts, channels, 1, 1),
            shift=StageBatch(shift, counts, channels, 1, 1),
            activation="silu",
        ).values

    per_sample = packed_size(counts, channels)
    sizes = [
        packed_size(counts, channels, side**2),
        (sum(channels),),
        (sum(channels),),
        per_sample,
        per_sample,
    ]
    return Call(sizes, function)


def norm_of_two_sources(side: int) -> Call:
    counts, channels, skip_channels, groups = (2, 0, 1), (2, 3, 1), 4, (2, 1, 5)
    joined = tuple(c + skip_channels for c in channels)

    def function(x, skip, weight, scale):
        return group_norm(
            StageBatch(x, counts, channels, side, side),
            groups,
            parts_of(weight, [(c,) for c in joined]),
            skip=skip.contiguous(memory_format=torch.channels_last),
            scale=StageBatch(scale, counts, joined, 1, 1),
            activation="silu",
        ).values

    sizes = [
        packed_size(counts, channels, side**2),
        (sum(counts), skip_channels, side, side),
        (sum(joined),),
        packed_size(counts, joined),
    ]
    return Call(sizes, function)


def stage_linear(side: int) -> Call:
    counts, ins, outs = (2, 0, 1), (4, 3, 2), (3, 2, 5)
    shapes = list(zip(outs, ins, strict=True))

    def function(x, weight, bias):
        batch = StageBatch(x, counts, ins, side, side)
        return grouped_linear(batch, parts_of(weight, shapes), parts_of(bias, [(o,) for o in outs])).values

    return Call([packed_size(counts, ins, side**2), (sum(map(math.prod, shapes)),), (sum(outs),)], function)


def dense_linear(side: int) -> Call:
    return Call(
        [(side**2, 4), (3, 4), (2, 4)],
        lambda x, w0, w1: grouped_linear(x, [w0, w1], counts=(1, side**2 - 1)).values,
    )


def fused_conv(side: int) -> Call:
    counts, channels, skip_channels, outs = (2, 0, 1), (3, 2, 2), (2, 2, 2), (3, 1, 2)
    shapes = [(o, c + d, 3, 3) for o, c, d in zip(outs, channels, skip_channels, strict=True)]

    def function(x, skip, weight, bias, sample_bias, residual):
        return grouped_conv2d(
            StageBatch(x, counts, channels, side, side),
            parts_of(weight, shapes),
            parts_of(bias, [(o,) for o in outs]),
            skip=skip.contiguous(memory_format=torch.channels_last),
            sample_bias=StageBatch(sample_bias, counts, outs, 1, 1),
            residual=StageBatch(residual, counts, outs, 2 * side, 2 * side),
            scale=0.5,
            resample="up",
        ).values

    sizes = [
        packed_size(counts, channels, side**2),
        (3, 2, side, side),
        (sum(map(math.prod, shapes)),),
        (sum(outs),),
        packed_size(counts, outs),
        packed_size(counts, outs, 4 * side**2),
    ]
    return Call(sizes, function)


def plain_conv(side: int) -> Call:
    def function(x, weight):
        return grouped_conv2d(StageBatch.from_dense(x), [weight], resample="down").values

    return Call([(2, 2, side, side), (3, 2, 1, 1)], function)


def stage_attention(side: int) -> Call:
    counts, channels = (2, 0, 1), (6, 4, 5)

    def function(q, k, v):
        context = (StageBatch(t, counts, channels, side, 1) for t in (k, v))
        return attention(StageBatch(q, counts, channels, side, side), *context, num_heads=(2, 1, 1)).values

    lengths = (side**2, side, side)
    return Call([packed_size(counts, channels, length) for length in lengths], function)


def packed_attention(side: int) -> Call:
    def function(x):
        x = x.contiguous(memory_format=torch.channels_last)
        return attention(x, num_heads=2, layout="interleaved")

    return Call([(2, 12, side, side)], function)


def planar_attention(side: int) -> Call:
    return Call([(2, 12, side, side)], lambda x: attention(x, num_heads=2, layout="blocked"))


def dense_attention(side: int) -> Call:
    return Call([(2, 2, side**2, 3), (2, 2, side, 3), (2, 2, side, 3)], attention)


def stage_resampling(side: int) -> Call:
    counts, channels = (2, 0, 1), (6, 4, 2)

    def function(x):
        return resample2d(StageBatch(x, counts, channels, side, side), [1, 3, 3, 1], up=2).values

    return Call([packed_size(counts, channels, side**2)], function)


def dense_resampling(side: int) -> Call:
    return Call([(2, 5, side, side + 1)], lambda x: resample2d(x, [1, 3, 2], down=2))


CALLS = {
    "group_norm of a dense tensor": (group_norm_op.BACKENDS, dense_norm),
    "group_norm without parameters": (group_norm_op.BACKENDS, plain_norm),
    "group_norm of stages": (group_norm_op.BACKENDS, stage_norm),
    "group_norm of two sources": (group_norm_op.BACKENDS, norm_of_two_sources),
    "grouped_linear of stages": (grouped_linear_op.BACKENDS, stage_linear),
    "grouped_linear of a dense tensor": (grouped_linear_op.BACKENDS, dense_linear),
    "grouped_conv2d with everything": (grouped_conv2d_op.BACKENDS, fused_conv),
    "grouped_conv2d of one stage": (grouped_conv2d_op.BACKENDS, plain_conv),
    "attention of stages": (attention_op.BACKENDS, stage_attention),
    "attention of a packed tensor": (attention_op.BACKENDS, packed_attention),
    "attention of a planar packed tensor": (attention_op.BACKENDS, planar_attention),
    "attention of dense tensors": (attention_op.BACKENDS, dense_attention),
    "resample2d of stages": (resample2d_op.BACKENDS, stage_resampling),
    "resample2d of a dense tensor": (resample2d_op.BACKENDS, dense_resampling),
}
