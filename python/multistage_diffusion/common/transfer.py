"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch

__all__ = ["host_to_device"]


def host_to_device(
    values: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``values``, a host tensor, on ``device`` and in ``dtype`` (default: their own).

    A copy to a GPU comes from pinned memory, so that the host goes on at once; a compiler, which has no pinned memory,
    gets an ordinary copy.
    """
    values = values if dtype is None else values.to(dtype)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
