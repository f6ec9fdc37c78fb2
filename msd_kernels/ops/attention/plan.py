"""Plans of the attention kernels: where each stage's heads lie, and how the launches are cut into tiles.

A tile is a block of consecutive tokens of one head of one sample: of the queries in the forward pass and for their
gradients, of the context for those of keys and values. A launch's table has one row per stage (see
:mod:`msd_kernels.ops.grouped_conv2d.plan`), the stages with the longest tiles first. Everything here is arithmetic on
shapes; it needs no Triton.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from msd_kernels.layouts import AttentionLayout
from msd_kernels.runtime.plan_cache import Table, Tables, cached_plan
from msd_kernels.runtime.tuned import AttentionParameters, RowTile, StreamTile

# Columns of the tables; the kernels take their field numbers from here. A `_step` is the distance between tokens, or
# in a planar order, where tokens lie side by side, that between elements of the head dimension.
FIELDS = (
    "first_tile",
    "blocks",  # tiles per head
    "heads",
    "head_dim",
    "kind",  # which of the launch's head sizes
    "scale",  # the factor on the scores, the bits of a float64
    "rows",  # first entry in log_sum
    "q",  # first element in q
    "q_sample",  # distance between samples
    "q_head",  # distance between heads
    "q_step",
    "k",  # first element in k; its distances are those of v, too
    "k_sample",
    "k_head",
    "k_step",
    "v",  # first element in v
    "y",  # first element in y
    "y_sample",
    "y_head",
    "y_step",
)

LARGEST_HEAD = 512
# Up to so many context tokens a program holds whole rows of scores.
ROW = 256
SMALLEST_SIDE = 16  # of a product on tensor cores
LARGEST_PIECE = 256  # of a head dimension in one product
SCORES_PER_WARP = 1024  # at least: short rows take fewer warps than the table says
VECTOR_BYTES = 16
MAX_LOCAL = 2**31 - 2**24  # offsets inside one head are 32-bit


# Few operations on large blocks, because the interpreter's time is per operation.
_ROW, _STREAM = RowTile(64, 128, 1), (StreamTile(LARGEST_HEAD, 256, 128, 1),)
INTERPRETED = AttentionParameters(_ROW, _ROW, _ROW, _STREAM, _STREAM, warps=4)


def is_planar(layout: AttentionLayout) -> bool:
    """Whether the tokens lie side by side instead of the head dimension."""
    return layout.order.endswith("t")


def parts_between(layout: AttentionLayout) -> int:
    """The distance between elements of the head dimension where tokens do not lie side by side."""
    return 3 if layout.order.endswith("dp") else 1


def vector(layout: AttentionLayout, itemsize: int) -> int:
    """Elements per load: 16 bytes' worth where every row and every stage starts at such a place, else 1."""
    elements = VECTOR_BYTES // itemsize
    sizes = (layout.tokens, layout.context) if is_planar(layout) else layout.head_dims
    return 1 if parts_between(layout) > 1 or any(size % elements for size in sizes) else elements


def largest_local_offset(layout: AttentionLayout) -> int:
    """The largest distance inside one head."""
    longest = max(layout.tokens, layout.context)
    return max(
        _distances(layout.order, h, d, longest)["t"] * longest
        + _distances(layout.order, h, d, longest)["d"] * d
        for h, d in zip(layout.heads, layout.head_dims, strict=True)
    )


def table_rows(layout: AttentionLayout) -> list[dict[str, int]]:
    """A table row per stage, without what the launch adds: its tiles."""
    starts = {"q": 0, "k": 0, "y": 0, "rows": 0}
    found = []
    for s, (n, h, d) in enumerate(zip(layout.counts, layout.heads, layout.head_dims, strict=True)):
        q, k, y = (
            _distances(layout.order, h, d, layout.tokens),
            _distances(layout.order, h, d, layout.context),
            _distances(layout.out_order, h, d, layout.tokens),
        )
        if layout.packed:
            places = {"q": starts["q"], "k": starts["q"] + q["p"], "v": starts["q"] + 2 * q["p"]}
        else:
            places = {"q": starts["q"], "k": starts["k"], "v": starts["k"]}
        (bits,) = struct.unpack("<q", struct.pack("<d", layout.scale_of(s)))
        row = {
            "heads": h,
            "head_dim": d,
            "scale": bits,
            "rows": starts["rows"],
            "y": starts["y"],
            **places,
        }
        for name, distances in (("q", q), ("k", k), ("y", y)):
            row[f"{name}_sample"] = distances["n"]
            row[f"{name}_head"] = distances["h"]
            row[f"{name}_step"] = distances["d" if is_planar(layout) else "t"]
        found.append(row)
        sizes = {"q": n * q["n"], "k": n * k["n"], "y": n * y["n"], "rows": n * h * layout.tokens}
        starts = {name: start + sizes[name] for name, start in starts.items()}
    return found


