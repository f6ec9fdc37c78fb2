"""What the tests of group_norm share: random calls, the definition in float64, and how far a result may be from it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from helpers import ROUNDING, assert_elements_close, poisoned_memory, stage_batch
from msd_kernels import StageBatch, group_norm

PARAMETERS = ("weight", "bias", "scale", "shift")
DTYPES = [
    pytest.param(dtype, parameter_dtype, id=f"{str(dtype)[6:]}-{str(parameter_dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for parameter_dtype in dict.fromkeys((dtype, torch.float32))
]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
# Roundings of the terms of its sum that a result may be off by, besides the rounding of the result itself: the worst
# found over this file, every backend and the random shapes included, is 2.7.
ROUNDINGS = 4
# What the CPU kernel's short series for SiLU adds where bfloat16 is stored: a relative error of 1.4e-4.
CPU_BFLOAT16_SILU = 1.4e-4


@dataclass(frozen=True)
class Inputs:
    """The tensors of a dense call."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def present(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def map(self, function) -> Inputs:
        return replace(self, **{name: function(tensor) for name, tensor in self.present().items()})


def make_inputs(
    generator,
    shape,
    dtype=torch.float32,
    parameter_dtype=torch.float32,
    *,
    offset=0.0,
    present=PARAMETERS,
    channels_last=False,
) -> Inputs:
    """Random leaves; ``offset`` is the mean of x in standard deviations."""

    def draw(name, *size):
        return torch.randn(size, generator=generator).to(parameter_dtype) if name in present else None

    x = (torch.randn(shape, generator=generator) + offset).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    batch, channels = shape[:2]
    inputs = Inputs(
        x,
        draw("weight", channels),
        draw("bias", channels),
        draw("scale", batch, channels),
        draw("shift", batch, channels),
    )
    return inputs.map(Tensor.requires_grad_)


def double_leaf(t: Tensor) -> Tensor:
    return t.detach().cpu().double().requires_grad_()


def over_channels(t: Tensor | None, x: Tensor, default: float) -> Tensor:
    """``[C]`` or ``[B, C]``, broadcast to ``x``."""
    if t is None:
        return torch.full_like(x, default)
    return t.reshape(-1, x.shape[1], *[1] * (x.dim() - 2))


