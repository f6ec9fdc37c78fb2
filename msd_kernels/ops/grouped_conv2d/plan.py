"""Plans of the grouped kernels: what is per stage becomes one row of a small table that a launch reads.

One launch walks a list of tiles that is never written down: every row (a *problem*) owns a run of consecutive tile
numbers, rows with the longest tiles come first, and a program finds the row of its tile by comparing the tile with all
first tiles at once. So a plan holds one row per stage, whatever the batch size, and a small launch writes it on the
device. Stages without samples have no row. Everything here is arithmetic on shapes, which
needs no Triton and is done once for all counts (:mod:`msd_kernels.runtime.plan_cache`): those of the layouts here are
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import truediv

import torch

from msd_kernels.layouts import MEAN, SAME, SUM, Conv2dLayout, starts
from msd_kernels.runtime.formulas import compiled, maximum, minimum
from msd_kernels.runtime.launch import multiprocessors
from msd_kernels.runtime.plan_cache import Tables
from msd_kernels.runtime.tuned import Launch, ProductParameters, SumParameters, Tile, WgradParameters

# Columns of the tables. The kernels take their field numbers from here.
PRODUCT_FIELDS = (
    "first_tile",  # tiles of the rows before this one
    "narrow",  # 1: in narrow tiles
    "column_tiles",  # tiles side by side
    "rows",  # pixels of the result
    "columns",  # channels of the result
    "channels",  # channels of the first source
    "skip_channels",  # channels of the second source
    "source",  # first element in the first source
    "skip",  # first element in the second source
    "weight",  # first element of the weight, at tap 0
    "in_channels",  # the weight's distance between taps
    "result",  # first element in the result
    "target",  # which result: 0 of x, 1 of skip
    "bias",  # first element in the bias
    "sample_bias",  # first element in the bias per sample
)
WGRAD_FIELDS = (
    "first_tile",
    "kind",  # 0: weight gradient in wide tiles, 1: in narrow tiles, 2: sums over pixels
    "out_tiles",  # tiles side by side over the out channels
    "channel_tiles",  # tiles over the source's channels
    "rows",  # pixels
    "channels",  # channels of the source
    "out_channels",
    "source",  # first element in the source
    "origin",  # which source: 0 x, 1 skip
    "cotangent",  # first element in the cotangent
    "chunk",  # pixels per partial sum
    "partial",  # first element in the workspace
    "partial_stride",  # elements between partial sums
    "in_channels",
)
SUM_FIELDS = (
    "first_tile",
    "terms",  # partial sums to add up
    "stride",  # elements between them
    "size",  # elements of the result
    "partial",  # first element in the workspace
    "result",  # first element of the result
    "target",  # which result: 0 weight, 1 bias, 2 sample_bias
)
WIDE, NARROW, PIXEL_SUMS = range(3)

# Pixels per partial sum of the bias gradient where nobody asks for the sums per sample.
SUM_CHUNK = 1024
TO_WEIGHT, TO_BIAS, TO_SAMPLE_BIAS = range(3)
# Tiles that a weight gradient is cut into at least, if there are pixels enough: several waves of any GPU.
WGRAD_TILES = 1024
WGRAD_MIN_CHUNK = 512
# Offsets inside one stage's weight, one image and one chunk of pixels are 32-bit, and so are numbers of pixels.
MAX_LOCAL = 2**31 - 2**24
# The taps inside of an image are bits of one number.
MAX_KERNEL = 15
# A vector is 16 bytes; channel counts that it divides make every load of a slice 16 bytes wide.
VECTOR_BYTES = 16
NO_TILE = Tile(0, 0, 0, 0)


@dataclass(frozen=True)
class ProductPlan:
    """A launch of the forward or of the input gradients: its table, and the tiles that its kernel is compiled for."""

    tables: Tables
    wide: Tile | None
    narrow: Tile | None
    warps: int
    programs_per_multiprocessor: int


class ProductPlans:
    """The launches that serve some counts of a layout each.

    Args:
        problems: without what depends on the launch.
        pixels: rows per sample.
    """

    def __init__(
        self,
        problems: list[dict],
        pixels: int,
        parameters: ProductParameters,
        modes: dict[str, int],
        device: torch.device,
    ) -> None:
        self._problems, self._pixels, self._device = problems, pixels, device
        self._short_rows = parameters.short.m
        depth = max((c for p in problems for c in (p["channels"], p.get("skip_channels", 0))), default=1)
        short, longer = (
            parameters.launches(rows, depth, is_pooled(modes), is_resampled(modes))
            for rows in (self._short_rows, self._short_rows + 1)
        )
        self._launches = [launch for launch, _ in (*short, *longer)]
        self._speeds = [speed for _, speed in longer]
        self._work = compiled([_work(problems, launch, device) for launch, _ in longer])

    def choose(self, counts: Sequence[int]) -> int:
        """Which launch takes the least time."""
        if max(counts) * self._pixels <= self._short_rows:
            return 0
        if len(self._speeds) == 1:
            return 1
        times = list(map(truediv, self._work(counts), self._speeds))
        return 1 + times.index(min(times))

    def plan(self, choice: int) -> ProductPlan:
        launch = self._launches[choice]
        problems = []
        for problem in self._problems:
            narrow = _is_narrow(problem, launch)
            tile = launch.narrow if narrow else launch.wide
            columns = _ceil(problem["columns"], tile.n)
            tiles = _ceil(problem["rows"], tile.m) * columns
            problems.append({**problem, "narrow": int(narrow), "column_tiles": columns, "tiles": tiles})
        problems.sort(key=lambda p: (p["narrow"], -p["channels"] - p.get("skip_channels", 0)))
        return ProductPlan(
            Tables((problems, PRODUCT_FIELDS)),
            launch.wide if any(not p["narrow"] for p in problems) else None,
            launch.narrow if any(p["narrow"] for p in problems) else None,
            launch.warps,
            launch.programs_per_multiprocessor,
        )


@dataclass(frozen=True)
class WgradPlan:
    """The two launches of the weight and bias gradients: the tables of the partial sums and of their sums, together
    with the size of the float32 workspace between them.
    """

    tables: Tables
    wide: Tile | None
    narrow: Tile | None
    pixel_sums: bool


def forward_modes(layout: Conv2dLayout) -> dict[str, int]:
    """Constants of the forward kernel that follow from the resampling."""
    return {"GATHER": layout.source_gather, "REPEAT": layout.convolves_first}


def dgrad_modes(layout: Conv2dLayout) -> dict[str, int]:
    """Of the input gradients' kernel."""
    return {"GATHER": SUM if layout.resample == "up" else SAME, "REPEAT": layout.resample == "down"}


