"""Kernel of FIR resampling: both directions, both memory formats, any filter."""

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.layouts import Resample2dLayout
from msd_kernels.ops.resample2d.triton import FIELDS, tile_constants
from msd_kernels.runtime import tuned
from msd_kernels.runtime.compilation import Compilation
from msd_kernels.runtime.table import find_problem, read_number, read_offset

CHANNELS = tl.constexpr(FIELDS.index("channels"))
X_OFFSET = tl.constexpr(FIELDS.index("x"))
Y_OFFSET = tl.constexpr(FIELDS.index("y"))


@triton.jit
def _source(position, k, PADDING: tl.constexpr, UPWARD: tl.constexpr, STRIDE: tl.constexpr):
    """The k-th input position of an output position along one axis."""
    if UPWARD:
        return (position + PADDING) // STRIDE - k
    else:
        return position * STRIDE - PADDING + k


@triton.jit
def _taps_left(k, TAPS: tl.constexpr, UPWARD: tl.constexpr, STRIDE: tl.constexpr):
    """The phases of output positions that have a k-th input are those below this."""
    if UPWARD:
        return len(TAPS) - STRIDE * k
    else:
        return STRIDE


@triton.jit
def _weight(phase, K: tl.constexpr, TAPS: tl.constexpr, UPWARD: tl.constexpr, STRIDE: tl.constexpr):
    """The weight of the k-th input. Upward, output j has those taps t for which STRIDE divides j + PADDING - t."""
    if UPWARD and STRIDE == 2:
        return tl.where(phase == 0, TAPS[2 * K], TAPS[2 * K + 1] if len(TAPS) > 2 * K + 1 else 0.0)
    else:
        tap: tl.constexpr = TAPS[K]  # Triton 3.7 cannot return the plain float that it finds in a tuple
        return tap


