"""3×3 convolutions on processors by Winograd's F(4×4, 3×3), all stages in one call (csrc/cpu/winograd.cpp).

A quarter of the products of a direct convolution. Relative root mean square errors are 1e-6 in float32, three to four
times those of a direct convolution, and a result differs with its position in a tile of 4×4. Sums run in an order that
neither the batch nor the number of threads changes: a sample's output and its gradient have the bits that they have
alone. Features of 16 bits are computed in float32 and rounded once.

A sample with a number beyond 2^32, an infinity or a NaN, which the transforms would spread over a tile, is computed by
the library, and so is a stage with such a weight and the weight's gradient of a stage with such a sample: these are
what they are with the library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate, stage_weights
from msd_kernels.dispatch.backends import Call, forced_backend
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d import library
from msd_kernels.runtime import processor
from msd_kernels.runtime.extension import address, addresses, compiled_layout, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4
# Where one of these is missed the library is faster, at batch 8 or alone (benchmarks/winograd_layers.py): the
# transforms cost more than the products save.
LEAST_CHANNELS = 16
LEAST_TILES = {"avx2": 1}
LEAST_PIXELS_PER_TILE = 6.4


def cannot(call: Call) -> str | None:
    """Why the kernels cannot serve any call, or None; what they have no code for, the library computes."""
    return load("cpu").reason or None


def slower(call: Call) -> str | None:
    """Why the library is preferred for every stage of a call, or None."""
    dtype, layout = call.dtype, call.layout
    reasons = [_slower_stage(dtype, layout, stage) for stage in range(len(layout.counts))]
    return _lacks(dtype, layout) or (None if None in reasons else reasons[0])


def _lacks(dtype: torch.dtype, layout: Conv2dLayout) -> str | None:
    """What the kernels have no code for, or None."""
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    if layout.kernel != 3:
        return f"takes 3×3 kernels, got {layout.kernel}×{layout.kernel}"
    return None


def _slower_stage(dtype: torch.dtype, layout: Conv2dLayout, stage: int) -> str | None:
    """Why the library is preferred for a stage, or None: by the layer's shape and the processor alone."""
    kind = processor.kind()
    if kind.cap == "portable":
        return f"not measured on this processor ({kind.name})"
    if kind.name == "amx" and dtype != torch.float32 and processor.computes_in(dtype):
        return f"this processor multiplies matrices of {dtype}"
    height, width = layout.out_size
    tiles = -(-height // TILE) * -(-width // TILE)
    channels = min(layout.in_channels[stage], layout.out_channels[stage])
    if channels < LEAST_CHANNELS:
        return f"{channels} channels are too few for the transforms to pay"
    if tiles < LEAST_TILES.get(kind.name, 2) or height * width < LEAST_PIXELS_PER_TILE * tiles:
        return f"tiles of 4×4 fit {height}×{width} pixels badly"
    return None


@dataclass(frozen=True)
class _Samples:
    """Neighbouring samples of one stage of a call: their parts of its tensors."""

    call: Conv2dLayout
    stage: int
    first: int
    count: int

    @property
    def layout(self) -> Conv2dLayout:
        """Of a call with these alone."""
        lists = (self.call.channels, self.call.skip_channels, self.call.out_channels)
        sizes = (self.call.height, self.call.width, self.call.kernel, self.call.resample)
        return Conv2dLayout((self.count,), *((channels[self.stage],) for channels in lists), *sizes)

    def x(self, flat: Tensor | None) -> Tensor | None:
        return self._part(flat, self.call.channels, self.call.in_pixels)

    def skip(self, flat: Tensor | None) -> Tensor | None:
        return self._part(flat, self.call.skip_channels, self.call.in_pixels)

    def y(self, flat: Tensor | None) -> Tensor | None:
        return self._part(flat, self.call.out_channels, self.call.out_pixels)

    def sample_bias(self, flat: Tensor | None) -> Tensor | None:
        return self._part(flat, self.call.out_channels, 1)

    def _part(self, flat: Tensor | None, channels: Sequence[int], pixels: int) -> Tensor | None:
        if flat is None:
            return None
        sample = channels[self.stage] * pixels
        start = self.call.offsets(channels, pixels)[self.stage] + self.first * sample
        return flat[start : start + self.count * sample]


@dataclass(frozen=True)
class _Shares:
    """Which stages with samples the kernels serve; the library serves the others."""

    layout: Conv2dLayout
    own: list[int]

    @staticmethod
    def of(layout: Conv2dLayout, dtype: torch.dtype) -> _Shares:
        """By each stage's shape; where this backend is forced, all that it has code for."""
        if _lacks(dtype, layout):
            return _Shares(layout, [])
        everything = forced_backend("grouped_conv2d") == "cpu"
        return _Shares(
            layout, [s for s in layout.stages if everything or _slower_stage(dtype, layout, s) is None]
        )

    def others(self) -> Iterator[_Samples]:
        return (self.whole(s) for s in self.layout.stages if s not in self.own)

    def whole(self, stage: int) -> _Samples:
        return _Samples(self.layout, stage, 0, self.layout.counts[stage])

    def outliers(self, run: Callable[[Tensor], None]) -> list[_Samples]:
        """Runs a kernel, which says what it leaves to the library, sample by sample."""
        if not self.own:
            return []
        reported = torch.zeros(sum(self.layout.counts), dtype=torch.uint8)
        run(reported)
        if not reported.any():
            return []
        flags = reported.split(list(self.layout.counts))
        return [
            _Samples(self.layout, s, i, 1) for s in self.own for i in flags[s].nonzero().flatten().tolist()
        ]


def _compiled(layout: Conv2dLayout, x: Tensor) -> Any:
    return compiled_layout(load("cpu").module.WinogradLayout, layout, x)


def _as_read(weight: Sequence[Tensor], x: Tensor, layout: Conv2dLayout) -> list[Tensor | None]:
    return stage_weights.converted(weight, x.dtype, layout.counts, channels_last=None)


def _innermost(weight: Sequence[Tensor]) -> list[int]:
    """The stages whose weights are read, and whose gradients are written, with their channels innermost."""
    return [s for s, w in enumerate(weight) if stage_weights.has_channels_innermost(w)]


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
    y = x.new_empty(sum(layout.out_sizes))
    shares = _Shares.of(layout, x.dtype)

    def run(outliers: Tensor) -> None:
        found, biases = _as_read(weight, x, layout), stage_weights.converted(bias, x.dtype, layout.counts)
        load("cpu").module.winograd_forward(
            _compiled(layout, x),
            shares.own,
            addresses(x, skip, sample_bias, residual),
            addresses(*found),
            _innermost(weight),
            addresses(*biases),
            scale,
            addresses(y, outliers),
        )

    for part in (*shares.others(), *shares.outliers(run)):
        sources = (part.x(x), part.skip(skip), part.sample_bias(sample_bias), part.y(residual))
        stage = part.stage
        parameters = ([weight[stage]], [bias[stage]] if bias else [])
        part.y(y).copy_(library.grouped_conv2d(*sources, *parameters, part.layout, scale))
    return y


def grouped_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    layout: Conv2dLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, sample_bias, *weight, *bias)`` from the cotangent of the unscaled sum."""
    stages = len(weight)
    want_x, want_skip, want_sample_bias = wanted[:3]
    want_weight, want_bias = wanted[3 : 3 + stages], wanted[3 + stages :]
    shares = _Shares.of(layout, x.dtype)
    dx, dskip = allocate.gradients_like((x, skip), (want_x, want_skip))
    if want_x or want_skip:
        _source_gradients(dy, x, skip, weight, shares, (dx, dskip))
    dweight = _weight_gradients(dy, x, skip, weight, shares, want_weight)
    sums = {s: _sums(dy, shares.whole(s)) for s in layout.stages if want_sample_bias or want_bias[s]}
    dsample_bias = None
    if want_sample_bias:
        dsample_bias = torch.cat([sums[s].flatten() for s in layout.stages] or [dy.new_empty(0)]).to(x.dtype)
    dbias = [
        (sums[s].sum(0) if s in sums else dy.new_zeros(layout.bias_shapes[s])).to(weight[s].dtype)
        if flag
        else None
        for s, flag in enumerate(want_bias)
    ]
    return [dx, dskip, dsample_bias, *dweight, *dbias]


def _sums(dy: Tensor, part: _Samples) -> Tensor:
    """Of the cotangent's pixels, ``[samples, out channels]``, in float32."""
    (channels,) = part.layout.out_channels
    return part.y(dy).view(part.count, -1, channels).sum(1, dtype=torch.float32)


