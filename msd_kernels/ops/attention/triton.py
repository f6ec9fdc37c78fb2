"""Attention in Triton: one launch forward, two backward, for any number of stages, head dimensions and memory orders.

The kernels are imported with the first call, so that this module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import AttentionLayout
from msd_kernels.ops.attention.plan import (
    INTERPRETED,
    LARGEST_HEAD,
    MAX_LOCAL,
    ROW,
    VECTOR_BYTES,
    Plan,
    largest_local_offset,
    plan,
)
from msd_kernels.runtime import tuned
from msd_kernels.runtime.launch import cannot_run, launch, slower_than_others

# SDPA's FlashAttention takes no larger head dimension.
LARGEST_FLASH = 256


def cannot(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    layout = call.layout
    if max(layout.head_dims) > LARGEST_HEAD:
        return f"takes head dimensions up to {LARGEST_HEAD}, got {max(layout.head_dims)}"
    if largest_local_offset(layout) > MAX_LOCAL:
        return f"one sample may span {MAX_LOCAL} elements, got {largest_local_offset(layout)}"
    return cannot_run(call.device.type, call.dtype)


def slower(call: Call) -> str | None:
    """Why the library is preferred, or None.

    Never for a gradient: SDPA's own backward on CUDA adds with atomics, so the library's is made of matrix products.
    """
    layout = call.layout
    if call.device.type != "cuda":
        return slower_than_others(call.device.type)
    if call.backward or len(layout.stages) != 1:
        return None
    head_dim = layout.head_dims[layout.stages[0]]
    if layout.context <= ROW or head_dim > LARGEST_FLASH or head_dim * call.dtype.itemsize % VECTOR_BYTES:
        return None
    return (
        f"one stage with {layout.context} context tokens and head dimension {head_dim}: beyond {ROW} tokens and up to "
        f"dimension {LARGEST_FLASH}, SDPA's forward is faster (an estimate, not measured on this GPU); its backward is "
        "not deterministic, so the backward of this call is served here"
    )


def attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, layout: AttentionLayout
) -> tuple[Tensor, Tensor]:
    """The output of :func:`msd_kernels.attention` and the log-sum-exp of each row of scores, flat."""
    y, log_sum = allocate.attention_outputs(q, layout)
    q, k, v = _parts(q, k, v)
    _run("forward", layout, q, q, k, v, y, log_sum)
    return y, log_sum


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    y: Tensor,
    log_sum: Tensor,
    layout: AttentionLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(q, k, v)``, None where not wanted; for a packed ``q`` one gradient in its layout."""
    gradients = allocate.gradients_like((q, k, v), wanted)
    dq, dk, dv = _parts(*gradients) if k is None else gradients
    q, k, v = _parts(q, k, v)
    delta = None if dk is None else torch.empty_like(log_sum)
    if dq is not None or dk is not None:
        outputs = (y,) if layout.context > ROW else ()  # whole rows of scores give delta more exactly
        _run("dq", layout, q, dy, q, k, v, *outputs, log_sum, dq, delta)
    if dk is not None or dv is not None:
        _run("dkv", layout, q, dy, q, k, v, log_sum, delta, dk, dv)
    return gradients


def _parts(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors that hold q, k and v: a packed one holds all three."""
    return (q, q, q) if k is None else (q, k, v)


def _plan(which: str, layout: AttentionLayout, like: Tensor) -> Plan:
    arithmetic = tuned.arithmetic(like.dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")
    parameters = INTERPRETED
    if like.device.type == "cuda":
        parameters = tuned.attention(tuned.architecture_of(like.device), arithmetic, which)
    return plan(layout, which, parameters, arithmetic, like.itemsize, like.device)


def _run(which: str, layout: AttentionLayout, like: Tensor, *tensors: Tensor | None) -> None:
    """One launch over all stages."""
    found = _plan(which, layout, like)
    if not found.table.tiles:
        return
    launch(
        _kernel(which, found.streams),
        found.table.tiles,
        like,
        *tensors,
        found.table.values,
        layout.tokens,
        layout.context,
        **found.constants,
        num_warps=found.warps,
    )


@cache
def _kernel(which: str, streams: bool):
    half = "forward" if which == "forward" else "backward"
    return import_module(f"msd_kernels.ops.attention.{half}_kernels").KERNELS[which, streams]
