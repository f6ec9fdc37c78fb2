"""Dtypes of accumulation."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
