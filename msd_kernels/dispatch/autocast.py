"""What ``torch.autocast`` does to the arguments of an op: the same as to the PyTorch layers that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

CAST = (torch.float32, torch.bfloat16, torch.float16)


def lower_precision_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the active autocast region, or None outside of one. The meta device has no autocast."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts what autocast casts to ``dtype``; float64, and what no op takes, stay as they are."""
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.dtype in CAST else t for t in tensors)


def to_lower_precision(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For ops like convolution and matrix product: the autocast dtype."""
    return cast(lower_precision_dtype(device_type), *tensors)


def weights(device_type: str, tensors: list[Tensor]) -> list[Tensor]:
    """The weights of such an op: float32 stays, as the op itself makes of it what it multiplies by."""
    dtype = lower_precision_dtype(device_type)
    if dtype is None:
        return tensors
    return [t if t.dtype == torch.float32 else cast(dtype, t)[0] for t in tensors]


def to_float32_on_cuda(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For normalisations: autocast runs them in float32 on CUDA and leaves them alone on the CPU."""
    active = device_type == "cuda" and lower_precision_dtype(device_type) is not None
    return cast(torch.float32 if active else None, *tensors)