def _distances(order: str, heads: int, head_dim: int, tokens: int) -> dict[str, int]:
    """The stride of each axis of a flat buffer in a memory order, except for the number of samples."""
    sizes = {"n": 1, "t": tokens, "h": heads, "d": head_dim, "p": 3}
    strides = accumulate((sizes[axis] for axis in reversed(order)), lambda a, b: a * b, initial=1)
    return dict(zip(reversed(order), strides, strict=False))


class Plan(NamedTuple):
    """One launch.

    Attributes:
        table: one row per stage with samples.
        streams: whether rows of scores are streamed instead of held as a whole.
        constants: the kernel's constexprs that follow from the tiles.
        warps: per program.
    """

    table: Table
    streams: bool
    constants: dict[str, object]
    warps: int


@cached_plan
def plan(
    layout: AttentionLayout,
    which: str,
    parameters: AttentionParameters,
    arithmetic: str,
    itemsize: int,
    device: torch.device,
) -> Callable[[Sequence[int]], Plan]:
    """The launch ``which``: ``"forward"``, ``"dq"`` or ``"dkv"``; the last one's tiles are of context tokens."""
    own, other = layout.tokens, layout.context
    if which == "dkv":
        own, other = other, own
    single = vector(layout, itemsize) == 1
    streams = other > ROW
    rows = table_rows(layout)
    constants = (_cut_streams if streams else _cut_rows)(parameters, rows, own, other, single)
    warps = parameters.warps
    if which != "dkv":
        step = max(kind[3] for kind in constants["KINDS"]) if streams else constants["OTHER"]
        constants["RAGGED"] = other % step != 0
    if not streams and constants["OTHER"] < ROW:
        warps = max(4, min(warps, constants["OWN"] * constants["OTHER"] // SCORES_PER_WARP))
    problems = []
    for stage in layout.stages:
        row = rows[stage]
        row["blocks"] = _ceil(own, row.pop("own"))
        problems.append({**row, "tiles": layout.counts[stage] * row["heads"] * row["blocks"]})
    problems.sort(key=lambda p: -p["head_dim"])
    tables = Tables((problems, FIELDS))
    constants |= order_constants(layout, arithmetic, itemsize) | {"PROBLEMS": tables.problems[0]}
    return lambda counts: Plan(tables.at(counts, device)[0][0], streams, constants, warps)


def order_constants(layout: AttentionLayout, arithmetic: str, itemsize: int) -> dict[str, object]:
    """Constants of all kernels that follow from the memory order and the dtype."""
    return {
        "PLANAR": is_planar(layout),
        "PARTS": parts_between(layout),
        "ALIGN": vector(layout, itemsize),
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
    }


def _cut_rows(
    parameters: AttentionParameters, rows: list[dict[str, int]], own: int, other: int, single: bool
) -> dict[str, object]:
    """Tiles that hold whole rows of scores: one shape for all stages, which loop over their head dimensions."""
    columns = _side(other)
    tile = parameters.row if other == columns else parameters.ragged_row
    tile = parameters.single_row if single else tile
    tokens = min(tile.own, _side(own))
    for row in rows:
        row["own"] = tokens
    depth = min(tile.depth, _side(max(row["head_dim"] for row in rows)))
    return {"OWN": tokens, "OTHER": columns, "DEPTH": depth, "STAGES": tile.stages}


def _cut_streams(
    parameters: AttentionParameters, rows: list[dict[str, int]], own: int, other: int, single: bool
) -> dict[str, object]:
    """Tiles that hold whole heads: a shape, and a body in the kernel, for each size of heads among the stages."""
    tiles = parameters.single_stream if single else parameters.stream
    sizes = sorted({split(row["head_dim"]) for row in rows}, reverse=True)
    kinds = []
    for low, high in sizes:
        tile = next(t for t in tiles if low + high <= t.head)
        kinds.append((low, high, min(tile.own, _side(own)), tile.other, tile.stages))
    for row in rows:
        row["kind"] = sizes.index(split(row["head_dim"]))
        row["own"] = kinds[row["kind"]][2]
    return {"KINDS": tuple(kinds)}


def split(head_dim: int) -> tuple[int, int]:
    """Two powers of two that hold a head dimension with the least padding; the second may be 0."""
    whole = _side(head_dim)
    half = whole // 2
    rest = _side(head_dim - half)
    if whole > LARGEST_PIECE or (half >= SMALLEST_SIDE and half + rest < whole):
        return half, rest
    return whole, 0


def _side(size: int) -> int:
    """The smallest side of a block that holds so many."""
    return max(SMALLEST_SIDE, 1 << (size - 1).bit_length())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
