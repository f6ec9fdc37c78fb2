"""What the ops make of weights, kept between calls where somebody says that these do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["frozen_weights"]

PLAIN = frozenset((Tensor, Parameter))
# What is kept in this thread's or task's scope, by the weights' identities and what is made of them.
_kept: ContextVar[dict[tuple, tuple] | None] = ContextVar("msd_kernels_frozen_weights", default=None)
_steps = 0


@contextmanager
def frozen_weights() -> Iterator[None]:
    """Inside of it weights do not change, so that the ops keep what they make of them for a launch.

    Every call brings weights into the order, and under autocast into the dtype, that a kernel reads. Sampling calls a
    network dozens of times with the same weights: here they are converted once. Nothing is kept beyond the scope, which
    is that of the calling thread or task; an inner scope shares what the outer one keeps.

    Whoever changes weights inside all the same, in place by ``copy_`` or ``add_``, by ``load_state_dict`` or with an
    optimizer of ``torch.optim``, is noticed. What PyTorch itself cannot notice, is not: writes through ``.data`` or
    NumPy, replays of CUDA graphs, kernels of one's own.

    Example::

        with msd_kernels.frozen_weights():
            for step in steps:
                x = network(x, noise[step], stage)
    """
    _count_steps()
    token = _kept.set({} if _kept.get() is None else _kept.get())
    try:
        yield
    finally:
        _kept.reset(token)


def kept(weights: Sequence[Tensor], use: Any, make: Callable[[], Any]) -> Any:
    """``make()``, which depends on the weights and on ``use`` alone, or what it has made of them before."""
    scope = _kept.get()
    if scope is None or torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, weights)):
        return make()
    stream = 0
    if weights[0].is_cuda:
        if (
            torch.cuda.is_current_stream_capturing()
        ):  # the graph outlives the scope, and reads the weights as they are
            return make()
        stream = torch.cuda.current_stream(weights[0].device).cuda_stream
    key = (use, stream, *map(id, weights))
    state = (_steps, *[(w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights])
    found = scope.get(key)
    if found is None or found[0] != state:
        # With a weight goes what is made of it: some are made anew for every call, and identities are given again.
        alive = tuple(ref(weight, lambda _: scope.pop(key, None)) for weight in weights)
        found = scope[key] = (state, alive, make())
    return found[2]


@cache
def _count_steps() -> None:
    """Fused optimizers change weights without a new version; their steps are counted from here on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def count(*_: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)