@triton.jit
def _resample2d_kernel(
    x, y, table, height, width, out_height, out_width, rows,
    TAPS: tl.constexpr, UPWARD: tl.constexpr, STRIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BX: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr, PROBLEMS: tl.constexpr,
):  # fmt: skip
    """One program: BX columns of ``rows`` rows of the output, BC channels of one sample.

    Sums its taps for one output row after the other; the input rows that two of them share come from the cache the
    second time. Writes its part of ``y`` once.
    """
    ALIGN_C: tl.constexpr = ALIGN if CHANNELS_LAST else 1
    COUNT: tl.constexpr = (len(TAPS) + STRIDE - 1) // STRIDE if UPWARD else len(TAPS)
    PADDING: tl.constexpr = (len(TAPS) - 1) // 2
    UNROLL: tl.constexpr = 2 if len(TAPS) <= 4 else 1
    problem, tile = find_problem(table, tl.program_id(0), PROBLEMS)
    channels = read_number(problem, CHANNELS, PROBLEMS, ALIGN_C)
    channel_blocks = tl.cdiv(channels, BC)
    column_blocks = tl.cdiv(out_width, BX)
    row_blocks = tl.cdiv(out_height, rows)
    channel = tile % channel_blocks * BC + tl.arange(0, BC)
    column = tile // channel_blocks % column_blocks * BX + tl.arange(0, BX)
    first_row = tile // channel_blocks // column_blocks % row_blocks * rows
    sample = (tile // channel_blocks // column_blocks // row_blocks).to(tl.int64)
    x += read_offset(problem, X_OFFSET, PROBLEMS, ALIGN_C) + sample * height * width * channels
    y += read_offset(problem, Y_OFFSET, PROBLEMS, ALIGN_C) + sample * out_height * out_width * channels
    if CHANNELS_LAST:
        column, channel, pixel = column[:, None], channel[None, :], channels
        x_channel, y_channel = x + channel, y + channel
    else:
        column, channel, pixel = column[None, :], channel[:, None], 1
        x_channel = x + channel.to(tl.int64) * height * width
        y_channel = y + channel.to(tl.int64) * out_height * out_width
    column_phase = (column + PADDING) % STRIDE
    inside = (column < out_width) & (channel < channels)
    for step in range(tl.minimum(rows, out_height - first_row)):
        row = first_row + step
        row_phase = (row + PADDING) % STRIDE
        total = tl.zeros(inside.shape, tl.float32)
        for i in tl.range(COUNT, loop_unroll_factor=UNROLL):
            x_row = _source(row, i, PADDING, UPWARD, STRIDE)
            exists = (x_row >= 0) & (x_row < height) & (row_phase < _taps_left(i, TAPS, UPWARD, STRIDE))
            end = tl.where(exists, width, 0)
            x_line = x_channel + x_row.to(tl.int64) * width * pixel
            line = tl.zeros(inside.shape, tl.float32)
            for j in tl.static_range(COUNT):
                x_column = _source(column, j, PADDING, UPWARD, STRIDE)
                mask = inside & (x_column >= 0) & (x_column < end)
                if UPWARD and len(TAPS) < STRIDE * (j + 1):
                    mask &= column_phase < _taps_left(j, TAPS, UPWARD, STRIDE)
                values = tl.load(x_line + x_column * pixel, mask=mask, other=0).to(tl.float32)
                line += values * _weight(column_phase, j, TAPS, UPWARD, STRIDE)
            row_weight = 0.0
            for k in tl.static_range(COUNT):
                row_weight = tl.where(i == k, _weight(row_phase, k, TAPS, UPWARD, STRIDE), row_weight)
            total += line * row_weight
        y_line = y_channel + row.to(tl.int64) * out_width * pixel
        tl.store(y_line + column * pixel, total.to(y.dtype.element_ty), mask=inside)


FILTERS = {"[1, 1]": (0.5, 0.5), "[1, 3, 3, 1]": (0.125, 0.375, 0.375, 0.125)}
EIGHT_TAPS = (-0.02, 0.05, 0.12, 0.35, 0.35, 0.12, 0.05, -0.02)
# Channels per stage: EDM's three decoders, and images.
LAYOUTS = {"384/256/32": (384, 256, 32), "3": (3,)}


def compilations(architecture: int) -> Iterator[Compilation]:
    """Both directions for typical layouts in both memory formats, and the longest filter."""
    parameters = tuned.resample2d(architecture)
    for dtype in ("bf16", "fp32"):
        for layout, channels in LAYOUTS.items():
            for channels_last in (True, False):
                for name, taps in FILTERS.items():
                    for upward in (False, True):
                        made = _layout(taps, upward, channels, 32, channels_last)
                        yield _compilation(f"{layout} {name}", dtype, made, parameters)
        for upward in (False, True):
            made = _layout(EIGHT_TAPS, upward, (384, 256, 32), 8, True)
            yield _compilation("384/256/32 8 taps", dtype, made, parameters)


def _layout(taps, upward, channels, side, last) -> Resample2dLayout:
    return Resample2dLayout(taps, upward, 2, (1,) * len(channels), channels, *(side,) * 4, last)


def _compilation(
    name: str, dtype: str, layout: Resample2dLayout, parameters: tuned.ResampleParameters
) -> Compilation:
    constants = tile_constants(layout, parameters)
    warps = constants.pop("num_warps")
    sizes = ("height", "width", "out_height", "out_width", "rows")
    arguments = {"x": dtype, "y": dtype, "table": "i64", **dict.fromkeys(sizes, "scalar i32")}
    return Compilation(
        _resample2d_kernel,
        f"{dtype} {name} {'nhwc' if layout.channels_last else 'nchw'} {'up' if layout.upward else 'down'}",
        arguments,
        {**constants, "TAPS": layout.taps, "UPWARD": layout.upward, "STRIDE": layout.stride, "PROBLEMS": 4},
        {"num_warps": warps},
    )
