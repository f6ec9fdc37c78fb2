"""Grouped convolution, gradients of the weights and biases: partial sums over pixels, then their sum in a fixed order.

For every tap, source channel ``c`` and out channel ``o`` of a stage::

    dweight[o, tap, c] = Σ_pixel  gather(source, pixel, tap)[c] · dy[pixel, o]
    dbias[o] = Σ_sample dsample_bias[sample, o],   dsample_bias[sample, o] = Σ_pixel of the sample  dy[pixel, o]

The pixels of a stage are cut into chunks whose number follows from the shapes alone. One launch writes every chunk's
partial sums to a float32 workspace, a second one adds them up, always in the same order: no atomics, the same bits each
time.
"""
# An `if` of what is known at compile time holds one of what is not: the compiler drops the first; `and` keeps both.
# ruff: noqa: SIM102

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d.plan import (
    NARROW,
    PIXEL_SUMS,
    SUM_FIELDS,
    TO_BIAS,
    TO_SAMPLE_BIAS,
    TO_WEIGHT,
    WGRAD_FIELDS,
    WIDE,
    arithmetic_constants,
    is_pooled,
    sum_constants,
    tile_constants,
    wgrad_modes,
)
from msd_kernels.ops.grouped_conv2d.product_kernels import both, first_value, gather, in_range
from msd_kernels.runtime import tuned
from msd_kernels.runtime.compilation import ELEMENTS, ITEMSIZES, Compilation, register_options
from msd_kernels.runtime.table import find_problem, read_number, read_offset

_KIND: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("kind"))
_OUT_TILES: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("out_tiles"))
_CHANNEL_TILES: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("channel_tiles"))
_ROWS: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("rows"))
_CHANNELS: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("channels"))
_OUT_CHANNELS: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("out_channels"))
_SOURCE: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("source"))
_ORIGIN: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("origin"))
_COTANGENT: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("cotangent"))
_CHUNK: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("chunk"))
_PARTIAL: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("partial"))
_PARTIAL_STRIDE: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("partial_stride"))
_IN_CHANNELS: tl.constexpr = tl.constexpr(WGRAD_FIELDS.index("in_channels"))
_WIDE: tl.constexpr = tl.constexpr(WIDE)
_NARROW: tl.constexpr = tl.constexpr(NARROW)
_PIXEL_SUMS: tl.constexpr = tl.constexpr(PIXEL_SUMS)
_TO_WEIGHT: tl.constexpr = tl.constexpr(TO_WEIGHT)
_TO_BIAS: tl.constexpr = tl.constexpr(TO_BIAS)
_TO_SAMPLE_BIAS: tl.constexpr = tl.constexpr(TO_SAMPLE_BIAS)

_TERMS: tl.constexpr = tl.constexpr(SUM_FIELDS.index("terms"))
_STRIDE: tl.constexpr = tl.constexpr(SUM_FIELDS.index("stride"))
_SIZE: tl.constexpr = tl.constexpr(SUM_FIELDS.index("size"))
_SUM_PARTIAL: tl.constexpr = tl.constexpr(SUM_FIELDS.index("partial"))
_RESULT: tl.constexpr = tl.constexpr(SUM_FIELDS.index("result"))
_TARGET: tl.constexpr = tl.constexpr(SUM_FIELDS.index("target"))


@triton.jit
def _advance(image, row, column, PIXELS: tl.constexpr, height, width):
    """The pixels that lie PIXELS later, without a division per pixel."""
    rows = PIXELS // width
    column += PIXELS % width
    wraps = column >= width
    column = tl.where(wraps, column - width, column)
    row += rows % height + wraps.to(tl.int32)
    wraps = row >= height
    row = tl.where(wraps, row - height, row)
    return image + rows // height + wraps.to(tl.int32), row, column