def wgrad_modes(layout: Conv2dLayout) -> dict[str, int]:
    """Of the weight gradients' kernel."""
    return {"GATHER": layout.source_gather, "COTANGENT_GATHER": SUM if layout.convolves_first else SAME}


def vector(itemsize: int, channels: Sequence[int]) -> int:
    """Elements per load along the channels: 16 bytes' worth if that divides every channel count, else 1."""
    elements = VECTOR_BYTES // itemsize
    return elements if all(c % elements == 0 for c in channels) else 1


def arithmetic_constants(layout: Conv2dLayout, arithmetic: str, itemsize: int) -> dict[str, int | str]:
    """Constants of all kernels that follow from the dtype and from what divides the channel counts."""
    return {
        "VECTOR_IN": vector(itemsize, (*layout.channels, *layout.skip_channels)),
        "VECTOR_OUT": vector(itemsize, layout.out_channels),
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
    }


def sum_constants(parameters: SumParameters) -> dict[str, int]:
    """Constants of the kernel that adds up partial sums."""
    names = ("BLOCK_TERMS", "BLOCK", "BIAS_BLOCK_TERMS", "BIAS_BLOCK")
    return dict(zip(names, parameters, strict=True))


def tile_constants(wide: Tile | None, narrow: Tile | None) -> dict[str, int]:
    """Constants of all kernels that say which tiles a launch has; zeros for none."""
    return {
        f"{kind}_{side}": value
        for kind, tile in (("WIDE", wide), ("NARROW", narrow))
        for side, value in zip(("M", "N", "K", "STAGES"), astuple(tile or NO_TILE), strict=True)
    }


