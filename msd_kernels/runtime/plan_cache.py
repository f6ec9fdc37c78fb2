"""Tables of launches: what is per stage reaches a kernel as one small table, which a launch of its own writes by value.

Nothing is copied from the host, so that nothing waits and a CUDA graph holds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from msd_kernels.runtime.formulas import Linear, Recording, compiled
from msd_kernels.runtime.launch import launch

Plan = TypeVar("Plan")

# Shapes that one op may keep the formulas of.
MAX_SHAPES = 4096
# Numbers that the kernel takes by value that writes them.
CELLS_AT_ONCE = 64


class Table(NamedTuple):
    """What one launch reads: a row per problem.

    Attributes:
        values: ``[fields × problems]``, int64, on the device; unused problems start behind the last tile.
        problems: values of each field, a power of two.
        tiles: tiles of the whole launch.
    """

    values: Tensor
    problems: int
    tiles: int


class Tables:
    """The tables of one plan, as formulas of its counts; on the device they lie in one piece of memory.

    Args:
        tables: the problems and the fields of each. A problem holds its number of ``tiles`` and the ``fields`` after
            the first, which is its first tile; fields that it lacks are 0.
        numbers: what else the plan needs of the counts.
    """

    def __init__(
        self,
        *tables: tuple[Sequence[dict[str, Linear | int]], Sequence[str]],
        numbers: Sequence[Linear | int] = (),
    ) -> None:
        self.problems = [max(4, 1 << max(len(rows) - 1, 0).bit_length()) for rows, _ in tables]
        self._sizes = [
            len(fields) * padded for (_, fields), padded in zip(tables, self.problems, strict=True)
        ]
        cells, totals = [], []
        for (rows, fields), padded in zip(tables, self.problems, strict=True):
            *first_tiles, total = accumulate((row["tiles"] for row in rows), initial=0)
            unused = padded - len(rows)
            cells += first_tiles + [total] * unused
            for field in fields[1:]:
                cells += [row.get(field, 0) for row in rows] + [0] * unused
            totals.append(total)
        self._cells = len(cells)
        self._evaluate = compiled([*cells, *totals, *numbers])

    def at(self, counts: Sequence[int], device: torch.device) -> tuple[list[Table], tuple[int, ...]]:
        """The tables on a device, in the order of the current stream, and the other numbers."""
        found = self._evaluate(counts)
        values = written(found[: self._cells], device)
        parts = values.split_with_sizes(self._sizes) if len(self._sizes) > 1 else (values,)
        numbers = found[self._cells :]
        return [*map(Table, parts, self.problems, numbers)], numbers[len(parts) :]


def written(cells: Sequence[int], device: torch.device) -> Tensor:
    """Integers of 64 bits on a device; on a GPU they are arguments of the kernel that writes them."""
    if device.type != "cuda":
        return torch.tensor(cells, dtype=torch.int64, device=device)
    unused = -len(cells) % CELLS_AT_ONCE
    values = torch.empty(len(cells) + unused, dtype=torch.int64, device=device)
    padded = (*cells, *(0,) * unused)
    for start in range(0, len(cells), CELLS_AT_ONCE):
        by_value = (start, *padded[start : start + CELLS_AT_ONCE])
        launch(_kernels()._write_cells_kernel, 1, values, values, by_value=by_value, num_warps=1)
    return values.narrow(0, 0, len(cells))


@cache
def _kernels() -> ModuleType:
    return import_module("msd_kernels.runtime.table_kernels")


def cached_plan(build: Callable[..., Callable[[Sequence[int]], Plan]]) -> Callable[..., Plan]:
    """Keeps the plans of a layout, which comes first, on it, for a device, which comes last.

    ``build`` is called once per shapes, with formulas in the place of the layout's counts, and returns what makes the
    plan of the counts.

    A table is ready for the stream that wrote it. So plans are kept per stream, and while a CUDA graph is captured none
    is: the graph writes its tables in each replay.
    """
    of_counts: dict[tuple, Callable[[Sequence[int]], Plan]] = {}

    def make(arguments: tuple) -> Plan:
        layout = arguments[0]
        counts, place = layout.counts, layout._fields.index("counts")
        present = tuple(map(bool, counts)) if 0 in counts else len(counts)
        key = present, layout[:place], layout[place + 1 :], arguments[1:]
        found = of_counts.get(key)
        if found is None:
            if len(of_counts) >= MAX_SHAPES:
                of_counts.clear()
            formulas = layout._replace(counts=Recording(counts).counts)
            found = of_counts[key] = build(formulas, *arguments[1:])
        return found(counts)

    @wraps(build)
    def plan(*arguments) -> Plan:
        device, stream = arguments[-1], 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make(arguments)
            stream = torch.cuda.current_stream(device).cuda_stream
        return arguments[0].derived((build, stream, *arguments[1:]), lambda: make(arguments))

    return plan
