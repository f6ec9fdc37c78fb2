"""Grouped convolution, forward pass and input gradients: an implicit GEMM over NHWC for all stages in one launch.

Both are the same product of a gathered matrix with a weight::

    result[row, column] = Σ_tap Σ_k  gather(source, row, tap)[k] · W_tap[k, column]

A *row* is a pixel of the result. In the forward pass a column is an out channel and ``k`` runs over the channels of
both sources; in the input gradients a column is a channel of one source, ``k`` runs over the out channels of the
cotangent, the taps are mirrored and the weight is read with in and out exchanged. Resampling happens in the gather or
in the store.
"""
# An `if` of what is known at compile time holds one of what is not: the compiler drops the first; `and` keeps both.
# ruff: noqa: SIM102

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.layouts import HALF, MEAN, SAME, SUM, Conv2dLayout
from msd_kernels.ops.grouped_conv2d.plan import (
    PRODUCT_FIELDS,
    arithmetic_constants,
    dgrad_modes,
    forward_modes,
    is_pooled,
    is_resampled,
    tile_constants,
)
from msd_kernels.runtime import tuned
from msd_kernels.runtime.compilation import ELEMENTS, ITEMSIZES, Compilation, register_options
from msd_kernels.runtime.table import find_problem, read_number, read_offset

GATHER_SAME: tl.constexpr = tl.constexpr(SAME)
GATHER_HALF: tl.constexpr = tl.constexpr(HALF)
GATHER_MEAN: tl.constexpr = tl.constexpr(MEAN)
GATHER_SUM: tl.constexpr = tl.constexpr(SUM)

_NARROW: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("narrow"))
_COLUMN_TILES: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("column_tiles"))
_ROWS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("rows"))
_COLUMNS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("columns"))
_CHANNELS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("channels"))
_SKIP_CHANNELS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("skip_channels"))
_SOURCE: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("source"))
_SKIP: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("skip"))
_WEIGHT: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("weight"))
_IN_CHANNELS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("in_channels"))
_RESULT: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("result"))
_TARGET: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("target"))
_BIAS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("bias"))
_SAMPLE_BIAS: tl.constexpr = tl.constexpr(PRODUCT_FIELDS.index("sample_bias"))


