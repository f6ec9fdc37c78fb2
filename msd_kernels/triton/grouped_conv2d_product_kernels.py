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

from msd_kernels import tuned
from msd_kernels.triton.compilation import ELEMENTS, ITEMSIZES, Compilation
from msd_kernels.triton.problems import (
    HALF,
    MEAN,
    PRODUCT_FIELDS,
    SAME,
    SUM,
    Layout,
    arithmetic_constants,
    is_pooled,
    tile_constants,
)

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
def find_problem(table, tile, PROBLEMS: tl.constexpr):
    """The pointer to the first field of the problem that owns a tile: the last one that starts at or before it."""
    first_tiles = tl.load(table + tl.arange(0, PROBLEMS))
    return table + tl.sum((first_tiles <= tile).to(tl.int32), axis=0) - 1


@triton.jit
def read(problem, FIELD: tl.constexpr, PROBLEMS: tl.constexpr, MULTIPLE: tl.constexpr = 1):
    """A field of a problem. The division and the product tell the compiler that it is a multiple."""
    return tl.load(problem + FIELD * PROBLEMS) // MULTIPLE * MULTIPLE


@triton.jit
def gather(
    source,
    image,
    row,
    column,
    shift_row,
    shift_column,
    k,
    live_rows,
    live_k,
    height,
    width,
    channels,
    GATHER: tl.constexpr,
):
    """``[rows, k]`` values of a source at pixels ``(image, row, column)`` of the result, shifted by one tap.

    ``height`` and ``width`` are those of the result's grid. Zero outside of the image.
    """
    if GATHER == GATHER_SUM:
        total = tl.zeros([row.shape[0], k.shape[0]], tl.float32)
        for corner in tl.static_range(4):
            fine_row = 2 * row + corner // 2 + shift_row
            fine_column = 2 * column + corner % 2 + shift_column
            inside = (
                (fine_row >= 0) & (fine_row < 2 * height) & (fine_column >= 0) & (fine_column < 2 * width)
            )
            pixel = (image * 2 * height + fine_row) * 2 * width + fine_column
            mask = (inside & live_rows)[:, None] & live_k[None, :]
            total += tl.load(source + ((pixel * channels)[:, None] + k[None, :]), mask=mask, other=0.0)
        value = total.to(source.dtype.element_ty)
    else:
        row += shift_row
        column += shift_column
        inside = live_rows & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        mask = inside[:, None] & live_k[None, :]
        if GATHER == GATHER_MEAN:
            total = tl.zeros([row.shape[0], k.shape[0]], tl.float32)
            for corner in tl.static_range(4):
                pixel = (image * 2 * height + 2 * row + corner // 2) * 2 * width + 2 * column + corner % 2
                total += tl.load(source + ((pixel * channels)[:, None] + k[None, :]), mask=mask, other=0.0)
            value = (total * 0.25).to(source.dtype.element_ty)
        else:
            if GATHER == GATHER_HALF:
                pixel = (image * (height // 2) + row // 2) * (width // 2) + column // 2
            else:
                pixel = (image * height + row) * width + column
            value = tl.load(source + ((pixel * channels)[:, None] + k[None, :]), mask=mask, other=0.0)
    return value


@triton.jit
def image_size(height, width, channels, GATHER: tl.constexpr):
    """Elements of one source image behind a result's grid of ``height × width``, in 64 bits."""
    pixels = height.to(tl.int64) * width
    if GATHER == GATHER_HALF:
        pixels = pixels // 4
    elif GATHER != GATHER_SAME:
        pixels = pixels * 4
    return pixels * channels


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
    channels = read(problem, _CHANNELS, PROBLEMS, VECTOR_K).to(tl.int32)
    columns = read(problem, _COLUMNS, PROBLEMS, VECTOR_N).to(tl.int32)
    if ADJOINT:
        in_channels = read(problem, _IN_CHANNELS, PROBLEMS, VECTOR_N).to(tl.int32)
        weight += read(problem, _WEIGHT, PROBLEMS, VECTOR_N)
    else:
        in_channels = read(problem, _IN_CHANNELS, PROBLEMS, VECTOR_K).to(tl.int32)
        weight += read(problem, _WEIGHT, PROBLEMS, VECTOR_K)
    rows = tl.load(problem + _ROWS * PROBLEMS)
    pixels = height * width
    first_image = first_row // pixels
    local = (first_row % pixels).to(tl.int32) + tl.arange(0, BLOCK_M)
    live_rows = tl.arange(0, BLOCK_M) < rows - first_row
    image, row, column = local // pixels, local % pixels // width, local % width
    source += read(problem, _SOURCE, PROBLEMS, VECTOR_K) + first_image * image_size(
        height, width, channels, GATHER
    )
    slices = tl.cdiv(channels, BLOCK_K)
    all_slices = slices
    if HAS_SKIP:
        skip_channels = read(problem, _SKIP_CHANNELS, PROBLEMS, VECTOR_K).to(tl.int32)
        skip += read(problem, _SKIP, PROBLEMS, VECTOR_K)
        skip += first_image * image_size(height, width, skip_channels, GATHER)
        all_slices += tl.cdiv(skip_channels, BLOCK_K)

    out = first_column + tl.arange(0, BLOCK_N)
    live_columns = out < columns
    TAPS: tl.constexpr = KERNEL * KERNEL
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
        shift_row, shift_column = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
        if ADJOINT:
            shift_row, shift_column = -shift_row, -shift_column
        k = first_k + tl.arange(0, BLOCK_K)
        live_k = k < here_channels
        a = gather(
            here,
            image,
            row,
            column,
            shift_row,
            shift_column,
            k,
            live_rows,
            live_k,
            height,
            width,
            here_channels,
            GATHER,
        )
        if ADJOINT:
            offsets = (k * (TAPS * in_channels))[:, None] + out[None, :]
        else:
            offsets = k[:, None] + (out * (TAPS * in_channels))[None, :]
        b = tl.load(
            weight + (tap * in_channels + behind) + offsets,
            mask=live_k[:, None] & live_columns[None, :],
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

    The sum starts from what is added to the product, so that the registers of those loads are free again in the loop.
    """
    column_tiles = tl.load(problem + _COLUMN_TILES * PROBLEMS)
    first_row = tile // column_tiles * BLOCK_M
    first_column = (tile % column_tiles).to(tl.int32) * BLOCK_N
    columns = read(problem, _COLUMNS, PROBLEMS, VECTOR_OUT).to(tl.int32)
    rows = tl.load(problem + _ROWS * PROBLEMS)
    result = read(problem, _RESULT, PROBLEMS, VECTOR_OUT)
    out = first_column + tl.arange(0, BLOCK_N)
    live = (tl.arange(0, BLOCK_M) < rows - first_row)[:, None] & (out < columns)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        bias += read(problem, _BIAS, PROBLEMS, VECTOR_OUT)
        total += tl.load(bias + out, mask=out < columns, other=0.0).to(tl.float32)[None, :]
    if sample_bias is not None:
        pixels = height * width
        sample = ((first_row % pixels).to(tl.int32) + tl.arange(0, BLOCK_M)) // pixels
        sample_bias += read(problem, _SAMPLE_BIAS, PROBLEMS, VECTOR_OUT) + first_row // pixels * columns
        offsets = (sample * columns)[:, None] + out[None, :]
        total += tl.load(sample_bias + offsets, mask=live, other=0.0).to(tl.float32)
    if residual is not None and not REPEAT:
        offsets = (tl.arange(0, BLOCK_M) * columns)[:, None] + out[None, :]
        total += tl.load(residual + (result + first_row * columns) + offsets, mask=live, other=0.0).to(
            tl.float32
        )
    total = _product(
        total, x, skip, weight, problem, first_row, first_column, height, width,
        PROBLEMS, KERNEL, GATHER, False, skip is not None, VECTOR_IN, VECTOR_OUT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    if REPEAT:
        for corner in tl.static_range(4):
            pixel, first = repeated(first_row, height, width, corner, BLOCK_M)
            offsets = (pixel * columns)[:, None] + out[None, :]
            start = result + first * columns
            value = total
            if residual is not None:
                value += tl.load(residual + start + offsets, mask=live, other=0.0).to(tl.float32)
            tl.store(y + start + offsets, (value * scale).to(y.dtype.element_ty), mask=live)
    else:
        offsets = (tl.arange(0, BLOCK_M) * columns)[:, None] + out[None, :]
        tl.store(
            y + (result + first_row * columns) + offsets, (total * scale).to(y.dtype.element_ty), mask=live
        )


@triton.jit
def repeated(first_row, height, width, corner, BLOCK_M: tl.constexpr):
    """One of the 2×2 fine pixels of each coarse row, counted from its image's first fine pixel, and that pixel."""
    pixels = height * width
    local = (first_row % pixels).to(tl.int32) + tl.arange(0, BLOCK_M)
    fine_row = 2 * (local // width) + corner // 2
    return fine_row * (2 * width) + 2 * (local % width) + corner % 2, first_row // pixels * (4 * pixels)


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
        problem = find_problem(table, index, PROBLEMS)
        tile = index - tl.load(problem)
        narrow = WIDE_M == 0
        if (WIDE_M > 0) & (NARROW_M > 0):
            narrow = tl.load(problem + _NARROW * PROBLEMS) == 1
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
    column_tiles = tl.load(problem + _COLUMN_TILES * PROBLEMS)
    first_row = tile // column_tiles * BLOCK_M
    first_column = (tile % column_tiles).to(tl.int32) * BLOCK_N
    total = _product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), dy, None, weight, problem, first_row, first_column, height, width,
        PROBLEMS, KERNEL, GATHER, True, False, VECTOR_OUT, VECTOR_IN, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    columns = read(problem, _COLUMNS, PROBLEMS, VECTOR_IN).to(tl.int32)
    rows = tl.load(problem + _ROWS * PROBLEMS)
    result = dx
    if dskip is not None:
        if tl.load(problem + _TARGET * PROBLEMS) == 1:
            result = dskip
    result += read(problem, _RESULT, PROBLEMS, VECTOR_IN)
    out = first_column + tl.arange(0, BLOCK_N)
    live = (tl.arange(0, BLOCK_M) < rows - first_row)[:, None] & (out < columns)[None, :]
    if REPEAT:
        value = (total * 0.25).to(dx.dtype.element_ty)
        for corner in tl.static_range(4):
            pixel, first = repeated(first_row, height, width, corner, BLOCK_M)
            tl.store(result + first * columns + (pixel * columns)[:, None] + out[None, :], value, mask=live)
    else:
        offsets = (tl.arange(0, BLOCK_M) * columns)[:, None] + out[None, :]
        tl.store(result + first_row * columns + offsets, total.to(dx.dtype.element_ty), mask=live)


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
        problem = find_problem(table, index, PROBLEMS)
        tile = index - tl.load(problem)
        narrow = WIDE_M == 0
        if (WIDE_M > 0) & (NARROW_M > 0):
            narrow = tl.load(problem + _NARROW * PROBLEMS) == 1
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
        for kernel, resample, tiles in cases:
            for adjoint in (False, True):
                yield _compilation(parameters, arithmetic, kernel, resample, tiles, adjoint)


def _compilation(
    parameters: tuned.ProductParameters,
    arithmetic: str,
    kernel: int,
    resample: str,
    tiles: str,
    adjoint: bool,
) -> Compilation:
    channels = (65 if tiles == "unaligned" else 64,)
    layout = Layout.of((1,), channels, channels, channels, 2, 2, kernel, resample)
    modes = layout.dgrad_modes if adjoint else layout.forward_modes
    constants = arithmetic_constants(layout, arithmetic, ITEMSIZES[ELEMENTS[arithmetic]])
    parameters = parameters.for_vectors(constants["VECTOR_IN"], constants["VECTOR_OUT"])
    rows = parameters.short.m + (tiles != "short")
    launch = parameters.launch(rows, channels[0], is_pooled(modes))
    names = (
        ("dy", "weight", "dx", "dskip")
        if adjoint
        else ("x", "skip", "weight", "bias", "sample_bias", "residual", "y")
    )
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
            **tile_constants(launch.wide, launch.narrow),
        },
        {"num_warps": launch.warps},
        tensor_cores=arithmetic != "float32",
    )