def forward_plans(layout: Conv2dLayout, parameters: ProductParameters, device: torch.device) -> ProductPlans:
    """Rows: pixels of the grid. Columns: out channels. Depth: taps × both sources' channels."""
    rows = math.prod(layout.grid)
    sources = (
        layout.offsets(layout.channels, layout.in_pixels),
        layout.offsets(layout.skip_channels, layout.in_pixels),
    )
    results = layout.offsets(layout.out_channels, layout.out_pixels)
    weights, biases = starts(layout.weight_sizes), starts(layout.out_channels)
    samples = layout.offsets(layout.out_channels, 1)
    problems = [
        {
            "rows": layout.counts[s] * rows,
            "columns": layout.out_channels[s],
            "channels": layout.channels[s],
            "skip_channels": layout.skip_channels[s],
            "source": sources[0][s],
            "skip": sources[1][s],
            "weight": weights[s],
            "in_channels": layout.in_channels[s],
            "result": results[s],
            "bias": biases[s],
            "sample_bias": samples[s],
        }
        for s in layout.stages
    ]
    return ProductPlans(problems, rows, parameters, forward_modes(layout), device)


def dgrad_plans(
    layout: Conv2dLayout, wanted: tuple[bool, bool], parameters: ProductParameters, device: torch.device
) -> ProductPlans:
    """Rows: pixels of the source grid. Columns: the source's channels. Depth: taps × out channels."""
    rows = math.prod(layout.source_grid)
    cotangents, weights = layout.offsets(layout.out_channels, layout.out_pixels), starts(layout.weight_sizes)
    problems = []
    for target, widths in enumerate((layout.channels, layout.skip_channels)):
        results = layout.offsets(widths, layout.in_pixels)
        problems += [
            {
                "rows": layout.counts[s] * rows,
                "columns": widths[s],
                "channels": layout.out_channels[s],
                "source": cotangents[s],
                "weight": weights[s] + target * layout.channels[s],
                "in_channels": layout.in_channels[s],
                "result": results[s],
                "target": target,
            }
            for s in layout.stages
            if wanted[target] and widths[s]
        ]
    return ProductPlans(problems, rows, parameters, dgrad_modes(layout), device)


def is_pooled(modes: dict[str, int]) -> bool:
    """Whether a gather of these modes reads 2×2 pixels per value."""
    return not {MEAN, SUM}.isdisjoint((modes["GATHER"], modes.get("COTANGENT_GATHER")))


def is_resampled(modes: dict[str, int]) -> bool:
    """Whether a product of these modes reads or writes at other positions than those of its grid."""
    return modes["GATHER"] != SAME or bool(modes["REPEAT"])


def _is_narrow(problem: dict, launch: Launch) -> bool:
    return launch.narrow is not None and problem["columns"] <= launch.narrow.n


def _work(problems: list[dict], launch: Launch, device: torch.device) -> int:
    """How long the wide tiles of a launch take at a speed of 1, to compare launches: the rounds of the busiest program,
    each as long as its tile is large. That some problems are deeper than others changes all launches alike.
    """
    m, n = launch.wide.m, launch.wide.n
    tiles = sum(_ceil(p["rows"], m) * _ceil(p["columns"], n) for p in problems if not _is_narrow(p, launch))
    return _ceil(tiles, multiprocessors(device) * launch.programs_per_multiprocessor) * m * n


def wgrad_plan(
    layout: Conv2dLayout,
    wanted: tuple[bool, bool, bool],
    parameters: WgradParameters,
    device: torch.device,
) -> WgradPlan:
    """The partial sums over pixels, and their sums; ``wanted`` names weight, bias and sample_bias.

    The pixels are cut into chunks of one length, the same for all stages, that follows from the shapes alone.
    """
    want_weight, want_bias, want_sample_bias = wanted
    launch = parameters.launch(is_pooled(wgrad_modes(layout)))
    partials, sums = [], []
    workspace = _weight_gradients(layout, launch, parameters.sums, partials, sums) if want_weight else 0
    if want_bias or want_sample_bias:
        workspace = _bias_gradients(layout, wanted, parameters, partials, sums, workspace)
    kinds = {p["kind"] for p in partials}
    return WgradPlan(
        Tables(
            (sorted(partials, key=lambda p: p["kind"]), WGRAD_FIELDS),
            (sums, SUM_FIELDS),
            numbers=[workspace],
        ),
        launch.wide if WIDE in kinds else None,
        launch.narrow if NARROW in kinds else None,
        PIXEL_SUMS in kinds,
    )


