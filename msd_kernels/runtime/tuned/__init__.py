"""Launch parameters of the GPU kernels: one table per architecture, ``sm_90.json`` for compute capability 9.0.

A table is keyed by op, pass and arithmetic alone, because nothing else changes the code of a kernel. A GPU without a
table of its own takes that of the nearest older one of its major version, or ``sm_80.json``, whose kernels fit the
shared memory of every GPU since then. Nothing is tuned at run time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch

__all__ = [
    "ARITHMETICS",
    "AttentionParameters",
    "Crossover",
    "DenoiserParameters",
    "DenoiserTile",
    "GroupNormParameters",
    "Launch",
    "ProductParameters",
    "ResampleParameters",
    "RowTile",
    "StreamTile",
    "SumParameters",
    "Tile",
    "WgradParameters",
    "architecture_of",
    "architectures",
    "arithmetic",
    "attention",
    "crossover",
    "group_norm",
    "optimal_denoiser",
    "product",
    "resample2d",
    "wgrad",
]

# How a kernel multiplies: 16-bit tensor cores, float32 operands rounded to tf32, or float32 exactly.
ARITHMETICS = ("half", "tf32", "float32")
# Tensor cores take slices of at least 16.
SMALLEST_SIDE = 16

Parameters = TypeVar("Parameters")


@dataclass(frozen=True)
class Tile:
    """What one program computes: ``m × n`` results, ``k`` terms at a time, with ``stages`` slices in flight."""

    m: int
    n: int
    k: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """The tiles of one launch; ``narrow`` serves results of at most ``narrow.n`` columns."""

    wide: Tile
    narrow: Tile | None
    warps: int
    programs_per_multiprocessor: int


@dataclass(frozen=True)
class ProductParameters:
    """The forward pass and the input gradients.

    ``large`` takes the place of the wide tile in launches with so many tiles that its coarser steps do not cost more
    than it saves: a unit of work takes it ``1 / large_speed`` of the wide tile's time. None where there is none.
    ``pooled`` is the wide tile of a launch whose gather reads 2×2 pixels per value, ``unaligned`` that of one whose
    loads are single elements; ``short`` serves all results of a launch whose stages have at most ``short.m`` rows.
    ``pooled_stages`` bounds the slices in flight of a pooled launch. It is 1 on sm_90: with more, Triton 3.6 computes a
    slice into registers that the ``wgmma`` of the slice before it may still read (its issue 9433).
    """

    wide: Tile
    large: Tile | None
    large_speed: float
    narrow: Tile
    pooled: Tile
    pooled_stages: int
    unaligned: Tile
    warps: int
    short: Tile
    short_warps: int
    short_programs_per_multiprocessor: int
    programs_per_multiprocessor: int

    def for_vectors(self, *vectors: int) -> ProductParameters:
        """The parameters for loads of that many elements: single ones take the registers of a larger tile."""
        return _unaligned(replace(self, large=None)) if 1 in vectors else self

    def launches(self, rows: int, depth: int, pooled: bool, resampled: bool) -> list[tuple[Launch, float]]:
        """What can serve problems of at most ``rows`` rows and at most ``depth`` channels per source.

        ``resampled`` launches read or write at other positions than their grid's, ``pooled`` ones among them read 2×2
        pixels per value. Each launch comes with its speed: work per time, where all multiprocessors are busy.
        """
        if rows <= self.short.m and not pooled:
            short = _shallow(self.short, depth)
            return [(Launch(short, None, self.short_warps, self.short_programs_per_multiprocessor), 1.0)]
        tiles = [(_pooled(self) if pooled else (self.wide, self.narrow), 1.0)]
        if self.large and not resampled:
            tiles.append(((self.large, self.narrow), self.large_speed))
        return [
            (
                Launch(_shallow(w, depth), _shallow(n, depth), self.warps, self.programs_per_multiprocessor),
                speed,
            )
            for (w, n), speed in tiles
        ]


class SumParameters(NamedTuple):
    """The launch that adds up partial sums of weight gradients: how many a program adds at once, and of how many
    elements; of biases, which have many terms, apart."""

    terms: int
    elements: int
    bias_terms: int
    bias_elements: int


@dataclass(frozen=True)
class WgradParameters:
    """The weight and bias gradients: ``m`` are channels of a source, ``n`` out channels, ``k`` pixels."""

    wide: Tile
    narrow: Tile
    pooled: Tile
    pooled_stages: int
    unaligned: Tile
    warps: int
    sum_rows: int
    sum_channels: int
    sums: SumParameters
    programs_per_multiprocessor: int

    def for_vectors(self, *vectors: int) -> WgradParameters:
        """As :meth:`ProductParameters.for_vectors`."""
        return _unaligned(self) if 1 in vectors else self

    def launch(self, pooled: bool) -> Launch:
        """The tiles of a launch; ``pooled`` as in :class:`ProductParameters`."""
        tiles = _pooled(self) if pooled else (self.wide, self.narrow)
        return Launch(*tiles, self.warps, self.programs_per_multiprocessor)


class RowTile(NamedTuple):
    """Attention with whole rows of scores: ``own`` tokens, ``depth`` elements of the head dimension at a time."""

    own: int
    depth: int
    stages: int


class StreamTile(NamedTuple):
    """Attention with whole heads of up to ``head`` elements: ``own`` tokens, ``other`` of the other side at a time."""

    head: int
    own: int
    other: int
    stages: int


class AttentionParameters(NamedTuple):
    """One launch of attention.

    ``ragged_row`` serves rows of scores that fill no power of two, and ``single_row`` and ``single_stream`` memory
    orders that are read by single elements. The last stream tile serves the largest heads.
    """

    row: RowTile
    ragged_row: RowTile
    single_row: RowTile
    stream: tuple[StreamTile, ...]
    single_stream: tuple[StreamTile, ...]
    warps: int


class GroupNormParameters(NamedTuple):
    """All launches of GroupNorm.

    ``tile`` and ``planar_tile`` are the elements that a program has in flight, channels last or not. Channels-last
    blocks are filled up to ``block_channels`` with whole groups.
    """

    tile: int
    planar_tile: int
    block_channels: int
    warps: int


class ResampleParameters(NamedTuple):
    """One launch of FIR resampling.

    A full tile has ``threads`` threads of ``elements`` elements each, ``planar_elements`` where they are loaded one by
    one; channels-last tiles are at most ``block_channels`` wide. A program owns at most ``rows`` rows of the output,
    and fewer where that leaves less than ``programs_per_multiprocessor``.
    """

    threads: int
    elements: int
    planar_elements: int
    block_channels: int
    rows: int
    programs_per_multiprocessor: int


class DenoiserTile(NamedTuple):
    """Queries, samples and values that a program works on at a time."""

    b: int
    n: int
    d: int
    warps: int


class DenoiserParameters(NamedTuple):
    """Both products of the optimal denoiser: the scores, and the mean that they weight."""

    products: DenoiserTile
    mean: DenoiserTile


@dataclass(frozen=True)
class Crossover:
    """Where ``auto`` leaves the per-stage library loop for one grouped launch.

    Attributes:
        gflop_per_stage: the grouped launch is taken up to this much forward work per non-empty stage.
        measured_on: the GPU that the number was measured on, empty for an estimate.
    """

    gflop_per_stage: float
    measured_on: str


def arithmetic(dtype: torch.dtype, allow_tf32: bool) -> str:
    """The entry of :data:`ARITHMETICS` for operands of ``dtype``."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if allow_tf32 else "float32"