@triton.jit
def _weight_tile(
    dy,
    x,
    skip,
    workspace,
    problem,
    tile,
    height,
    width,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    COTANGENT_GATHER: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk's partial sums for one tap, BLOCK_M channels of one source and BLOCK_N out channels.

    Reads the chunk's pixels of those channels once, ``BLOCK_K`` at a time.
    """
    channels = read_number(problem, _CHANNELS, PROBLEMS, VECTOR_IN)
    out_channels = read_number(problem, _OUT_CHANNELS, PROBLEMS, VECTOR_OUT)
    chunk, tap, channel, out, absent_channels, absent_out = _weights_of_tile(
        problem, tile, PROBLEMS, KERNEL, VECTOR_IN, VECTOR_OUT, BLOCK_M, BLOCK_N
    )
    shift_row, shift_column = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
    source = x
    if skip is not None:
        if read_number(problem, _ORIGIN, PROBLEMS) == 1:
            source = skip
    chunk_rows = read_number(problem, _CHUNK, PROBLEMS)
    first_row = chunk * chunk_rows
    rows = tl.minimum(read_number(problem, _ROWS, PROBLEMS) - first_row, chunk_rows)
    source += read_offset(problem, _SOURCE, PROBLEMS, VECTOR_IN)
    source = first_value(source, first_row, height, width, channels, GATHER)
    dy += read_offset(problem, _COTANGENT, PROBLEMS, VECTOR_OUT)
    dy = first_value(dy, first_row, height, width, out_channels, COTANGENT_GATHER)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k = tl.arange(0, BLOCK_K)
    pixel = first_row % (height * width) + k
    image, row, column = pixel // (height * width), pixel // width % height, pixel % width
    for start in tl.range(0, rows, BLOCK_K, num_stages=STAGES):
        live = k < rows - start
        inside = live
        if KERNEL > 1:
            inside = live & in_range(row + shift_row, height) & in_range(column + shift_column, width)
        absent, absent_inside = tl.where(live, 0, 1), tl.where(inside, 0, 1)
        a = gather(
            source,
            start,
            k,
            image,
            row,
            column,
            absent_inside,
            shift_row,
            shift_column,
            channel,
            absent_channels,
            height,
            width,
            channels,
            GATHER,
        )
        b = gather(
            dy,
            start,
            k,
            image,
            row,
            column,
            absent,
            0,
            0,
            out,
            absent_out,
            height,
            width,
            out_channels,
            COTANGENT_GATHER,
        )
        image, row, column = _advance(image, row, column, BLOCK_K, height, width)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)

    # Behind the loop, all this is read from the table again, so that the loop has the registers.
    chunk, tap, channel, out, absent_channels, absent_out = _weights_of_tile(
        problem, tile, PROBLEMS, KERNEL, VECTOR_IN, VECTOR_OUT, BLOCK_M, BLOCK_N
    )
    in_channels = read_number(problem, _IN_CHANNELS, PROBLEMS, VECTOR_IN)
    workspace += read_offset(problem, _PARTIAL, PROBLEMS)
    workspace += chunk * read_offset(problem, _PARTIAL_STRIDE, PROBLEMS)
    offsets = (tap * in_channels + channel)[:, None] + (out * (KERNEL * KERNEL * in_channels))[None, :]
    tl.store(workspace + offsets, total, mask=both(absent_channels, absent_out))


@triton.jit
def _weights_of_tile(
    problem, tile, PROBLEMS: tl.constexpr, KERNEL: tl.constexpr, VECTOR_IN: tl.constexpr, VECTOR_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The chunk, the tap, the channels and the out channels of a tile, and 0 for those of them that there are."""
    out_tiles = read_number(problem, _OUT_TILES, PROBLEMS)
    channel_tiles = read_number(problem, _CHANNEL_TILES, PROBLEMS)
    out = tile % out_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tile // out_tiles % channel_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    absent_channels = tl.where(channel < read_number(problem, _CHANNELS, PROBLEMS, VECTOR_IN), 0, 1)
    absent_out = tl.where(out < read_number(problem, _OUT_CHANNELS, PROBLEMS, VECTOR_OUT), 0, 1)
    chunk_and_tap = tile // out_tiles // channel_tiles
    TAPS: tl.constexpr = KERNEL * KERNEL
    return chunk_and_tap // TAPS, chunk_and_tap % TAPS, channel, out, absent_channels, absent_out


@triton.jit
def _pixel_sums_tile(
    dy,
    workspace,
    problem,
    tile,
    PROBLEMS: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The sums of the cotangent over one chunk of pixels, for BLOCK_CHANNELS out channels."""
    out_channels = read_number(problem, _OUT_CHANNELS, PROBLEMS, VECTOR_OUT)
    out_tiles = read_number(problem, _OUT_TILES, PROBLEMS)
    chunk = tile // out_tiles
    out = tile % out_tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    chunk_rows = read_number(problem, _CHUNK, PROBLEMS)
    rows = tl.minimum(read_number(problem, _ROWS, PROBLEMS) - chunk * chunk_rows, chunk_rows)
    dy += (
        read_offset(problem, _COTANGENT, PROBLEMS, VECTOR_OUT)
        + (chunk * chunk_rows).to(tl.int64) * out_channels
    )
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        index = start + tl.arange(0, BLOCK_ROWS)
        mask = (index < rows)[:, None] & (out < out_channels)[None, :]
        total += tl.load(dy + ((index * out_channels)[:, None] + out[None, :]), mask=mask, other=0.0).to(
            tl.float32
        )
    partial = read_offset(problem, _PARTIAL, PROBLEMS) + chunk * read_offset(
        problem, _PARTIAL_STRIDE, PROBLEMS
    )
    tl.store(workspace + partial + out, tl.sum(total, axis=0), mask=out < out_channels)


@triton.jit(do_not_specialize=["tiles", "height", "width"])
def _grouped_conv2d_wgrad_kernel(
    dy,
    x,
    skip,
    workspace,
    table,
    tiles,
    height,
    width,
    PROBLEMS: tl.constexpr,
    KERNEL: tl.constexpr,
    GATHER: tl.constexpr,
    COTANGENT_GATHER: tl.constexpr,
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
    SUM_ROWS: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
):
    """A program owns every ``num_programs``-th tile of all stages' partial sums and writes each of them once.

    A tile is a chunk of pixels of one stage for one tap and a block of weights, or for a block of biases.
    """
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        problem, tile = find_problem(table, index, PROBLEMS)
        kind = read_number(problem, _KIND, PROBLEMS)
        if WIDE_M > 0:
            if kind == _WIDE:
                _weight_tile(
                    dy, x, skip, workspace, problem, tile, height, width,
                    PROBLEMS, KERNEL, GATHER, COTANGENT_GATHER, VECTOR_IN, VECTOR_OUT, PRECISION,
                    WIDE_M, WIDE_N, WIDE_K, WIDE_STAGES,
                )  # fmt: skip
        if NARROW_M > 0:
            if kind == _NARROW:
                _weight_tile(
                    dy, x, skip, workspace, problem, tile, height, width,
                    PROBLEMS, KERNEL, GATHER, COTANGENT_GATHER, VECTOR_IN, VECTOR_OUT, PRECISION,
                    NARROW_M, NARROW_N, NARROW_K, NARROW_STAGES,
                )  # fmt: skip
        if SUM_ROWS > 0:
            if kind == _PIXEL_SUMS:
                _pixel_sums_tile(dy, workspace, problem, tile, PROBLEMS, VECTOR_OUT, SUM_ROWS, SUM_CHANNELS)


@triton.jit
def _sum_tile(
    workspace, gradient, problem, tile, PROBLEMS: tl.constexpr, BLOCK_TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of one gradient: the sum of their partial sums, BLOCK_TERMS at a time and then those together."""
    element = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = element < read_offset(problem, _SIZE, PROBLEMS)
    terms = read_number(problem, _TERMS, PROBLEMS)
    stride = read_offset(problem, _STRIDE, PROBLEMS)
    workspace += read_offset(problem, _SUM_PARTIAL, PROBLEMS)
    total = tl.zeros([BLOCK_TERMS, BLOCK], tl.float32)
    for start in range(0, terms, BLOCK_TERMS):
        term = start + tl.arange(0, BLOCK_TERMS)
        mask = (term < terms)[:, None] & live[None, :]
        total += tl.load(workspace + ((term * stride)[:, None] + element[None, :]), mask=mask, other=0.0)
    element += read_offset(problem, _RESULT, PROBLEMS)
    tl.store(gradient + element, tl.sum(total, axis=0).to(gradient.dtype.element_ty), mask=live)


@triton.jit
def _grouped_conv2d_sum_partials_kernel(
    workspace,
    dweight,
    dbias,
    dsample_bias,
    table,
    PROBLEMS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_BLOCK_TERMS: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
):
    """A program owns a block of one stage's gradient: it adds up the partial sums of each element in a fixed order.

    Reads each partial sum once and writes each element once; zeros for a stage without samples, which has no sums.
    """
    index = tl.program_id(0)
    problem, tile = find_problem(table, index, PROBLEMS)
    target = read_number(problem, _TARGET, PROBLEMS)
    if dweight is not None:
        if target == _TO_WEIGHT:
            _sum_tile(workspace, dweight, problem, tile, PROBLEMS, BLOCK_TERMS, BLOCK)
    if dbias is not None:
        if target == _TO_BIAS:
            _sum_tile(workspace, dbias, problem, tile, PROBLEMS, BIAS_BLOCK_TERMS, BIAS_BLOCK)
    if dsample_bias is not None:
        if target == _TO_SAMPLE_BIAS:
            _sum_tile(workspace, dsample_bias, problem, tile, PROBLEMS, BLOCK_TERMS, BLOCK)


def compilations(architecture: int) -> Iterator[Compilation]:
    """Every entry of the launch table; the resampling gathers, which are the same for all arithmetics, once."""
    for arithmetic in tuned.ARITHMETICS:
        cases = [(3, "none", "wide+narrow"), (3, "none", "unaligned")]
        if arithmetic == "half":
            cases += [(3, "up", "wide+narrow"), (3, "down", "wide+narrow"), (1, "up", "wide+narrow")]
        for case in cases:
            yield _compilation(tuned.wgrad(architecture, arithmetic), arithmetic, *case)
    for element in sorted(ITEMSIZES):
        gradients = dict.fromkeys(("dweight", "dbias", "dsample_bias"), element)
        yield Compilation(
            _grouped_conv2d_sum_partials_kernel,
            element,
            {"workspace": "fp32", **gradients, "table": "i64"},
            {"PROBLEMS": 4, **sum_constants(tuned.wgrad(architecture, "half").sums)},
        )


def _compilation(
    parameters: tuned.WgradParameters, arithmetic: str, kernel: int, resample: str, tiles: str
) -> Compilation:
    channels = (65 if tiles == "unaligned" else 64,)
    layout = Conv2dLayout((1,), channels, channels, channels, 2, 2, kernel, resample)
    element = ELEMENTS[arithmetic]
    constants = arithmetic_constants(layout, arithmetic, ITEMSIZES[element])
    parameters = parameters.for_vectors(constants["VECTOR_IN"], constants["VECTOR_OUT"])
    launch = parameters.launch(is_pooled(wgrad_modes(layout)))
    scalars = {"tiles": "scalar i32", "height": "scalar i32", "width": "scalar i32"}
    return Compilation(
        _grouped_conv2d_wgrad_kernel,
        f"{arithmetic} {kernel}x{kernel} {resample} {tiles}",
        dict.fromkeys(("dy", "x", "skip"), element) | {"workspace": "fp32", "table": "i64"} | scalars,
        {
            "PROBLEMS": 8,
            "KERNEL": kernel,
            **wgrad_modes(layout),
            **constants,
            **tile_constants(launch.wide, launch.narrow),
            "SUM_ROWS": parameters.sum_rows,
            "SUM_CHANNELS": parameters.sum_channels,
        },
        {
            "num_warps": launch.warps,
            **register_options(launch.warps, launch.programs_per_multiprocessor),
        },
        tensor_cores=arithmetic != "float32",
    )
