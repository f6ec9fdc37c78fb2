"""A convolution with one weight per stage: one cuDNN or oneDNN convolution per non-empty stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from msd_kernels.dispatch import stage_weights
from msd_kernels.dispatch.segments import flat_nhwc, gather, split
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.runtime.cpu_types import float32, wants_float32


def _images(
    flat: Tensor | None, layout: Conv2dLayout, channels: Sequence[int], *, out: bool = False
) -> list[Tensor | None]:
    """A flat buffer as one ``[n, C, H, W]`` view per stage, or None per stage."""
    height, width = layout.out_size if out else (layout.height, layout.width)
    parts = split(flat, layout.out_sizes if out else layout.source_sizes(channels))
    return [
        None if p is None else p.view(n, height, width, c).permute(0, 3, 1, 2)
        for p, n, c in zip(parts, layout.counts, channels, strict=True)
    ]


def _sources(x: Tensor, skip: Tensor | None, layout: Conv2dLayout) -> list[tuple[Tensor, Tensor | None]]:
    images = (_images(x, layout, layout.channels), _images(skip, layout, layout.skip_channels))
    return list(zip(*images, strict=True))


def _parameters(
    weight: Sequence[Tensor], bias: Sequence[Tensor], layout: Conv2dLayout, dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The weights and biases as the library takes them, None for the stages without samples."""
    converted = partial(stage_weights.converted, dtype=dtype, counts=layout.counts)
    return converted(weight, channels_last=True), converted(bias)


def grouped_conv2d(
    x: Tensor,
    skip: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: Conv2dLayout,
    scale: float,
) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_conv2d`."""
    dtype = x.dtype
    weight, bias = _parameters(weight, bias, layout, dtype)
    if wants_float32(x):
        x, skip, sample_bias, residual = float32(x, skip, sample_bias, residual)
        weight, bias = float32(*weight), float32(*bias)
    sources = _sources(x, skip, layout)
    residuals = _images(residual, layout, layout.out_channels, out=True)
    samples = split(sample_bias, layout.sample_sizes)

    def stage_output(s: int) -> Tensor:
        y = _convolve(sources[s], weight[s], bias[s], layout.resample)
        if samples[s] is not None:
            y += samples[s].view(layout.counts[s], -1, 1, 1)
        if residuals[s] is not None:
            y += residuals[s]
        if scale != 1.0:
            y *= scale
        return flat_nhwc(y)

    return gather(x, layout.out_sizes, stage_output).to(dtype)


def grouped_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    layout: Conv2dLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, sample_bias, *weight, *bias)`` from the cotangent of the unscaled sum."""
    dtype, masters, stages = x.dtype, [w.dtype for w in weight], len(weight)
    weight, _ = _parameters(weight, (), layout, dtype)
    if wants_float32(x):
        (dy, x, skip), weight = float32(dy, x, skip), float32(*weight)
    sources, cotangents = _sources(x, skip, layout), _images(dy, layout, layout.out_channels, out=True)
    singles, want_weight, want_bias = wanted[:3], wanted[3 : 3 + stages], wanted[3 + stages :]
    found = {
        s: _stage_gradients(
            cotangents[s], sources[s], weight[s], layout.resample, (*singles, want_weight[s], want_bias[s])
        )
        for s in layout.stages
    }

    def activations(position: int) -> Tensor | None:
        if not wanted[position]:
            return None
        return gather(x, layout.counts, lambda s: found[s][position]).to(dtype)

    def parameters(position: int, flags: Sequence[bool], shapes: Sequence) -> list[Tensor | None]:
        return [
            (found[s][position] if s in found else x.new_zeros(shape)).to(masters[s]).contiguous()
            if flag
            else None
            for s, (flag, shape) in enumerate(zip(flags, shapes, strict=True))
        ]

    return [
        *map(activations, range(3)),
        *parameters(3, want_weight, layout.weight_shapes),
        *parameters(4, want_bias, layout.bias_shapes),
    ]


def _stage_gradients(dy, sources, weight, resample, wanted):
    """Gradients of one stage, None where not wanted; those of the features and of the sample bias flat."""
    want_x, want_skip, want_sample_bias, want_weight, want_bias = wanted
    source = _resample(_join(sources), resample)
    padding = weight.shape[2] // 2
    dsource, dweight, dbias = torch.ops.aten.convolution_backward(
        dy, source, weight, [weight.shape[0]], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1,
        [want_x or want_skip, want_weight, want_bias],
    )  # fmt: skip
    dx, dskip = (
        _split_sources(_resample_adjoint(dsource, resample), sources) if want_x or want_skip else (None, None)
    )
    return (
        flat_nhwc(dx) if want_x else None,
        flat_nhwc(dskip) if want_skip else None,
        dy.sum(dim=(2, 3)).reshape(-1) if want_sample_bias else None,
        dweight,
        dbias,
    )


def _convolve(sources, weight, bias, resample) -> Tensor:
    kernel = weight.shape[2]
    if kernel == 1 and resample == "up":
        # A 1x1 convolution and nearest up-sampling commute: convolve the four times smaller map.
        return _resample(F.conv2d(_join(sources), weight, bias), resample).contiguous(
            memory_format=torch.channels_last
        )
    return F.conv2d(_resample(_join(sources), resample), weight, bias, padding=kernel // 2)


def _join(sources) -> Tensor:
    x, skip = sources
    return x if skip is None else torch.cat((x, skip), dim=1)


def _split_sources(dsource, sources):
    """Copies, also of a single pixel, whose parts would be views that share memory; an op must not return such."""
    x, skip = sources
    if skip is None:
        return dsource, None
    parts = dsource.split([x.shape[1], skip.shape[1]], dim=1)
    return [part.clone(memory_format=torch.channels_last) for part in parts]


def _resample(source: Tensor, resample: str) -> Tensor:
    if resample == "up":
        return F.interpolate(source, scale_factor=2, mode="nearest")
    return F.avg_pool2d(source, 2) if resample == "down" else source


def _resample_adjoint(d: Tensor, resample: str) -> Tensor:
    if resample == "up":
        return F.avg_pool2d(d, 2, divisor_override=1)
    return F.interpolate(d, scale_factor=2, mode="nearest").mul_(0.25) if resample == "down" else d