def product(architecture: int, arithmetic: str) -> ProductParameters:
    """Parameters of the forward pass and the input gradients of grouped linear layers and convolutions."""
    return _find(ProductParameters, architecture, "grouped", "product", arithmetic)


def wgrad(architecture: int, arithmetic: str) -> WgradParameters:
    """Parameters of their weight gradients."""
    return _find(WgradParameters, architecture, "grouped", "wgrad", arithmetic)


def attention(architecture: int, arithmetic: str, launch: str) -> AttentionParameters:
    """Parameters of attention: ``launch`` is ``"forward"``, ``"dq"`` or ``"dkv"``."""
    return _find(AttentionParameters, architecture, "attention", launch, arithmetic)


def group_norm(architecture: int) -> GroupNormParameters:
    """Parameters of GroupNorm."""
    return _find(GroupNormParameters, architecture, "group_norm")


def resample2d(architecture: int) -> ResampleParameters:
    """Parameters of FIR resampling."""
    return _find(ResampleParameters, architecture, "resample2d")


def optimal_denoiser(architecture: int, multiplies: str) -> DenoiserParameters:
    """Parameters of the optimal denoiser, whose float64 products ``"tensor_cores"`` compute, or ``"threads"``."""
    return _find(DenoiserParameters, architecture, "optimal_denoiser", multiplies)


def crossover(architecture: int, op: str) -> Crossover:
    """The committed rule of one op."""
    return _find(Crossover, architecture, "crossover", op)


@cache
def _find(kind: type[Parameters], architecture: int, *path: str) -> Parameters:
    entry = table(architecture)
    for name in path:
        entry = entry[name]
    return parse(kind, entry)


def architectures() -> tuple[int, ...]:
    """Those with a table: 80, 90, ..."""
    return tuple(
        sorted(int(path.stem.removeprefix("sm_")) for path in Path(__file__).parent.glob("sm_*.json"))
    )


@cache
def architecture_of(device: torch.device) -> int:
    """10 × major + minor of a GPU's compute capability; for Triton's interpreter the newest one with a table."""
    if device.type != "cuda":
        return architectures()[-1]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def table(architecture: int) -> dict:
    """The committed table of this architecture, or of the nearest one before it."""
    known = architectures()
    nearest = max((a for a in known if a <= architecture and a // 10 == architecture // 10), default=known[0])
    return json.loads((Path(__file__).parent / f"sm_{nearest}.json").read_text())


def parse(kind: type[Parameters], entry: dict[str, Any]) -> Parameters:
    """Parameters of a kind from their entry in a table."""
    return kind(**{name: _parsed(hint, entry[name]) for name, hint in get_type_hints(kind).items()})


def _parsed(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_parsed(get_args(hint)[0], item) for item in value)
    if isinstance(value, dict):
        return parse((get_args(hint) or (hint,))[0], value)
    return value


def _pooled(parameters: ProductParameters | WgradParameters) -> tuple[Tile, Tile]:
    """The wide and the narrow tile of a pooled launch."""
    tiles = (parameters.pooled, _small(parameters.narrow, parameters.pooled))
    return tuple(replace(tile, stages=min(tile.stages, parameters.pooled_stages)) for tile in tiles)


def _unaligned(parameters):
    """The parameters with tiles for loads of single elements."""
    tile = parameters.unaligned
    return replace(parameters, wide=tile, pooled=tile, narrow=_small(parameters.narrow, tile))


def _small(narrow: Tile, tile: Tile) -> Tile:
    """The narrow tile with no longer sides than another has."""
    return replace(narrow, m=min(narrow.m, tile.m), k=min(narrow.k, tile.k))


def _shallow(tile: Tile, depth: int) -> Tile:
    """The tile with slices no longer than ``depth`` needs."""
    return Tile(tile.m, tile.n, min(tile.k, max(SMALLEST_SIDE, 1 << (depth - 1).bit_length())), tile.stages)
