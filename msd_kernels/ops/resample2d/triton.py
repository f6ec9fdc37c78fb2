"""FIR resampling in Triton: one launch for all stages, dense NHWC, NCHW or packed, in either direction.

The kernel is imported with the first call, so that this module needs no Triton.
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

from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Resample2dLayout
from msd_kernels.runtime import tuned
from msd_kernels.runtime.formulas import compiled
from msd_kernels.runtime.launch import cannot_run, launch, multiprocessors, slower_than_others
from msd_kernels.runtime.plan_cache import Table, Tables, cached_plan

FIELDS = (
    "first_tile",  # programs of the stages before this one
    "channels",
    "x",  # first element in x
    "y",  # first element in y
)

VECTOR = 8  # elements of a 16-byte load in 16 bits
WARP_SIZE = 32
INTERPRETED_ROWS = 2
MAX_ROW = 2**31 - 2**20  # offsets inside one row are 32-bit


class Plan(NamedTuple):
    """What a launch needs besides the data.

    Attributes:
        tiles: one tile per sample, block of output rows, columns and channels.
        rows: output rows of a tile.
        constants: constexprs and warps.
    """

    tiles: Table
    rows: int
    constants: dict[str, int]


def cannot(call: Call) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return cannot_run(call.device.type, call.dtype)


def slower(call: Call) -> str | None:
    """Why another backend is preferred, or None."""
    return slower_than_others(call.device.type)


def tile_constants(layout: Resample2dLayout, parameters: tuned.ResampleParameters) -> dict[str, int]:
    """The kernel's constexprs for a layout: a tile of BX columns by BC channels.

    Every stage's channel count is a multiple of ALIGN, which lets NHWC loads be wide.
    """
    channels, out_width, channels_last = layout.channels, layout.out_width, layout.channels_last
    threads = parameters.threads
    per_thread = parameters.elements if channels_last else parameters.planar_elements
    if channels_last:
        block_channels = min(_power_of_two(max(channels)), parameters.block_channels)
        block_columns = min(_power_of_two(out_width), threads * per_thread // block_channels)
    else:
        block_columns = min(_power_of_two(out_width), threads)
        block_channels = min(_power_of_two(max(channels)), threads * per_thread // block_columns)
    return {
        "CHANNELS_LAST": channels_last,
        "BX": block_columns,
        "BC": block_channels,
        "ALIGN": math.gcd(VECTOR, *channels),
        "num_warps": max(1, block_columns * block_channels // (WARP_SIZE * per_thread)),
    }


@cached_plan
def plan(layout: Resample2dLayout, device: torch.device) -> Callable[[Sequence[int]], Plan]:
    """The table of one layout."""
    row_elements = max(layout.width, layout.out_width) * max(layout.channels)
    if row_elements > MAX_ROW:
        raise ValueError(f"resample2d: rows of up to {MAX_ROW} elements can be offset, got {row_elements}")
    parameters = tuned.resample2d(tuned.architecture_of(device))
    constants = tile_constants(layout, parameters)
    columns = _ceil_div(layout.out_width, constants["BX"])
    stages = list(zip(layout.counts, layout.channels, strict=True))
    slabs = [n * columns * _ceil_div(c, constants["BC"]) for n, c in stages]
    all_slabs = compiled([sum(slabs)])
    problems, start = [], {"x": 0, "y": 0}
    for n, c in stages:
        problems.append({"channels": c, **start})
        x_size = n * c * layout.height * layout.width
        y_size = n * c * layout.out_height * layout.out_width
        start = {"x": start["x"] + x_size, "y": start["y"] + y_size}

    @cache
    def tables(rows: int) -> Tables:
        bands = _ceil_div(layout.out_height, rows)
        return Tables(
            ([{**p, "tiles": slab * bands} for p, slab in zip(problems, slabs, strict=True)], FIELDS)
        )

    def planned(counts: Sequence[int]) -> Plan:
        rows = _rows_of_tile(all_slabs(counts)[0], layout.out_height, parameters, device)
        return Plan(tables(rows).at(counts, device)[0][0], rows, constants)

    return planned


def _rows_of_tile(
    slabs: int, out_height: int, parameters: tuned.ResampleParameters, device: torch.device
) -> int:
    """As many as leave enough programs for the device."""
    if device.type != "cuda":
        return INTERPRETED_ROWS
    rows = parameters.rows
    wanted = parameters.programs_per_multiprocessor * multiprocessors(device)
    while rows > 1 and slabs * _ceil_div(out_height, rows) < wanted:
        rows //= 2
    return rows


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not under ``number``."""
    return 1 << (number - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _kernels() -> ModuleType:
    return import_module("msd_kernels.ops.resample2d.kernels")


def resample2d(x: Tensor, layout: Resample2dLayout) -> Tensor:
    """The flat output of :func:`msd_kernels.resample2d`."""
    y = x.new_empty(layout.out_elements)
    made = plan(layout.sizes, x.device)
    if made.tiles.tiles:
        launch(
            _kernels()._resample2d_kernel, made.tiles.tiles, x,
            x, y, made.tiles.values, layout.height, layout.width, layout.out_height, layout.out_width, made.rows,
            TAPS=layout.taps, UPWARD=layout.upward, STRIDE=layout.stride,
            PROBLEMS=made.tiles.problems, **made.constants,
        )  # fmt: skip
    return y
