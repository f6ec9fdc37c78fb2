"""Kernels of GroupNorm with scale, shift and SiLU.

A program owns a block of whole groups of one sample and sweeps over its slab twice. The slabs in flight fit the L2
cache for the feature maps of diffusion U-Nets, so device memory sees one read and one write (two reads backward).
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from msd_kernels.layouts import GroupNormLayout
from msd_kernels.ops.group_norm import masks
from msd_kernels.ops.group_norm.triton import FIELDS, tile_constants
from msd_kernels.runtime import tuned
from msd_kernels.runtime.compilation import Compilation
from msd_kernels.runtime.table import find_problem

CHANNELS = tl.constexpr(FIELDS.index("channels"))
GROUPS = tl.constexpr(FIELDS.index("groups"))
GROUPS_PER_BLOCK = tl.constexpr(FIELDS.index("groups_per_block"))
SAMPLES = tl.constexpr(FIELDS.index("samples"))
OWN_CHANNELS = tl.constexpr(FIELDS.index("own_channels"))
X_OFFSET = tl.constexpr(FIELDS.index("x"))
OWN_OFFSET = tl.constexpr(FIELDS.index("own"))
SKIP_OFFSET = tl.constexpr(FIELDS.index("skip"))
SHIFT_1, SHIFT_2, SHIFT_3 = map(tl.constexpr, masks.SHIFTS)
FACTOR_1, FACTOR_2 = map(tl.constexpr, masks.FACTORS)
HIGH_FACTOR = tl.constexpr(masks.HIGH_FACTOR)
SAMPLE_OFFSET = tl.constexpr(FIELDS.index("per_sample"))
CHANNEL_OFFSET = tl.constexpr(FIELDS.index("per_channel"))
STATS_OFFSET = tl.constexpr(FIELDS.index("stats"))


@triton.jit
def _columns(
    table, pixels, skip,
    CHANNELS_LAST: tl.constexpr, PROBLEMS: tl.constexpr, BC: tl.constexpr, GB: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where the slab of this program lies: its columns (channels), their groups, and its offsets in every buffer.

    ``base`` and ``stride`` are the slab's in y and dy, and in x where that is the only source. ``sources`` has them for
    x and for skip, with the channels of x and those of the columns.
    Every channel count and every block's first channel is a multiple of ALIGN, which lets NHWC loads be wide.
    """
    field, tile = find_problem(table, tl.program_id(0), PROBLEMS)
    channels = tl.multiple_of(tl.load(field + CHANNELS * PROBLEMS), ALIGN)
    groups = tl.load(field + GROUPS * PROBLEMS)
    groups_per_block = tl.load(field + GROUPS_PER_BLOCK * PROBLEMS)
    blocks = tl.cdiv(groups, groups_per_block)
    sample = tile.to(tl.int64) // blocks
    first_group = tile % blocks * groups_per_block
    num_groups = tl.minimum(groups_per_block, groups - first_group)
    per_group = channels // groups
    column = tl.arange(0, BC)
    in_block = column < tl.multiple_of(num_groups * per_group, ALIGN)
    channel = tl.multiple_of(first_group * per_group, ALIGN) + column
    owner = tl.where(in_block, column // per_group, GB)  # the group of each column
    if CHANNELS_LAST:
        start = tl.multiple_of(tl.load(field + X_OFFSET * PROBLEMS), ALIGN)
        base = start + sample * pixels * channels + channel
        stride = channels
    else:
        base = tl.load(field + X_OFFSET * PROBLEMS) + (sample * channels + channel) * pixels
        stride = tl.full((), 1, tl.int64)
    if skip is None:
        sources = (base, stride, base, stride, channels, channel)
    else:
        own = tl.multiple_of(tl.load(field + OWN_CHANNELS * PROBLEMS), ALIGN)
        others = tl.multiple_of(channels - own, ALIGN)
        own_base = tl.multiple_of(tl.load(field + OWN_OFFSET * PROBLEMS), ALIGN) + sample * pixels * own
        skip_base = tl.multiple_of(tl.load(field + SKIP_OFFSET * PROBLEMS), ALIGN) + sample * pixels * others
        sources = (own_base + channel, own, skip_base + (channel - own), others, own, channel)
    per_sample = tl.load(field + SAMPLE_OFFSET * PROBLEMS) + sample * channels + channel
    per_channel = tl.load(field + CHANNEL_OFFSET * PROBLEMS) + channel
    stats = tl.load(field + STATS_OFFSET * PROBLEMS) + sample * groups + first_group
    return (base, stride, sources, column % per_group, in_block, owner, per_sample, per_channel, stats,
            num_groups, per_group)  # fmt: skip


@triton.jit
def _load(x, skip, sources, row, inside):
    """Rows of the columns, in float32, each from the source that has it."""
    own_base, own_stride, skip_base, skip_stride, own, channel = sources
    own_index = own_base[None, :] + row[:, None] * own_stride
    if skip is None:
        values = tl.load(x + own_index, mask=inside, other=0).to(tl.float32)
    else:
        is_own = (channel < own)[None, :]
        skip_index = skip_base[None, :] + row[:, None] * skip_stride
        first = tl.load(x + own_index, mask=inside & is_own, other=0).to(tl.float32)
        second = tl.load(skip + skip_index, mask=inside & (channel >= own)[None, :], other=0).to(tl.float32)
        values = tl.where(is_own, first, second)
    return values


@triton.jit
def _store(dx, dskip, skip, sources, row, inside, values):
    """Writes rows of the columns where :func:`_load` finds them, but for a source whose gradient is not wanted."""
    own_base, own_stride, skip_base, skip_stride, own, channel = sources
    own_index = own_base[None, :] + row[:, None] * own_stride
    if skip is None:
        tl.store(dx + own_index, values.to(dx.dtype.element_ty), mask=inside)
    else:
        if dx is not None:
            mask = inside & (channel < own)[None, :]
            tl.store(dx + own_index, values.to(dx.dtype.element_ty), mask=mask)
        if dskip is not None:
            skip_index = skip_base[None, :] + row[:, None] * skip_stride
            mask = inside & (channel >= own)[None, :]
            tl.store(dskip + skip_index, values.to(dskip.dtype.element_ty), mask=mask)


@triton.jit
def _affine(weight, bias, scale, shift, per_channel, per_sample, in_block):
    """``(weight, bias, 1 + scale, shift)`` of the columns, with 1 and 0 for what is absent."""
    zeros = tl.zeros(in_block.shape, tl.float32)
    w, b, gain, offset = zeros + 1, zeros, zeros + 1, zeros
    if weight is not None:
        w = tl.load(weight + per_channel, mask=in_block, other=0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + per_channel, mask=in_block, other=0).to(tl.float32)
    if scale is not None:
        gain = 1 + tl.load(scale + per_sample, mask=in_block, other=0).to(tl.float32)
    if shift is not None:
        offset = tl.load(shift + per_sample, mask=in_block, other=0).to(tl.float32)
    return w, b, gain, offset


@triton.jit
def _mixed(number):
    """Modulo 2³²."""
    number ^= number >> SHIFT_1
    number = tl.mul(number, tl.full((), FACTOR_1, tl.uint32), sanitize_overflow=False)
    number ^= number >> SHIFT_2
    number = tl.mul(number, tl.full((), FACTOR_2, tl.uint32), sanitize_overflow=False)
    return number ^ (number >> SHIFT_3)


@triton.jit
def _dropped(values, index, seed, levels, factor):
    """Values at places of y behind the dropout, as ``masks.py`` defines it."""
    key = tl.load(seed)
    high = tl.mul((index >> 32).to(tl.uint32), tl.full((), HIGH_FACTOR, tl.uint32), sanitize_overflow=False)
    number = tl.add(index.to(tl.uint32), high, sanitize_overflow=False)
    number = _mixed(tl.add(number, key.to(tl.uint32), sanitize_overflow=False))
    number = _mixed(number ^ (key >> 32).to(tl.uint32))
    return tl.where((number >> 8).to(tl.int32) >= levels, values * factor, 0.0)


@triton.jit
def _element(x, skip, sources, away, pixel, in_block, step):
    """A pixel of the channels that are ``away`` from the columns, in float32."""
    own_base, own_stride, skip_base, skip_stride, own, channel = sources
    own_index = own_base + away * step + pixel * own_stride
    if skip is None:
        values = tl.load(x + own_index, mask=in_block, other=0).to(tl.float32)
    else:
        is_own = channel + away < own
        first = tl.load(x + own_index, mask=in_block & is_own, other=0).to(tl.float32)
        skip_index = skip_base + away * step + pixel * skip_stride
        second = tl.load(skip + skip_index, mask=in_block & (channel + away >= own), other=0).to(tl.float32)
        values = tl.where(is_own, first, second)
    return values


@triton.jit
def _pivots(x, skip, sources, of_group, in_block, pixels, per_group, CHANNELS_LAST: tl.constexpr):
    """What each column's sums are relative to: the median of three elements of its group, as one may be an outlier.

    The columns are ``of_group`` behind the first one of their group.
    """
    step = 1 if CHANNELS_LAST else pixels
    a = _element(x, skip, sources, -of_group, pixels // 4, in_block, step)
    b = _element(x, skip, sources, per_group // 2 - of_group, pixels // 2, in_block, step)
    c = _element(x, skip, sources, per_group - 1 - of_group, pixels - 1 - pixels // 4, in_block, step)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _to_columns(per_group_values, owner):
    """A value per group at every column of the group."""
    member = owner[:, None] == tl.arange(0, per_group_values.shape[0])[None, :]
    return tl.sum(tl.where(member, per_group_values[None, :], 0.0), axis=1)


@triton.jit
def _to_groups(per_column_values, owner, GB: tl.constexpr):
    """The sum over each group's columns."""
    member = owner[:, None] == tl.arange(0, GB)[None, :]
    return tl.sum(tl.where(member, per_column_values[:, None], 0.0), axis=0)


@triton.jit
def _group_norm_forward_kernel(
    x, skip, weight, bias, scale, shift, seed, y, mean, rstd, table, pixels, eps, levels, factor,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, GB: tl.constexpr,
    PROBLEMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program: all pixels of one sample's block of groups.

    Reads the slab for the statistics, reads it again, writes ``y`` once, ``mean`` and ``rstd`` once per group.
    Sums are of differences to an element of the group, so that a large mean costs no digits; tiles are merged by
    Chan's update, per column, then per group.
    """
    (
        base,
        stride,
        sources,
        of_group,
        in_block,
        owner,
        per_sample,
        per_channel,
        stats,
        num_groups,
        per_group,
    ) = _columns(table, pixels, skip, CHANNELS_LAST, PROBLEMS, BC, GB, ALIGN)
    pivot = _pivots(x, skip, sources, of_group, in_block, pixels, per_group, CHANNELS_LAST)
    column_mean = tl.zeros([BC], tl.float32)
    column_m2 = tl.zeros([BC], tl.float32)
    seen = 0.0
    for start in range(0, pixels, BP):
        row = start + tl.arange(0, BP)
        inside = (row < pixels)[:, None] & in_block[None, :]
        tile = _load(x, skip, sources, row, inside)
        tile = tl.where(inside, tile - pivot[None, :], 0.0)
        rows = tl.minimum(pixels - start, BP).to(tl.float32)
        tile_mean = tl.sum(tile, axis=0) / rows
        centred = tl.where(inside, tile - tile_mean[None, :], 0.0)
        delta = tile_mean - column_mean
        total = seen + rows
        column_mean += delta * (rows / total)
        column_m2 += tl.sum(centred * centred, axis=0) + delta * delta * (seen * rows / total)
        seen = total
    group_mean = _to_groups(column_mean, owner, GB) / per_group
    mu = _to_columns(group_mean, owner)
    between = tl.where(in_block, column_mean - mu, 0.0)
    variance = _to_groups(column_m2 + seen * between * between, owner, GB) / (per_group * seen)
    # Where squares overflowed, the variance is infinite; its rstd of 0 would hide that.
    group_rstd = 1.0 / tl.sqrt(variance + eps) + (variance - variance)
    group_pivot = _to_groups(tl.where(of_group == 0, pivot, 0.0), owner, GB)
    group = tl.arange(0, GB)
    tl.store(mean + stats + group, group_pivot + group_mean, mask=group < num_groups)
    tl.store(rstd + stats + group, group_rstd, mask=group < num_groups)
    w, b, gain, offset = _affine(weight, bias, scale, shift, per_channel, per_sample, in_block)
    slope = _to_columns(group_rstd, owner) * w * gain
    constant = b * gain + offset
    for start in range(0, pixels, BP):
        row = start + tl.arange(0, BP)
        inside = (row < pixels)[:, None] & in_block[None, :]
        tile = _load(x, skip, sources, row, inside)
        z = (tile - pivot[None, :] - mu[None, :]) * slope[None, :] + constant[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        index = base[None, :] + row[:, None] * stride
        if seed is not None:
            z = _dropped(z, index, seed, levels, factor)
        tl.store(y + index, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _cotangent(tile, dy, index, inside, mu, r, w, b, gain, offset, seed, levels, factor, SILU: tl.constexpr):
    """``(x_hat, dz)`` of a tile: the normalised input, and the cotangent in front of the activation."""
    x_hat = (tile - mu[None, :]) * r[None, :]
    dz = tl.load(dy + index, mask=inside, other=0).to(tl.float32)
    if seed is not None:
        dz = _dropped(dz, index, seed, levels, factor)
    if SILU:
        z = (x_hat * w[None, :] + b[None, :]) * gain[None, :] + offset[None, :]
        sigmoid = tl.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    return tl.where(inside, x_hat, 0.0), dz


@triton.jit
def _group_norm_backward_kernel(
    dy, x, skip, mean, rstd, weight, bias, scale, shift, seed, dx, dskip, dscale, dshift, dweight_parts, dbias_parts,
    table, pixels, levels, factor,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, GB: tl.constexpr,
    PROBLEMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program: all pixels of one sample's block of groups, as in the forward.

    Reads ``x`` and ``dy`` for the sums P = Σ dz and Q = Σ dz·x_hat of every column, writes the gradients of scale
    and shift and this sample's parts of those of weight and bias; reads both again and writes ``dx`` once::

        dx = rstd · (A·dz − mean_group(A·P) − x_hat · mean_group(A·Q)),  A = weight · (1 + scale)
    """
    (
        base,
        stride,
        sources,
        _of_group,
        in_block,
        owner,
        per_sample,
        per_channel,
        stats,
        _num_groups,
        per_group,
    ) = _columns(table, pixels, skip, CHANNELS_LAST, PROBLEMS, BC, GB, ALIGN)
    mu = tl.load(mean + stats + owner, mask=in_block, other=0)
    r = tl.load(rstd + stats + owner, mask=in_block, other=0)
    w, b, gain, offset = _affine(weight, bias, scale, shift, per_channel, per_sample, in_block)
    p = tl.zeros([BC], tl.float32)
    q = tl.zeros([BC], tl.float32)
    for start in range(0, pixels, BP):
        row = start + tl.arange(0, BP)
        inside = (row < pixels)[:, None] & in_block[None, :]
        tile = _load(x, skip, sources, row, inside)
        index = base[None, :] + row[:, None] * stride
        x_hat, dz = _cotangent(tile, dy, index, inside, mu, r, w, b, gain, offset, seed, levels, factor, SILU)
        p += tl.sum(dz, axis=0)
        q += tl.sum(dz * x_hat, axis=0)
    if dshift is not None:
        tl.store(dshift + per_sample, p.to(dshift.dtype.element_ty), mask=in_block)
    if dscale is not None:
        tl.store(dscale + per_sample, (w * q + b * p).to(dscale.dtype.element_ty), mask=in_block)
    if dweight_parts is not None:
        tl.store(dweight_parts + per_sample, gain * q, mask=in_block)
    if dbias_parts is not None:
        tl.store(dbias_parts + per_sample, gain * p, mask=in_block)
    if dx is not None or dskip is not None:
        size = per_group.to(tl.float32) * pixels
        a = w * gain
        mean_p = _to_columns(_to_groups(a * p, owner, GB) / size, owner)
        mean_q = _to_columns(_to_groups(a * q, owner, GB) / size, owner)
        for start in range(0, pixels, BP):
            row = start + tl.arange(0, BP)
            inside = (row < pixels)[:, None] & in_block[None, :]
            tile = _load(x, skip, sources, row, inside)
            index = base[None, :] + row[:, None] * stride
            x_hat, dz = _cotangent(
                tile, dy, index, inside, mu, r, w, b, gain, offset, seed, levels, factor, SILU
            )
            d = r[None, :] * (a[None, :] * dz - mean_p[None, :] - x_hat * mean_q[None, :])
            _store(dx, dskip, skip, sources, row, inside, d)


@triton.jit
def _group_norm_parameters_kernel(
    dweight_parts, dbias_parts, dweight, dbias, table, PROBLEMS: tl.constexpr, BC: tl.constexpr
):
    """One program: BC channels of one stage. Sums the samples' parts in order; an empty stage gets zeros."""
    field, tile = find_problem(table, tl.program_id(0), PROBLEMS)
    channels = tl.load(field + CHANNELS * PROBLEMS)
    channel = tile.to(tl.int64) * BC + tl.arange(0, BC)
    inside = channel < channels
    part = tl.load(field + SAMPLE_OFFSET * PROBLEMS) + channel
    weight_sum = tl.zeros([BC], tl.float32)
    bias_sum = tl.zeros([BC], tl.float32)
    for _ in range(tl.load(field + SAMPLES * PROBLEMS).to(tl.int32)):
        if dweight is not None:
            weight_sum += tl.load(dweight_parts + part, mask=inside, other=0)
        if dbias is not None:
            bias_sum += tl.load(dbias_parts + part, mask=inside, other=0)
        part += channels
    out = tl.load(field + CHANNEL_OFFSET * PROBLEMS) + channel
    if dweight is not None:
        tl.store(dweight + out, weight_sum.to(dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + out, bias_sum.to(dbias.dtype.element_ty), mask=inside)


# (channels, those of the skip, groups) per stage: EDM's three decoders, without the skip and with it, and the widest
# groups of any use. Two sources are NHWC alone.
LAYOUTS = {
    "384/256/32": ((384, 256, 32), (0, 0, 0), (16, 16, 8)),
    "384+256/256+256/32+256": ((384, 256, 32), (256, 256, 256), (16, 16, 16)),
    "2048": ((2048,), (0,), (32,)),
    "3": ((3,), (0,), (1,)),
}
WITH_DROPOUT = "384/256/32"
SPATIAL = 1024
POINTERS = {
    "forward": ("x", "y", "scale", "shift"),
    "backward": ("dy", "x", "scale", "shift", "dx", "dscale", "dshift"),
}
SECOND = {"forward": ("skip",), "backward": ("skip", "dskip")}
FLOAT32 = ("weight", "bias", "mean", "rstd", "dweight", "dbias", "dweight_parts", "dbias_parts")


def compilations(architecture: int) -> Iterator[Compilation]:
    """Forward and backward for typical layouts in both memory formats, and the sums over samples."""
    kernels = {"forward": _group_norm_forward_kernel, "backward": _group_norm_backward_kernel}
    shared = {**dict.fromkeys(FLOAT32, "fp32"), "table": "i64", "pixels": "scalar i32", "eps": "scalar fp32"}
    shared |= {"levels": "scalar i32", "factor": "scalar fp32"}
    for dtype in ("bf16", "fp32"):
        for name, (channels, skip_channels, groups) in LAYOUTS.items():
            for channels_last in (True, False):
                ones = (1,) * len(channels)
                layout = GroupNormLayout(
                    ones, channels, skip_channels, groups, SPATIAL, channels_last, 0.0, True
                )
                layout = layout if channels_last else layout.joined
                constants = tile_constants(layout, tuned.group_norm(architecture))
                options = {"num_warps": constants.pop("num_warps")}
                drops = dtype == "bf16" and channels_last and name == WITH_DROPOUT
                for (direction, kernel), seed in product(
                    kernels.items(), (None, "i64") if drops else (None,)
                ):
                    pointers = (*POINTERS[direction], *(SECOND[direction] if layout.has_skip else ()))
                    arguments = {**shared, **dict.fromkeys(pointers, dtype), "seed": seed}
                    yield Compilation(
                        kernel,
                        f"{dtype} {name} {'nhwc' if channels_last else 'nchw'}{' dropout' if seed else ''}",
                        {k: v for k, v in arguments.items() if k in kernel.arg_names},
                        {**constants, "SILU": True, "PROBLEMS": 4},
                        options,
                    )
    kernel = _group_norm_parameters_kernel
    arguments = {k: v for k, v in shared.items() if k in kernel.arg_names}
    yield Compilation(kernel, "float32 sums", arguments, {"PROBLEMS": 4, "BC": 64})