def group_mean(t: Tensor, groups: int) -> Tensor:
    """The mean over each group at every element."""
    grouped = t.reshape(t.shape[0], groups, math.prod(t.shape[1:]) // groups)
    return grouped.mean(dim=2, keepdim=True).expand_as(grouped).reshape(t.shape)


def formula(inputs: Inputs, groups: int, eps: float, silu: bool) -> Tensor:
    """The definition, in the dtype of the inputs."""
    x = inputs.x
    centred = x - group_mean(x, groups)
    x_hat = centred / torch.sqrt(group_mean(centred.square(), groups) + eps)
    affine = x_hat * over_channels(inputs.weight, x, 1) + over_channels(inputs.bias, x, 0)
    z = affine * (1 + over_channels(inputs.scale, x, 0)) + over_channels(inputs.shift, x, 0)
    return z * torch.sigmoid(z) if silu else z


def magnitudes(inputs: Inputs, dy: Tensor, groups: int, eps: float, silu: bool, condition: bool) -> dict:
    """Per result the sum of the absolute values of the terms that a kernel adds up to get it.

    With ``condition`` an error of x_hat counts ``1 + |mean| / std`` times, because the mean itself is rounded.
    """
    x = inputs.x.detach()
    mean = group_mean(x, groups)
    rstd = 1 / torch.sqrt(group_mean((x - mean).square(), groups) + eps)
    x_hat = ((x - mean) * rstd).abs()
    slip = 1 + mean.abs() * rstd if condition else torch.ones_like(x)
    weight, bias = over_channels(inputs.weight, x, 1).abs(), over_channels(inputs.bias, x, 0).abs()
    factor, shift = 1 + over_channels(inputs.scale, x, 0).abs(), over_channels(inputs.shift, x, 0).abs()
    affine = x_hat * weight + bias
    y = affine * factor + shift + slip * weight * factor
    dz = dy.abs() * (1 + y) if silu else dy.abs()
    dx_hat = dz * weight * factor
    projection = group_mean(dx_hat * x_hat, groups)
    dx = dx_hat + group_mean(dx_hat, groups) + x_hat * projection
    dx = rstd * (dx + slip * (projection + x_hat * group_mean(dx_hat, groups)))
    channels = (0, *range(2, x.dim()))
    pixels = tuple(range(2, x.dim()))

    def over_pixels(t: Tensor) -> Tensor:
        return t.sum(dim=pixels) if pixels else t

    return {
        "y": y,
        "x": dx,
        "weight": (dz * factor * (x_hat + slip)).sum(dim=channels),
        "bias": (dz * factor).sum(dim=channels),
        "scale": over_pixels(dz * (affine + slip * weight)),
        "shift": over_pixels(dz),
    }


def run(inputs: Inputs, dy: Tensor, groups: int, eps: float, silu: bool, function) -> dict[str, Tensor]:
    """``y`` and the gradients by the names of the inputs."""
    y = function(inputs, groups, eps, silu)
    leaves = inputs.present()
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


def call(inputs: Inputs, groups: int, eps: float, silu: bool) -> Tensor:
    arguments = inputs.present()
    return group_norm(num_groups=groups, eps=eps, activation="silu" if silu else None, **arguments)


def check(inputs: Inputs, groups: int, backend: str, dy: Tensor, *, eps=1e-5, silu=True) -> None:
    """Result and all gradients, per element, against the formula in float64, in poisoned memory."""
    with poisoned_memory():
        found = run(inputs, dy, groups, eps, silu, call)
    exact, dy = inputs.map(double_leaf), dy.cpu().double()
    expected = run(exact, dy, groups, eps, silu, formula)
    # The library rounds every step to the dtype of the activations, the other backends work in float32.
    # Statistics are float32 everywhere.
    steps = ROUNDING[inputs.x.dtype if backend == "library" else torch.float32]
    terms, conditioned = (magnitudes(exact, dy, groups, eps, silu, flag) for flag in (False, True))
    for name, actual in found.items():
        leaf = inputs.x if name == "y" else getattr(inputs, name)
        assert actual.dtype == leaf.dtype
        atol = ROUNDINGS * (steps * terms[name] + ROUNDING[torch.float32] * conditioned[name])
        rtol = ROUNDING[leaf.dtype]
        if name == "y" and silu and backend == "cpu" and leaf.dtype == torch.bfloat16:
            rtol += CPU_BFLOAT16_SILU
        assert_elements_close(actual, expected[name].detach(), rtol=rtol, atol=atol.detach())


def cotangent(inputs: Inputs, generator) -> Tensor:
    """Random, in the memory format of x."""
    dy = torch.randn(inputs.x.shape, generator=generator).to(inputs.x.dtype)
    return torch.empty_like(inputs.x, requires_grad=False).copy_(dy)


def random_calls(generator, number: int) -> Iterator[tuple[Inputs, int, bool]]:
    """Inputs, groups and whether there is an activation; always the same calls."""
    draw = random.Random(number)
    for _ in range(number):
        group_channels = draw.choice((1, 2, 3, 4, 5, 10, 18, 24, 40, 64))
        groups = draw.choice((1, 2, 3, 4, 8, 16))
        pixels = [draw.choice((1, 2, 3, 5, 8, 17)) for _ in range(2)]
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
        inputs = make_inputs(
            generator,
            (draw.randint(0, 3), groups * group_channels, *pixels),
            dtype,
            draw.choice((dtype, torch.float32)),
            offset=draw.choice((0.0, 3.0, 30.0)),
            present=[name for name in PARAMETERS if draw.random() < 0.7],
            channels_last=draw.random() < 0.7,
        )
        yield inputs, groups, draw.random() < 0.5


def check_stages_bit_for_bit(generator, counts, channels, groups, size, dtype, device="cpu") -> None:
    """A call for all stages and one for each give the same bits, gradients included."""

    def draw(height, width) -> StageBatch:
        batch = stage_batch(generator, counts, channels, height, width, dtype=dtype)
        return batch.with_values(batch.values.to(device).requires_grad_())

    def draw_weights() -> list[Tensor]:
        return [torch.randn(c, generator=generator).to(device, dtype).requires_grad_() for c in channels]

    x, scale, shift = draw(*size), draw(1, 1), draw(1, 1)
    weight, bias = draw_weights(), draw_weights()
    y = group_norm(x, groups, weight, bias, scale=scale, shift=shift, activation="silu")
    dy = y.with_values(torch.randn(y.values.shape, generator=generator).to(device, dtype))
    batches = [x, scale, shift]
    leaves = [*(batch.values for batch in batches), *weight, *bias]
    gradients = torch.autograd.grad(y.values, leaves, dy.values, materialize_grads=True)
    dx, dscale, dshift = (b.with_values(g) for b, g in zip(batches, gradients[:3], strict=True))
    dweight, dbias = gradients[3 : 3 + len(channels)], gradients[3 + len(channels) :]
    inputs, found = (x, weight, bias, scale, shift, dy), (y, dx, dweight, dbias, dscale, dshift)
    per_stage = [by_stage(t) for t in (*inputs, *found)]
    for number, (parts, g) in enumerate(zip(zip(*per_stage, strict=True), groups, strict=True)):
        *inputs, dense_dy = (t.detach().clone() for t in parts[:6])
        alone = run(Inputs(*inputs).map(Tensor.requires_grad_), dense_dy, g, 1e-5, True, call)
        for whole, separate in zip(parts[6:], alone.values(), strict=True):
            assert torch.equal(whole, separate), f"stage {number}"


def by_stage(t: StageBatch | Sequence[Tensor]) -> list[Tensor]:
    """Dense tensors as a call for one stage takes them."""
    if not isinstance(t, StageBatch):
        return list(t)
    return [s.flatten(1) if t.height * t.width == 1 else s for s in t.segments()]
