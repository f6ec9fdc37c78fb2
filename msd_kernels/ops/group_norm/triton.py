"""GroupNorm with scale, shift and SiLU in Triton: one launch for all stages, dense NHWC, NCHW or packed.

The kernels are imported with the first call, so that this module needs no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Affine, GroupNormLayout
from msd_kernels.ops.group_norm import masks
from msd_kernels.runtime import tuned
from msd_kernels.runtime.launch import cannot_run, launch, slower_than_others
from msd_kernels.runtime.plan_cache import Table, Tables, cached_plan

FIELDS = (
    "first_tile",  # programs of the stages before this one
    "channels",  # of both sources
    "own_channels",  # those of x
    "groups",
    "groups_per_block",  # groups that one program owns
    "samples",
    "x",  # first element in y and dy, and in x and dx where there is one source
    "own",  # first element in x and dx
    "skip",  # first element in skip and dskip
    "per_sample",  # first element in scale, shift and their gradients
    "per_channel",  # first element in weight, bias and their gradients
    "stats",  # first element in mean and rstd
)

MAX_COLUMNS = 4096  # widest block of channels
VECTOR = 8  # channels of a 16-byte load in 16 bits


class Plan(NamedTuple):
    """What the launches need besides the data.

    Attributes:
        blocks: one tile per sample and block of groups.
        parameters: one tile per block of channels, also for stages without samples.
        constants: the kernels' constexprs and warps.
    """

    blocks: Table
    parameters: Table
    constants: dict[str, int]


def cannot(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    widest = call.layout.widest_group
    if widest > MAX_COLUMNS:
        return f"takes up to {MAX_COLUMNS} channels per group, got {widest}"
    return cannot_run(call.device.type, call.dtype)


def slower(call: Call) -> str | None:
    """Why another backend is preferred, or None."""
    return slower_than_others(call.device.type)


@cached_plan
def plan(layout: GroupNormLayout, device: torch.device) -> Callable[[Sequence[int]], Plan]:
    """The tables of one layout's sizes."""
    parameters = tuned.group_norm(tuned.architecture_of(device))
    stages = _stages(layout, _groups_per_block(layout, parameters))
    constants = tile_constants(layout, parameters)
    columns = constants["BC"]
    per_sample = [{**s, "tiles": s["samples"] * -(-s["groups"] // s["groups_per_block"])} for s in stages]
    per_channel = [{**s, "tiles": -(-s["channels"] // columns)} for s in stages]
    tables = Tables((per_sample, FIELDS), (per_channel, FIELDS))
    return lambda counts: Plan(*tables.at(counts, device)[0], constants)


def tile_constants(layout: GroupNormLayout, parameters: tuned.GroupNormParameters) -> dict[str, int]:
    """The kernels' constexprs for a layout: a tile of BP pixels by BC channels that hold up to GB groups.

    Stages whose blocks fit ``parameters.block_channels`` have the same tile whatever other stages they are launched
    with, and so the same bits as alone.
    """
    per_block = _groups_per_block(layout, parameters)
    tile = parameters.tile if layout.channels_last else parameters.planar_tile
    blocks = [b * (c // g) for b, c, g in zip(per_block, layout.in_channels, layout.groups, strict=True)]
    columns = _power_of_two(max(parameters.block_channels if layout.channels_last else 1, *blocks))
    return {
        "CHANNELS_LAST": layout.channels_last,
        "BP": max(1, min(_power_of_two(layout.spatial), tile // columns)),
        "BC": columns,
        "GB": _power_of_two(max(per_block)),
        "ALIGN": math.gcd(8, *layout.channels, *layout.in_channels, *blocks),
        "num_warps": parameters.warps,
    }


def _groups_per_block(layout: GroupNormLayout, parameters: tuned.GroupNormParameters) -> list[int]:
    """Whole groups per program: one where each is contiguous (NCHW), else blocks that begin where wide loads can."""
    if not layout.channels_last:
        return [1] * len(layout.groups)
    most = parameters.block_channels
    return [_aligned_groups(c // g, g, most) for c, g in zip(layout.in_channels, layout.groups, strict=True)]


def _aligned_groups(width: int, groups: int, most: int) -> int:
    unit = VECTOR // math.gcd(VECTOR, width)
    if unit * width > 2 * most:
        return max(1, min(groups, most // width))
    return min(groups, max(unit, most // width // unit * unit))


def _stages(layout: GroupNormLayout, blocks: Sequence[int]) -> list[dict[str, int]]:
    """One row per stage: its sizes, the groups of its blocks, and where it starts in every buffer."""
    rows = []
    start = {"x": 0, "own": 0, "skip": 0, "per_sample": 0, "per_channel": 0, "stats": 0}
    stages = zip(layout.counts, layout.in_channels, layout.channels, layout.groups, blocks, strict=True)
    for n, c, own, g, b in stages:
        widths = {"channels": c, "own_channels": own, "groups": g, "groups_per_block": b}
        rows.append({**widths, "samples": n, **start})
        maps = {"x": n * c, "own": n * own, "skip": n * (c - own)}
        sizes = {name: size * layout.spatial for name, size in maps.items()}
        sizes |= {"per_sample": n * c, "per_channel": c, "stats": n * g}
        start = {name: begin + sizes[name] for name, begin in start.items()}
    return rows


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not under ``number``."""
    return 1 << (number - 1).bit_length()


def _of_dropout(layout: GroupNormLayout) -> tuple[int, float]:
    """The levels that drop an element, and the factor of the others."""
    return masks.dropped_levels(layout.dropout), masks.kept_factor(layout.dropout)


@cache
def _kernels() -> ModuleType:
    return import_module("msd_kernels.ops.group_norm.kernels")


def group_norm(
    x: Tensor,
    skip: Tensor | None,
    affine: Affine,
    layout: GroupNormLayout,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`msd_kernels.group_norm`, and each group's mean and rstd, all flat."""
    y, mean, rstd = allocate.group_norm_outputs(x, layout)
    planned = plan(layout.sizes, x.device)
    blocks = planned.blocks
    if blocks.tiles:
        launch(
            _kernels()._group_norm_forward_kernel, blocks.tiles, x,
            x, skip, *affine, seed, y, mean, rstd, blocks.values, layout.spatial, layout.eps, *_of_dropout(layout),
            SILU=layout.silu, PROBLEMS=blocks.problems, **planned.constants,
        )  # fmt: skip
    return y, mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    affine: Affine,
    layout: GroupNormLayout,
    wanted: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, weight, bias, scale, shift)``, None where not wanted, in two launches."""
    gradients = allocate.gradients_like((x, skip, *affine), wanted)
    dx, dskip, dweight, dbias, dscale, dshift = gradients
    samples = sum(layout.sample_sizes)
    parts = [None if d is None else x.new_empty(samples, dtype=torch.float32) for d in (dweight, dbias)]
    planned = plan(layout.sizes, x.device)
    blocks, parameters = planned.blocks, planned.parameters
    if blocks.tiles:
        launch(
            _kernels()._group_norm_backward_kernel, blocks.tiles, x,
            dy, x, skip, mean, rstd, *affine, seed, dx, dskip, dscale, dshift, *parts, blocks.values, layout.spatial,
            *_of_dropout(layout),
            SILU=layout.silu, PROBLEMS=blocks.problems, **planned.constants,
        )  # fmt: skip
    if dweight is not None or dbias is not None:
        launch(
            _kernels()._group_norm_parameters_kernel, parameters.tiles, x,
            *parts, dweight, dbias, parameters.values, PROBLEMS=parameters.problems, BC=planned.constants["BC"],
        )  # fmt: skip
    return gradients
