"""Fast change of the memory format of gradients (csrc/cpu/channels_last.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msd_kernels.native import load


def to_channels_last(gradient: Tensor | None) -> Tensor | None:
    """A contiguous gradient ``[B, C, *spatial]`` in channels_last memory, by blocks instead of a strided copy.

    Made for ``Tensor.register_hook``: None means that the gradient stays as it is, because it has another layout or
    device, is absent, or is to be differentiated itself.
    """
    if gradient is None or not gradient.is_cpu or gradient.requires_grad:
        return None
    if gradient.element_size() not in (2, 4) or not gradient.is_contiguous() or gradient.stride(1) == 1:
        return None
    if load("cpu").reason:
        return None
    samples, channels, *spatial = gradient.shape
    result = torch.empty_like(gradient)
    torch.ops.msd_kernels_native.to_channels_last(gradient, samples, channels, math.prod(spatial), result)
    return result.view(samples, *spatial, channels).movedim(-1, 1)