@triton.jit
def in_range(position, size):
    """``0 <= position < size`` in one comparison: as unsigned numbers, negative positions are large."""
    return position.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def taps_inside(row, column, height, width, KERNEL: tl.constexpr):
    """The taps whose pixel lies in the image: bit ``i`` for row ``i`` of the taps, bit ``16 + j`` for column ``j``."""
    bits = tl.zeros_like(row)
    if KERNEL == 1:
        bits |= 65537
    else:
        for i in tl.static_range(KERNEL):
            bits |= in_range(row + (i - KERNEL // 2), height).to(tl.int32) << i
            bits |= in_range(column + (i - KERNEL // 2), width).to(tl.int32) << 16 + i
    return bits


@triton.jit
def both(absent_rows, absent_columns):
    """``[rows, columns]``: where to load, from numbers that are 0 for what is there. Cheaper than a mask of each."""
    return (absent_rows[:, None] | absent_columns[None, :]) == 0


@triton.jit
def gather(
    source,
    start,
    index,
    image,
    row,
    column,
    absent_rows,
    shift_row,
    shift_column,
    k,
    absent_k,
    height,
    width,
    channels,
    GATHER: tl.constexpr,
):
    """``[rows, k]`` values of a source at pixels ``start + index = (image, row, column)``, shifted by one tap.

    ``source`` comes from :func:`first_value`; ``height`` and ``width`` are those of the result's grid. ``absent_rows``
    is 0 where the shifted pixel lies in it; with GATHER_SUM, whose shifts are on the finer grid, for all rows that
    there are. Zero for what is absent.
    """
    if GATHER == GATHER_SUM:
        row, column = 2 * row + shift_row, 2 * column + shift_column
        value = _pooled(
            source, image, row, column, absent_rows, k, absent_k, 2 * height, 2 * width, channels, True
        )
    elif GATHER == GATHER_MEAN:
        row, column = 2 * (row + shift_row), 2 * (column + shift_column)
        value = _pooled(
            source, image, row, column, absent_rows, k, absent_k, 2 * height, 2 * width, channels, False
        )
        value *= 0.25
    elif GATHER == GATHER_HALF:
        height, width, row, column = height // 2, width // 2, row + shift_row >> 1, column + shift_column >> 1
        offsets = (((image * height + row) * width + column) * channels)[:, None] + k[None, :]
        value = tl.load(source + offsets, mask=both(absent_rows, absent_k), other=0.0)
    else:  # the shift is the same for all pixels, so it goes into the pointer
        source += (start + shift_row * width + shift_column) * channels
        offsets = (index * channels)[:, None] + k[None, :]
        value = tl.load(source + offsets, mask=both(absent_rows, absent_k), other=0.0)
    return value.to(source.dtype.element_ty)


@triton.jit
def _pooled(
    source, image, row, column, absent_rows, k, absent_k, height, width, channels, EDGES: tl.constexpr
):
    """The float32 sum of the 2×2 pixels from ``(row, column)`` on; with EDGES of those that lie in the image."""
    total = tl.zeros([row.shape[0], k.shape[0]], tl.float32)
    for corner in tl.static_range(4):
        fine_row, fine_column = row + corner // 2, column + corner % 2
        absent = absent_rows
        if EDGES:
            absent = tl.where(in_range(fine_row, height) & in_range(fine_column, width), absent_rows, 1)
        offsets = (((image * height + fine_row) * width + fine_column) * channels)[:, None] + k[None, :]
        total += tl.load(source + offsets, mask=both(absent, absent_k), other=0.0)
    return total


@triton.jit
def first_value(source, first_row, height, width, channels, GATHER: tl.constexpr):
    """What :func:`gather` counts from: a source at pixel ``first_row`` of the result, or at the image that holds it."""
    if GATHER == GATHER_SAME:
        first = first_row.to(tl.int64)
    else:
        pixels = height * width
        first = (first_row // pixels).to(tl.int64) * (pixels // 4 if GATHER == GATHER_HALF else pixels * 4)
    return source + first * channels


@triton.jit
def _product(
    total,
    source,
    skip,
    weight,
    problem,
    first_row,
    first_column,
    height,
    width,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    ADJOINT: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    VECTOR_K: tl.constexpr,
    VECTOR_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``total`` plus the ``[BLOCK_M, BLOCK_N]`` tile of a problem's product at ``(first_row, first_column)``, float32.

    Reads each slice of ``BLOCK_K`` channels of its rows and of its columns' weights once per tap. All slices and taps
    are one loop, so that loads stay in flight from the first to the last.
    """
    channels = read_number(problem, _CHANNELS, PROBLEMS, VECTOR_K)
    columns = read_number(problem, _COLUMNS, PROBLEMS, VECTOR_N)
    if ADJOINT:
        in_channels = read_number(problem, _IN_CHANNELS, PROBLEMS, VECTOR_N)
        weight += read_offset(problem, _WEIGHT, PROBLEMS, VECTOR_N)
    else:
        in_channels = read_number(problem, _IN_CHANNELS, PROBLEMS, VECTOR_K)
        weight += read_offset(problem, _WEIGHT, PROBLEMS, VECTOR_K)
    rows = read_number(problem, _ROWS, PROBLEMS)
    index = tl.arange(0, BLOCK_M)
    live_rows = index < rows - first_row
    pixel = first_row % (height * width) + index
    image, row, column = pixel // (height * width), pixel // width % height, pixel % width
    absent = tl.where(live_rows, 0, 1)
    taps = tl.where(live_rows, taps_inside(row, column, height, width, KERNEL), 0)
    source += read_offset(problem, _SOURCE, PROBLEMS, VECTOR_K)
    source = first_value(source, first_row, height, width, channels, GATHER)
    slices = tl.cdiv(channels, BLOCK_K)
    all_slices = slices
    if HAS_SKIP:
        skip_channels = read_number(problem, _SKIP_CHANNELS, PROBLEMS, VECTOR_K)
        skip += read_offset(problem, _SKIP, PROBLEMS, VECTOR_K)
        skip = first_value(skip, first_row, height, width, skip_channels, GATHER)
        all_slices += tl.cdiv(skip_channels, BLOCK_K)

    out, k = first_column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    absent_out = tl.where(out < columns, 0, 1)
    TAPS: tl.constexpr = KERNEL * KERNEL
    # What differs within a slice does not change from slice to slice; the rest is in the pointers.
    if ADJOINT:
        slice_stride = TAPS * in_channels
        offsets = (k * slice_stride)[:, None] + out[None, :]
    else:
        slice_stride = 1
        offsets = k[:, None] + (out * (TAPS * in_channels))[None, :]
    for step in tl.range(0, all_slices * TAPS, num_stages=STAGES):
        tap = step % TAPS
        first_k = step // TAPS * BLOCK_K
        here, here_channels, behind = source, channels, 0
        if HAS_SKIP:
            in_skip = step >= slices * TAPS
            here = tl.where(in_skip, skip, source)
            here_channels = tl.where(in_skip, skip_channels, channels)
            behind = tl.where(in_skip, channels, 0)
            first_k = tl.where(in_skip, first_k - slices * BLOCK_K, first_k)
        absent_k = tl.where(k < here_channels - first_k, 0, 1)
        place = tap
        if ADJOINT:
            place = TAPS - 1 - tap
        tap_row = place * (65536 // KERNEL + 1) >> 16
        tap_column = place - tap_row * KERNEL
        absent_rows = absent
        if GATHER != GATHER_SUM:
            absent_rows = ~taps & ((1 << tap_row) | (65536 << tap_column))
        a = gather(
            here + first_k,
            0,
            index,
            image,
            row,
            column,
            absent_rows,
            tap_row - KERNEL // 2,
            tap_column - KERNEL // 2,
            k,
            absent_k,
            height,
            width,
            here_channels,
            GATHER,
        )
        b = tl.load(
            weight + (tap * in_channels + behind + first_k * slice_stride) + offsets,
            mask=both(absent_k, absent_out),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _forward_tile(
    x,
    skip,
    weight,
    bias,
    sample_bias,
    residual,
    y,
    problem,
    tile,
    height,
    width,
    scale,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    REPEAT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y = scale · (bias + sample_bias + residual + product)`` on one tile; with REPEAT on 2×2 pixels per row.

    The sum starts from the biases and ends with the residual: either alone fits the registers beside a tile's sums.
    """
    first_row, first_column = _first_of(problem, tile, PROBLEMS, BLOCK_M, BLOCK_N)
    columns = read_number(problem, _COLUMNS, PROBLEMS, VECTOR_OUT)
    out = first_column + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        bias += read_offset(problem, _BIAS, PROBLEMS, VECTOR_OUT)
        total += tl.load(bias + out, mask=out < columns, other=0.0).to(tl.float32)[None, :]
    if sample_bias is not None:
        pixels, row = height * width, tl.arange(0, BLOCK_M)
        sample = (first_row % pixels + row) // pixels
        sample_bias += read_offset(problem, _SAMPLE_BIAS, PROBLEMS, VECTOR_OUT)
        sample_bias += (first_row // pixels).to(tl.int64) * columns
        live = (row < read_number(problem, _ROWS, PROBLEMS) - first_row)[:, None] & (out < columns)[None, :]
        offsets = (sample * columns)[:, None] + out[None, :]
        total += tl.load(sample_bias + offsets, mask=live, other=0.0).to(tl.float32)
    total = _product(
        total, x, skip, weight, problem, first_row, first_column, height, width,
        PROBLEMS, KERNEL, GATHER, False, skip is not None, VECTOR_IN, VECTOR_OUT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    # Behind the loop, where the tile lies is read from the table again, so that the loop has the registers.
    first_row, first_column = _first_of(problem, tile, PROBLEMS, BLOCK_M, BLOCK_N)
    start, offsets, live = _tile_of_result(
        problem, first_row, first_column, PROBLEMS, VECTOR_OUT, BLOCK_M, BLOCK_N
    )
    CORNERS: tl.constexpr = 4 if REPEAT else 1
    for corner in tl.static_range(CORNERS):
        if REPEAT:
            start, offsets = _repeated(
                problem,
                first_row,
                first_column,
                height,
                width,
                corner,
                PROBLEMS,
                VECTOR_OUT,
                BLOCK_M,
                BLOCK_N,
            )
        value = total
        if residual is not None:
            value += tl.load(residual + start + offsets, mask=live, other=0.0).to(tl.float32)
        tl.store(y + start + offsets, (value * scale).to(y.dtype.element_ty), mask=live)


@triton.jit
def _first_of(problem, tile, PROBLEMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and column of a tile."""
    column_tiles = read_number(problem, _COLUMN_TILES, PROBLEMS)
    return tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N


@triton.jit
def _tile_of_result(
    problem, first_row, first_column,
    PROBLEMS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first element of a tile in the result, the others' distances from it, and which of them there are."""
    columns, row, column = (
        read_number(problem, _COLUMNS, PROBLEMS, VECTOR),
        tl.arange(0, BLOCK_M),
        tl.arange(0, BLOCK_N),
    )
    rows = read_number(problem, _ROWS, PROBLEMS) - first_row
    start = read_offset(problem, _RESULT, PROBLEMS, VECTOR) + first_row.to(tl.int64) * columns + first_column
    live = (row < rows)[:, None] & (column < columns - first_column)[None, :]
    return start, (row * columns)[:, None] + column[None, :], live


@triton.jit
def _repeated(
    problem, first_row, first_column, height, width, corner,
    PROBLEMS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As :func:`_tile_of_result` the elements of one of the 2×2 fine pixels of each row, which is a coarse pixel."""
    columns, pixels = read_number(problem, _COLUMNS, PROBLEMS, VECTOR), height * width
    row = first_row % pixels + tl.arange(0, BLOCK_M)
    pixel = (2 * (row // width) + corner // 2) * (2 * width) + 2 * (row % width) + corner % 2
    start = read_offset(problem, _RESULT, PROBLEMS, VECTOR) + first_column
    start += (first_row // pixels).to(tl.int64) * (4 * pixels) * columns
    return start, (pixel * columns)[:, None] + tl.arange(0, BLOCK_N)[None, :]


@triton.jit(do_not_specialize=["tiles", "height", "width"])
def _grouped_conv2d_forward_kernel(
    x,
    skip,
    weight,
    bias,
    sample_bias,
    residual,
    y,
    table,
    tiles,
    height,
    width,
    scale,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    REPEAT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_M: tl.constexpr,
    WIDE_N: tl.constexpr,
    WIDE_K: tl.constexpr,
    WIDE_STAGES: tl.constexpr,
    NARROW_M: tl.constexpr,
    NARROW_N: tl.constexpr,
    NARROW_K: tl.constexpr,
    NARROW_STAGES: tl.constexpr,
):
    """A program owns every ``num_programs``-th tile of all stages' outputs and writes each of them once.

    Per tile it reads the gathered pixels and the weights of its out channels once per tap, and what is added to them.
    A tile belongs to one stage; stages with few out channels are served in narrow tiles.
    """
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        problem, tile = find_problem(table, index, PROBLEMS)
        narrow = WIDE_M == 0
        if (WIDE_M > 0) & (NARROW_M > 0):
            narrow = read_number(problem, _NARROW, PROBLEMS) == 1
        if narrow:
            if NARROW_M > 0:
                _forward_tile(
                    x, skip, weight, bias, sample_bias, residual, y, problem, tile, height, width, scale,
                    PROBLEMS, KERNEL, GATHER, REPEAT, VECTOR_IN, VECTOR_OUT, PRECISION,
                    NARROW_M, NARROW_N, NARROW_K, NARROW_STAGES,
                )  # fmt: skip
        else:
            if WIDE_M > 0:
                _forward_tile(
                    x, skip, weight, bias, sample_bias, residual, y, problem, tile, height, width, scale,
                    PROBLEMS, KERNEL, GATHER, REPEAT, VECTOR_IN, VECTOR_OUT, PRECISION,
                    WIDE_M, WIDE_N, WIDE_K, WIDE_STAGES,
                )  # fmt: skip


@triton.jit
def _dgrad_tile(
    dy,
    weight,
    dx,
    dskip,
    problem,
    tile,
    height,
    width,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    REPEAT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of one source's gradient; with REPEAT a quarter of it on 2×2 pixels per row."""
    first_row, first_column = _first_of(problem, tile, PROBLEMS, BLOCK_M, BLOCK_N)
    total = _product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), dy, None, weight, problem, first_row, first_column, height, width,
        PROBLEMS, KERNEL, GATHER, True, False, VECTOR_OUT, VECTOR_IN, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    result = dx
    if dskip is not None:
        if read_number(problem, _TARGET, PROBLEMS) == 1:
            result = dskip
    first_row, first_column = _first_of(problem, tile, PROBLEMS, BLOCK_M, BLOCK_N)
    start, offsets, live = _tile_of_result(
        problem, first_row, first_column, PROBLEMS, VECTOR_IN, BLOCK_M, BLOCK_N
    )
    value = (total * (0.25 if REPEAT else 1.0)).to(dx.dtype.element_ty)
    CORNERS: tl.constexpr = 4 if REPEAT else 1
    for corner in tl.static_range(CORNERS):
        if REPEAT:
            start, offsets = _repeated(
                problem, first_row, first_column, height, width, corner, PROBLEMS, VECTOR_IN, BLOCK_M, BLOCK_N
            )
        tl.store(result + start + offsets, value, mask=live)


@triton.jit(do_not_specialize=["tiles", "height", "width"])
def _grouped_conv2d_dgrad_kernel(
    dy,
    weight,
    dx,
    dskip,
    table,
    tiles,
    height,
    width,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    REPEAT: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_M: tl.constexpr,
    WIDE_N: tl.constexpr,
    WIDE_K: tl.constexpr,
    WIDE_STAGES: tl.constexpr,
    NARROW_M: tl.constexpr,
    NARROW_N: tl.constexpr,
    NARROW_K: tl.constexpr,
    NARROW_STAGES: tl.constexpr,
):
    """A program owns every ``num_programs``-th tile of both sources' gradients and writes each of them once.

    Per tile it reads the gathered cotangents and the weights of its channels once per tap.
    """
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        problem, tile = find_problem(table, index, PROBLEMS)
        narrow = WIDE_M == 0
        if (WIDE_M > 0) & (NARROW_M > 0):
            narrow = read_number(problem, _NARROW, PROBLEMS) == 1
        if narrow:
            if NARROW_M > 0:
                _dgrad_tile(
                    dy, weight, dx, dskip, problem, tile, height, width,
                    PROBLEMS, KERNEL, GATHER, REPEAT, VECTOR_IN, VECTOR_OUT, PRECISION,
                    NARROW_M, NARROW_N, NARROW_K, NARROW_STAGES,
                )  # fmt: skip
        else:
            if WIDE_M > 0:
                _dgrad_tile(
                    dy, weight, dx, dskip, problem, tile, height, width,
                    PROBLEMS, KERNEL, GATHER, REPEAT, VECTOR_IN, VECTOR_OUT, PRECISION,
                    WIDE_M, WIDE_N, WIDE_K, WIDE_STAGES,
                )  # fmt: skip


def compilations(architecture: int) -> Iterator[Compilation]:
    """Every entry of the launch table; the resampling gathers, which are the same for all arithmetics, once."""
    for arithmetic in tuned.ARITHMETICS:
        parameters = tuned.product(architecture, arithmetic)
        cases = [(3, "none", "wide+narrow"), (3, "none", "unaligned"), (1, "none", "short")]
        if arithmetic == "half":
            cases += [(3, "up", "wide+narrow"), (3, "down", "wide+narrow"), (1, "up", "wide+narrow")]
        if parameters.large:
            cases += [(3, "none", "large+narrow"), (1, "none", "large+narrow")]
        for kernel, resample, tiles in cases:
            for adjoint in (False, True):
                yield _compilation(parameters, arithmetic, kernel, resample, tiles, adjoint)
        yield _compilation(parameters, arithmetic, 3, "none", "to image", False)


def _compilation(
    parameters: tuned.ProductParameters,
    arithmetic: str,
    kernel: int,
    resample: str,
    tiles: str,
    adjoint: bool,
) -> Compilation:
    channels = (65 if tiles == "unaligned" else 64,)
    out_channels = (3,) if tiles == "to image" else channels
    layout = Conv2dLayout((1,), channels, channels, out_channels, 2, 2, kernel, resample)
    modes = dgrad_modes(layout) if adjoint else forward_modes(layout)
    constants = arithmetic_constants(layout, arithmetic, ITEMSIZES[ELEMENTS[arithmetic]])
    vectors = (
        [constants["VECTOR_IN"]] if tiles == "to image" else [constants["VECTOR_IN"], constants["VECTOR_OUT"]]
    )
    parameters = parameters.for_vectors(*vectors)
    rows = parameters.short.m + (tiles != "short")
    launches = parameters.launches(rows, channels[0], is_pooled(modes), is_resampled(modes))
    launch, _ = launches[-1 if tiles == "large+narrow" else 0]
    names = ("dy", "weight", "dx", "dskip")
    if not adjoint:
        names = ("x", "skip", "weight", "bias", "residual", "y")
        names += () if tiles == "large+narrow" else ("sample_bias",)
    scalars = {"tiles": "scalar i32", "height": "scalar i32", "width": "scalar i32", "scale": "scalar fp32"}
    if adjoint:
        scalars.pop("scale")
    return Compilation(
        _grouped_conv2d_dgrad_kernel if adjoint else _grouped_conv2d_forward_kernel,
        f"{arithmetic} {kernel}x{kernel} {resample} {tiles}",
        dict.fromkeys(names, ELEMENTS[arithmetic]) | {"table": "i64"} | scalars,
        {
            "PROBLEMS": 4,
            "KERNEL": kernel,
            **modes,
            **constants,
            **tile_constants(None if tiles == "to image" else launch.wide, launch.narrow),
        },
        {"num_warps": launch.warps, **register_options(launch.warps, launch.programs_per_multiprocessor)},
        tensor_cores=arithmetic != "float32",
    )