def _weight_gradients(
    layout: Conv2dLayout, launch: Launch, blocks: SumParameters, partials: list, sums: list
) -> int:
    """Appends the problems of the weight gradients; returns the size of their workspace."""
    rows = [n * math.prod(layout.grid) for n in layout.counts]
    pieces = [
        _weight_tiles(layout, launch, s, origin)
        for s in layout.stages
        for origin, widths in enumerate((layout.channels, layout.skip_channels))
        if widths[s]
    ]
    work = sum(rows[p["stage"]] * p["per_chunk"] for p in pieces)
    widest = max(*layout.channels, *layout.skip_channels, *layout.out_channels)
    chunk = maximum(WGRAD_MIN_CHUNK, _ceil(work, WGRAD_TILES))
    chunk = _ceil(minimum(chunk, MAX_LOCAL // (8 * widest)), WGRAD_MIN_CHUNK) * WGRAD_MIN_CHUNK
    terms = [_ceil(r, chunk) for r in rows]
    workspaces = starts(t * size for t, size in zip(terms, layout.weight_sizes, strict=True))
    for piece in pieces:
        s = piece.pop("stage")
        partials.append(
            {
                **piece,
                "rows": rows[s],
                "chunk": chunk,
                "partial": workspaces[s] + piece["origin"] * layout.channels[s],
                "partial_stride": layout.weight_sizes[s],
                "tiles": piece["per_chunk"] * terms[s],
            }
        )
    results = starts(layout.weight_sizes)
    for s, size in enumerate(layout.weight_sizes):
        sums.append(_sum(blocks, terms[s], size, size, workspaces[s], results[s], target=TO_WEIGHT))
    return sum(t * size for t, size in zip(terms, layout.weight_sizes, strict=True))


def _weight_tiles(layout: Conv2dLayout, launch: Launch, stage: int, origin: int) -> dict:
    """One source of one stage: the part of a problem that does not depend on the chunks."""
    widths = (layout.channels, layout.skip_channels)[origin]
    out_channels = layout.out_channels[stage]
    narrow = out_channels <= launch.narrow.n
    tile = launch.narrow if narrow else launch.wide
    out_tiles, channel_tiles = _ceil(out_channels, tile.n), _ceil(widths[stage], tile.m)
    return {
        "stage": stage,
        "kind": NARROW if narrow else WIDE,
        "out_tiles": out_tiles,
        "channel_tiles": channel_tiles,
        "channels": widths[stage],
        "out_channels": out_channels,
        "source": layout.offsets(widths, layout.in_pixels)[stage],
        "origin": origin,
        "cotangent": layout.offsets(layout.out_channels, layout.out_pixels)[stage],
        "in_channels": layout.in_channels[stage],
        "per_chunk": out_tiles * channel_tiles * layout.taps,
    }


def _bias_gradients(layout, wanted, parameters, partials: list, sums: list, workspace: int) -> int:
    """Appends the problems of the bias gradients; returns the size of the workspace with theirs."""
    _, want_bias, want_sample_bias = wanted
    chunk = layout.out_pixels if want_sample_bias else SUM_CHUNK
    rows = [n * layout.out_pixels for n in layout.counts]
    terms = [_ceil(r, chunk) for r in rows]
    sizes = [t * o for t, o in zip(terms, layout.out_channels, strict=True)]
    workspaces = [workspace + start for start in starts(sizes)]
    cotangents = layout.offsets(layout.out_channels, layout.out_pixels)
    for s in layout.stages:
        out_channels = layout.out_channels[s]
        out_tiles = _ceil(out_channels, parameters.sum_channels)
        partials.append(
            {
                "kind": PIXEL_SUMS,
                "out_tiles": out_tiles,
                "rows": rows[s],
                "out_channels": out_channels,
                "cotangent": cotangents[s],
                "chunk": chunk,
                "partial": workspaces[s],
                "partial_stride": out_channels,
                "tiles": out_tiles * terms[s],
            }
        )
    blocks = parameters.sums
    biases, samples = starts(layout.out_channels), layout.offsets(layout.out_channels, 1)
    for s, out_channels in enumerate(layout.out_channels):
        if want_bias:
            sums.append(
                _sum(blocks, terms[s], out_channels, out_channels, workspaces[s], biases[s], target=TO_BIAS)
            )
        if want_sample_bias and sizes[s]:
            sums.append(_sum(blocks, 1, 0, sizes[s], workspaces[s], samples[s], target=TO_SAMPLE_BIAS))
    return workspace + sum(sizes)


def _sum(
    blocks: SumParameters, terms: int, stride: int, size: int, partial: int, result: int, target: int
) -> dict:
    block = blocks.bias_elements if target == TO_BIAS else blocks.elements
    fields = {"terms": terms, "stride": stride, "size": size, "partial": partial, "result": result}
    return {**fields, "target": target, "tiles": _ceil(size, block)}


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
