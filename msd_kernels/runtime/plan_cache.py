"""Tables of launches on the device: made once per set of shapes, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")

# Plans that one op may keep; a training run draws new counts at every step, so they come and go.
MAX_PLANS = 4096

# A captured graph reads its tables, and the memory that they were copied from, at every replay.
_used_by_graphs: dict[int, object] = {}


@dataclass(frozen=True)
class Table:
    """The problems of one launch.

    Attributes:
        values: ``[fields, problems]``, int64, on the device; unused problems start behind the last tile.
        problems: columns of ``values``, a power of two.
        tiles: tiles of the whole launch.
        host: where ``values`` was copied from.
    """

    values: Tensor
    problems: int
    tiles: int
    host: Tensor


def make_table(problems: Sequence[dict[str, int]], fields: Sequence[str], device: torch.device) -> Table:
    """Numbers the tiles of the problems and puts the table on the device.

    Each problem holds its number of ``tiles`` and the ``fields`` after the first, which is its first tile; fields that
    it lacks are 0. The copy comes from pinned memory and is ordered with the current stream. A CUDA graph copies from
    ordinary memory in each replay, as pinned memory may not be allocated while it is captured.
    """
    tiles = [problem["tiles"] for problem in problems]
    total = sum(tiles)
    padded = max(4, 1 << max(len(problems) - 1, 0).bit_length())
    unused = padded - len(problems)
    columns = [[*accumulate(tiles, initial=0)][:-1] + [total] * unused]
    columns += [[problem.get(field, 0) for problem in problems] + [0] * unused for field in fields[1:]]
    pinned = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    host = torch.tensor(columns, dtype=torch.int64, pin_memory=pinned)
    return Table(host.to(device, non_blocking=True), padded, total, host)


def cached_plan(build: Callable[..., Plan]) -> Callable[..., Plan]:
    """Caches a function of shapes whose last argument is the device that its tables go to.

    Plans are kept per stream, because a table is ready only for the stream that copied it. While a CUDA graph is being
    captured, a plan that was made before serves any stream; one made inside belongs to that graph alone, since its copy
    happens only in the replays. Either lives as long as the process.
    """
    plans: dict[tuple, Plan] = {}

    @wraps(build)
    def plan(*arguments) -> Plan:
        device = arguments[-1]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            found = plans.get((arguments, None)) or build(*arguments)
            _used_by_graphs[id(found)] = found
            return found
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        found = plans.get((arguments, stream))
        if found is None:
            if len(plans) >= 2 * MAX_PLANS:
                plans.clear()
            found = plans[arguments, None] = plans[arguments, stream] = build(*arguments)
        return found

    return plan
