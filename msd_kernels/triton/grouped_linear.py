"""The grouped linear layer in Triton: the 1×1 convolution of maps of one pixel, in the same launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels import tuned
from msd_kernels.triton.grouped_conv2d import call_of, cannot, run_backward, run_forward, slower
from msd_kernels.triton.problems import Layout

__all__ = ["call_of", "cannot", "grouped_linear", "grouped_linear_backward", "layout_of", "slower"]


def layout_of(rows: Sequence[int], in_features: Sequence[int], out_features: Sequence[int]) -> Layout:
    """The convolution that a grouped linear layer is."""
    return Layout.of(rows, in_features, (0,) * len(rows), out_features, 1, 1, 1, "none")


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[int],
    in_features: Sequence[int],
    out_features: Sequence[int],
) -> Tensor:
    """As the dispatcher op ``msd_kernels::grouped_linear``."""
    layout = layout_of(rows, in_features, out_features)
    return run_forward(x, None, weight, bias, None, None, layout, 1.0, _arithmetic(x))


def grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    in_features: Sequence[int],
    out_features: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, weight, bias)``, None where not wanted."""
    want_x, want_weight, want_bias = wanted
    dx, _, dweight, dbias, _ = run_backward(
        dy,
        x,
        None,
        weight,
        layout_of(rows, in_features, out_features),
        (want_x, False, want_weight, want_bias, False),
        _arithmetic(x),
    )
    return [dx, dweight, dbias]


def _arithmetic(x: Tensor) -> str:
    """Float32 follows PyTorch's own setting for matrix products."""
    allow_tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return tuned.arithmetic(x.dtype, allow_tf32)
