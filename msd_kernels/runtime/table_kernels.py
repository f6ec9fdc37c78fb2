"""The kernel that writes a table of a launch (:mod:`msd_kernels.runtime.plan_cache`) from its own arguments.

Triton reads the types of arguments from annotations, which must be objects for that and no strings.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.runtime.compilation import Compilation

CELLS = tuple(f"c{i}" for i in range(64))


# fmt: off
@triton.jit(do_not_specialize=["start", *CELLS])
def _write_cells_kernel(
    table, start: tl.int64,
    c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, c4: tl.int64, c5: tl.int64,
    c6: tl.int64, c7: tl.int64, c8: tl.int64, c9: tl.int64, c10: tl.int64, c11: tl.int64,
    c12: tl.int64, c13: tl.int64, c14: tl.int64, c15: tl.int64, c16: tl.int64, c17: tl.int64,
    c18: tl.int64, c19: tl.int64, c20: tl.int64, c21: tl.int64, c22: tl.int64, c23: tl.int64,
    c24: tl.int64, c25: tl.int64, c26: tl.int64, c27: tl.int64, c28: tl.int64, c29: tl.int64,
    c30: tl.int64, c31: tl.int64, c32: tl.int64, c33: tl.int64, c34: tl.int64, c35: tl.int64,
    c36: tl.int64, c37: tl.int64, c38: tl.int64, c39: tl.int64, c40: tl.int64, c41: tl.int64,
    c42: tl.int64, c43: tl.int64, c44: tl.int64, c45: tl.int64, c46: tl.int64, c47: tl.int64,
    c48: tl.int64, c49: tl.int64, c50: tl.int64, c51: tl.int64, c52: tl.int64, c53: tl.int64,
    c54: tl.int64, c55: tl.int64, c56: tl.int64, c57: tl.int64, c58: tl.int64, c59: tl.int64,
    c60: tl.int64, c61: tl.int64, c62: tl.int64, c63: tl.int64,
):
    """One program: ``table[start + i] = c_i``. The numbers come by value, whatever they are the same machine code."""
    cells = (
        c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15,
        c16, c17, c18, c19, c20, c21, c22, c23, c24, c25, c26, c27, c28, c29, c30, c31,
        c32, c33, c34, c35, c36, c37, c38, c39, c40, c41, c42, c43, c44, c45, c46, c47,
        c48, c49, c50, c51, c52, c53, c54, c55, c56, c57, c58, c59, c60, c61, c62, c63,
    )
    for i in tl.static_range(64):
        tl.store(table + start + i, cells[i])
# fmt: on


def compilations(architecture: int) -> Iterator[Compilation]:
    numbers = dict.fromkeys(("start", *CELLS), "scalar i64")
    yield Compilation(_write_cells_kernel, "64 cells", {"table": "i64", **numbers}, {}, {"num_warps": 1})
