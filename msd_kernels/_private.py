"""The private names of PyTorch that this library uses, each asked for, and what serves where one has gone.

A release of PyTorch may drop any of them; then calls take the dispatcher's public way, slower, with the same results.
``tests/test_private_names.py`` holds this list against the sources and runs the ops without each name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def ask(name: str) -> Any:
    """``torch.<name>``, or None where this PyTorch has no such thing."""
    return reduce(lambda found, part: getattr(found, part, None), name.split("."), torch)


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


# To go around the dispatcher all of these are needed; without one of them no call does.
DispatchKey = ask("_C.DispatchKey")
DispatchKeySet = ask("_C.DispatchKeySet")
below_autograd_keyset = ask("_C._after_ADInplaceOrView_keyset")
below_autograd = ask("_C._AutoDispatchBelowADInplaceOrView")
transforms_active: Callable[[], bool] | None = ask("_C._are_functorch_transforms_active")
AROUND_THE_DISPATCHER = all(
    name is not None
    for name in (DispatchKey, DispatchKeySet, below_autograd_keyset, below_autograd, transforms_active)
)

any_requires_grad: Callable[..., bool] = ask("_C._any_requires_grad") or _requires_grad
# Without the number of modes, or the profiler's state, every call is taken for an observed one.
dispatch_modes: Callable[[], int] = ask("_C._len_torch_dispatch_stack") or (lambda: 1)
profiler_enabled: Callable[[], bool] = ask("autograd._profiler_enabled") or (lambda: True)
is_tracing: Callable[[], bool] = ask("_C._is_tracing") or torch.jit.is_tracing

# Without either, tools take what holds tensors for a leaf of a pytree.
register_pytree_node: Callable[..., None] | None = ask("utils._pytree.register_pytree_node")
GetAttrKey: Callable[[str], Any] | None = ask("utils._pytree.GetAttrKey")

# What tells whether the running code was called by a compiled function, between two of its graphs. Without it, only
# what is being traced is known to be compiled.
compiled_frames: Callable[[], Any] = ask("_C._dynamo.eval_frame.get_eval_frame_callback") or (lambda: None)
# Spares every call the way through the modes of functions.
without_function_modes: Callable[[], AbstractContextManager] = ask("_C.DisableTorchFunction") or nullcontext


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` may be at work; without the name, one always may."""
    return transforms_active is None or transforms_active()


def forward_mode() -> bool:
    """Whether tensors may have forward-mode tangents; without the name, tensors are asked one by one."""
    return getattr(forward_ad, "_current_level", 0) >= 0
