"""Which element types oneDNN, the library behind PyTorch's products and convolutions on the CPU, takes here."""

from __future__ import annotations

from functools import cache

import torch


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
