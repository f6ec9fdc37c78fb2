"""Training in several processes, one per device, that share every batch.

Start them with PyTorch's own launcher::

    torchrun --nproc-per-node 8 -m -- multistage_diffusion train --data images/ --out runs/x
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["ProcessError", "Processes"]

Result = TypeVar("Result")
Item = TypeVar("Item")


class ProcessError(RuntimeError):
    """The processes of a run do not fit together."""


class Processes:
    """The processes of a run and what they tell each other; made without arguments, the only one there is.

    Every method is called by all of them, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def launched() -> bool:
        """Whether ``torchrun``, or what sets the same variables, has started this process as one of several."""
        return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()

    @classmethod
    def join(cls) -> Processes:
        """Meets the other processes that the launcher has started; waits for them.

        Tensors on a GPU go through NCCL, those on the host through Gloo.
        """
        # Optimizers import it. Imported later it would hold on to the group beyond ``leave``, and Gloo's threads, still
        # running at the end of the interpreter, could abort the process.
        with suppress(ImportError):
            importlib.import_module("torch._dynamo")
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Ends what ``join`` began."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @classmethod
    @contextmanager
    def of_launcher(cls) -> Iterator[Processes]:
        """Those that the launcher has started, joined and left again; without one, this process alone.

        After an error they are not left: that waits for the others, which may be waiting for this process, and the
        launcher ends them all as soon as one fails.
        """
        if not cls.launched():
            yield cls()
            return
        processes = cls.join()
        yield processes
        processes.leave()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """PyTorch's group of them; None for a single one."""
        return dist.group.WORLD if self.size > 1 else None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def deal(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of the items, every ``size``-th; the last one is repeated until shares are equal."""
        return [*items, *items[-1:] * (-len(items) % self.size)][self.rank :: self.size]

    def collect(self, rows: torch.Tensor, count: int) -> torch.Tensor | None:
        """Puts together in the first process what all have made of the ``count`` items that ``deal`` gave them.

        Args:
            rows: one for each item of this process, on the host.

        Returns:
            One for each item, in the items' order; None in the other processes.
        """
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)] if self.is_first else None
        dist.gather(rows, parts)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count] if self.is_first else None

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, known on the host."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def require_same(self, **facts: object) -> None:
        """Compares what every process knows with what the first one does.

        Raises:
            ProcessError: in all processes; names a fact that differs, and where.
        """
        if self.size == 1:
            return
        everywhere: list[dict] = [{}] * self.size
        dist.all_gather_object(everywhere, facts)
        for rank, other in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if other[name] != value:
                    raise ProcessError(
                        f"the processes differ in {name.replace('_', ' ')}: {value} in process 0, {other[name]} in "
                        f"process {rank}; all need the same command and data, and a run folder that they share"
                    )

    def first_does(self, action: Callable[[], Result]) -> Result:
        """What ``action()`` returns in the first process, while the others wait.

        An exception of it is raised in all of them.
        """
        if self.size == 1:
            return action()
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except Exception as caught:  # the others, which would wait for ever, must learn of it first
                error = caught
        told = [result, _portable(error)]
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise error or told[1]
        return told[0]

    def share(self, module: nn.Module) -> None:
        """Gives all processes the first one's parameters and buffers."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), 0)


def _portable(error: Exception | None) -> Exception | None:
    """The exception itself if it can travel, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class does to itself there
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
