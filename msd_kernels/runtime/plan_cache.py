"""Tables of launches on the device: made once per set of shapes, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate, repeat
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from msd_kernels.runtime.formulas import Linear, Recording, compiled

Plan = TypeVar("Plan")

# Plans that one op may keep; a training run draws new counts at every step, so they come and go.
MAX_PLANS = 4096
# Plans for whose tables memory is allocated at once.
SLOTS = 16

# A captured graph reads its tables, and the memory that they were copied from, at every replay.
_used_by_graphs: dict[int, object] = {}


class Table(NamedTuple):
    """The problems of one launch.

    Attributes:
        values: ``[fields × problems]``, int64, on the device; unused problems start behind the last tile.
        problems: values of each field, a power of two.
        tiles: tiles of the whole launch.
        host: where ``values`` was copied from.
    """

    values: Tensor
    problems: int
    tiles: int
    host: Tensor


class Tables:
    """The tables of one plan, as formulas of its counts; on the device they lie in one piece of memory.

    Args:
        device: where they go.
        tables: the problems and the fields of each. A problem holds its number of ``tiles`` and the ``fields`` after
            the first, which is its first tile; fields that it lacks are 0.
        numbers: what else the plan needs of the counts.
    """

    def __init__(
        self,
        device: torch.device,
        *tables: tuple[Sequence[dict[str, Linear | int]], Sequence[str]],
        numbers: Sequence[Linear | int] = (),
    ) -> None:
        self._device = device
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
        self._slots: list[tuple[Tensor, int]] = []
        self._write = compiled([*cells, *totals, *numbers], self._cells)

    def at(self, counts: Sequence[int]) -> tuple[list[Table], tuple[int, ...]]:
        """The tables on the device, and the other numbers.

        The copy comes from pinned memory and is ordered with the current stream. A CUDA graph copies from ordinary
        memory in each replay, as pinned memory may not be allocated while it is captured.
        """
        device = self._device
        host, address = self._slot()
        numbers = self._write(counts, address)
        values = host.to(device, non_blocking=True)
        parts = values.split_with_sizes(self._sizes) if len(self._sizes) > 1 else (values,)
        return [*map(Table, parts, self.problems, numbers, repeat(host))], numbers[len(parts) :]

    def _slot(self) -> tuple[Tensor, int]:
        """Where the cells are written before they are copied to the device, and its address.

        Several are allocated at once, which takes less time than one after the other.
        """
        on_gpu = self._device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return memory(self._cells, pinned=False)
        try:
            return self._slots.pop()
        except IndexError:
            host, address = memory(SLOTS * self._cells, pinned=on_gpu)
        addresses = range(address, address + host.nbytes, host.nbytes // SLOTS)
        first, *self._slots = zip(host.split(self._cells), addresses, strict=True)
        return first


def memory(cells: int, pinned: bool) -> tuple[Tensor, int]:
    """Memory of the host for int64 cells, and its address."""
    host = torch.empty(cells, dtype=torch.int64, pin_memory=pinned)
    return host, host.data_ptr()


def cached_plan(build: Callable[..., Callable[[Sequence[int]], Plan]]) -> Callable[..., Plan]:
    """Caches the plans of a layout, which comes first, for a device, which comes last.

    ``build`` is called once per shapes, with formulas in the place of the layout's counts, and returns what makes the
    plan of the counts.

    Plans are kept per stream, because a table is ready only for the stream that copied it. While a CUDA graph is being
    captured, a plan that was made before serves any stream; one made inside belongs to that graph alone, since its copy
    happens only in the replays. Either lives as long as the process.
    """
    of_counts: dict[tuple, Callable[[Sequence[int]], Plan]] = {}
    plans: dict[tuple, dict[int, Plan]] = {}

    def make(arguments: tuple) -> Plan:
        layout = arguments[0]
        counts, place = layout.counts, layout._fields.index("counts")
        present = tuple(map(bool, counts)) if 0 in counts else len(counts)
        key = present, layout[:place], layout[place + 1 :], arguments[1:]
        found = of_counts.get(key)
        if found is None:
            if len(of_counts) >= MAX_PLANS:
                of_counts.clear()
            formulas = layout._replace(counts=Recording(counts).counts)
            found = of_counts[key] = build(formulas, *arguments[1:])
        return found(counts)

    @wraps(build)
    def plan(*arguments) -> Plan:
        device = arguments[-1]
        kept = plans.get(arguments)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            found = next(iter(kept.values())) if kept else make(arguments)
            _used_by_graphs[id(found)] = found
            return found
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if kept is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            kept = plans[arguments] = {}
        found = kept.get(stream)
        if found is None:
            found = kept[stream] = make(arguments)
        return found

    return plan
