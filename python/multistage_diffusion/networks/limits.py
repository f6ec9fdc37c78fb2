"""A bound on what a configuration may build, for configurations that come out of a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

__all__ = ["TooManyTensorsError", "at_most"]


class TooManyTensorsError(ValueError):
    """A network is being built that has more tensors than it may have."""


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Stops whatever this thread builds inside, at the first parameter beyond so many tensors.

    A parameter that is packed over stages counts as one tensor per stage, as it does in a state dict. So a file of a
    few tensors cannot describe a network that takes long to build, not even on the meta device.

    Raises:
        TooManyTensorsError: inside, by the constructor that goes beyond.
    """
    left, thread = tensors, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != thread:
            return
        left -= len(getattr(module, "_stage_shapes", {}).get(name, (name,)))
        if left < 0:
            raise TooManyTensorsError(f"networks: the configuration asks for more than {tensors} tensors")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
