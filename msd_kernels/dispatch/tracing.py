"""What ``torch.jit.trace`` and ``torch.fx.symbolic_trace`` record of a call on dense tensors.

A trace keeps every integer of a registered op as a constant, the sizes of the example among them. Dense calls are
therefore recorded as PyTorch's own ops, which take sizes from their inputs. The sizes of a StageBatch are constants by
nature: its calls are recorded as the registered ops, which refuse tensors of other sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from msd_kernels import _private
from msd_kernels.dispatch import autocast
from msd_kernels.dispatch.dtypes import wide
from msd_kernels.stage_batch import StageBatch

__all__ = ["Proxy", "attention", "group_norm", "is_traced", "resample2d", "symbolic"]


def is_traced(x: Tensor | StageBatch) -> bool:
    """Whether ``torch.jit.trace`` records a call on a dense ``x``."""
    return not torch.compiler.is_compiling() and _private.is_tracing() and isinstance(x, Tensor)


def symbolic(function: Callable, x: Proxy, *args, **kwargs) -> Proxy:
    """One call of ``function`` in the graph that ``torch.fx`` records."""
    return x.tracer.create_proxy("call_function", function, (x, *args), kwargs)


@contextmanager
def _constants() -> Iterator[None]:
    """What is made of numbers inside is meant to be constant, of which PyTorch would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def _in_order_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` as ``x`` lies in memory: NCHW or channels_last."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last) if last else y


def group_norm(
    prepare: Callable,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    """As the op of that name on dense tensors; ``prepare`` is that op's, which checks the call."""
    with _constants():
        prepare(x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation)
    tensors = autocast.to_float32_on_cuda(x.device.type, x, weight, bias, scale, shift)
    dtype = tensors[0].dtype
    wide_x, weight, bias, scale, shift = (t if t is None else t.to(wide(dtype)) for t in tensors)
    y = torch.group_norm(wide_x, num_groups, weight, bias, eps)
    per_sample = (..., *[None] * (x.dim() - 2))
    if scale is not None:
        y = y * (1 + scale[per_sample])
    if shift is not None:
        y = y + shift[per_sample]
    if activation == "silu":
        y = F.silu(y)
    return _in_order_of(x, y.to(dtype))


def attention(
    prepare: Callable,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    num_heads: int,
    scale: float | None,
    layout: str | None,
) -> Tensor:
    """As the op of that name on dense tensors; ``prepare`` is that op's, which checks the call."""
    with _constants():
        prepare(q, k, v, num_heads=num_heads, scale=scale, layout=layout)
    if k is not None:
        q, k, v = autocast.to_lower_precision(q.device.type, q, k, v)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    (packed,) = autocast.to_lower_precision(q.device.type, q)
    sizes, part = {
        "interleaved": ((num_heads, -1, 3), 3),
        "per_head": ((num_heads, 3, -1), 2),
        "blocked": ((3, num_heads, -1), 1),
    }[layout]
    parts = packed.flatten(2).unflatten(1, sizes).unbind(part)
    y = F.scaled_dot_product_attention(*(t.transpose(-1, -2) for t in parts), scale=scale)
    y = y.transpose(-1, -2).flatten(1, 2)
    return _in_order_of(q, y.reshape(y.shape[0], y.shape[1], q.shape[2], q.shape[3]))


def resample2d(prepare: Callable, x: Tensor, filter: Sequence[float], up: int, down: int) -> Tensor:
    """As the op of that name on dense tensors; ``prepare`` is that op's, which checks the call."""
    (x,) = autocast.to_lower_precision(x.device.type, x)
    with _constants():
        taps = prepare(x, filter, up, down)[1].taps
        products = [[a * b for b in taps] for a in taps]
        weight = torch.tensor(products, dtype=wide(x.dtype), device=x.device)[None, None]
    convolve = F.conv_transpose2d if up == 2 else F.conv2d
    planes = x.to(wide(x.dtype)).flatten(0, 1)[:, None]
    with torch.autocast(x.device.type, enabled=False):
        y = convolve(planes, weight, stride=max(up, down), padding=(len(taps) - 1) // 2)
    y = y.reshape(x.shape[0], x.shape[1], y.shape[2], y.shape[3]).to(x.dtype)
    return _in_order_of(x, y)
