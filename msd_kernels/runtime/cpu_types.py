"""16-bit tensors of processors that compute products and convolutions faster in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from msd_kernels.runtime import processor


def wants_float32(x: Tensor) -> bool:
    """Whether a product or convolution of this tensor should be computed in float32 and rounded once."""
    return x.is_cpu and not processor.computes_in(x.dtype)


def attention_wants_float32(q: Tensor) -> bool:
    """Whether attention of this tensor should be computed in float32 and rounded once."""
    return q.is_cpu and processor.attention_in_float32(q.dtype)


def float32(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in float32; None stays None."""
    return [None if tensor is None else tensor.to(torch.float32) for tensor in tensors]
