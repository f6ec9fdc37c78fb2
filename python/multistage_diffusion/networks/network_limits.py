"""A bound on what a configuration may build, for configurations that come out of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["TooManyTensorsError", "at_most", "count_tensors"]

# The bound of this thread or task, and what of it is left.
_BOUND: ContextVar[list[int] | None] = ContextVar("bound", default=None)


class TooManyTensorsError(ValueError):
    """A network is being built that has more tensors than it may have."""


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Stops what this thread builds inside, at the first parameter beyond so many tensors.

    A parameter that is packed over stages counts as one tensor per stage, as it does in a state dict. So a file of a
    few tensors cannot describe a network that takes long to build, not even on the meta device.

    Raises:
        TooManyTensorsError: inside, by the layer that goes beyond.
    """
    token = _BOUND.set([tensors, tensors])
    try:
        yield
    finally:
        _BOUND.reset(token)


def count_tensors(more: int) -> None:
    """Counts the tensors of a new parameter; raises TooManyTensorsError where ``at_most`` forbids them."""
    bound = _BOUND.get()
    if bound is None:
        return
    bound[1] -= more
    if bound[1] < 0:
        raise TooManyTensorsError(f"networks: the configuration asks for more than {bound[0]} tensors")