def _source_gradients(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    shares: _Shares,
    gradients: Sequence[Tensor | None],
) -> None:
    """Fills those of x and skip that are not None."""
    dx, dskip = gradients
    layout = shares.layout

    def run(outliers: Tensor) -> None:
        found = _as_read(weight, x, layout)
        load("cpu").module.winograd_input_gradient(
            _compiled(layout, x),
            shares.own,
            address(dy),
            addresses(*found),
            _innermost(weight),
            addresses(dx, dskip, outliers),
        )

    flags = [gradient is not None for gradient in gradients]
    for part in (*shares.others(), *shares.outliers(run)):
        found = _library_gradients(part, dy, x, skip, weight, [*flags, False])
        for target, gradient in zip((part.x(dx), part.skip(dskip)), found, strict=False):
            if target is not None:
                target.copy_(gradient)


def _weight_gradients(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    shares: _Shares,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """In the weights' dtypes, None where not wanted; zeros for a stage without samples."""
    layout = shares.layout
    own, innermost = [s for s in shares.own if wanted[s]], _innermost(weight)
    orders = {True: torch.channels_last, False: torch.contiguous_format}
    found = [
        torch.empty_like(w, dtype=torch.float32, memory_format=orders[s in innermost])
        if s in own
        else torch.zeros_like(w)
        if flag
        else None
        for s, (w, flag) in enumerate(zip(weight, wanted, strict=True))
    ]

    def run(outliers: Tensor) -> None:
        load("cpu").module.winograd_weight_gradient(
            _compiled(layout, x), own, addresses(dy, x, skip), addresses(*found), innermost, address(outliers)
        )

    left = {part.stage for part in (shares.outliers(run) if own else ())}
    left |= {part.stage for part in shares.others() if wanted[part.stage]}
    for s in left:
        found[s] = _library_gradients(shares.whole(s), dy, x, skip, weight, [False, False, True])[2]
    return [None if g is None else g.to(w.dtype) for g, w in zip(found, weight, strict=True)]


def _library_gradients(
    part: _Samples,
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of x, skip and the weight from neighbouring samples of one stage, by the library."""
    want_x, want_skip, want_weight = wanted
    flags = [want_x, want_skip, False, want_weight, False]
    dx, dskip, _, dweight, _ = library.grouped_conv2d_backward(
        part.y(dy), part.x(x), part.skip(skip), [weight[part.stage]], part.layout, flags
    )
    return [dx, dskip, dweight]
