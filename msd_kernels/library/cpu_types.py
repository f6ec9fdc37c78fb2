"""Which element types oneDNN, the library behind PyTorch's products and convolutions on the CPU, takes here.

For a 16-bit type that it does not know, PyTorch has loops of its own, ten times slower than float32 and, in
convolutions, with sums in that type. Such tensors are better computed in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this type on this processor; float16 and bfloat16 need AVX-512 or the like."""
    if dtype == torch.float32:
        return True
    query = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    # The operators are missing where PyTorch was built without oneDNN.
    return query is not None and hasattr(torch.ops.mkldnn, query) and getattr(torch.ops.mkldnn, query)()


def wants_float32(x: Tensor) -> bool:
    """Whether a product or convolution of this tensor should be computed in float32 and rounded once."""
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not onednn_takes(x.dtype)


def float32(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in float32; None stays None."""
    return [None if tensor is None else tensor.float() for tensor in tensors]
