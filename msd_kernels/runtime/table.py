"""What kernels read from the table of their launch (:class:`msd_kernels.runtime.plan_cache.Table`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_problem(table, index, PROBLEMS: tl.constexpr):
    """The problem that owns a tile of the launch, the last one that starts at or before it, and the tile's place there.

    A problem is the pointer to its first field, which is its first tile.
    """
    first_tiles = tl.load(table + tl.arange(0, PROBLEMS)).to(tl.int32)
    problem = table + tl.sum((first_tiles <= index).to(tl.int32), axis=0) - 1
    return problem, index - tl.load(problem).to(tl.int32)


@triton.jit
def read_offset(problem, FIELD: tl.constexpr, PROBLEMS: tl.constexpr, MULTIPLE: tl.constexpr = 1):
    """A field of a problem that is an offset. The division and the product tell the compiler that it is a multiple."""
    return tl.load(problem + FIELD * PROBLEMS) // MULTIPLE * MULTIPLE


@triton.jit
def read_number(problem, FIELD: tl.constexpr, PROBLEMS: tl.constexpr, MULTIPLE: tl.constexpr = 1):
    """A field of a problem that counts something: in 32 bits, where divisions cost a fraction of those in 64."""
    return tl.load(problem + FIELD * PROBLEMS).to(tl.int32) // MULTIPLE * MULTIPLE
