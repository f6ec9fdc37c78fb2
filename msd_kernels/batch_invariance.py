"""Results of a sample that do not depend on its batch, bit for bit, on the CPU.

The libraries behind PyTorch choose how to sum by the size of the whole batch, and elementwise functions treat what is
left at the end of a thread's share unlike the rest. Inside of :func:`batch_invariant` three rules take both away:

- What sums over features runs sample by sample, along dimension 0, on inputs of one layout and alignment: the calls
  are then the same ones whatever the batch. :mod:`msd_kernels` does so with its own ops.
- Elementwise functions that are no single operation of IEEE arithmetic run on blocks of one size, so that the
  processor's vectors hold every element.
- What can be neither is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from msd_kernels import _private

__all__ = ["batch_invariant"]

BLOCK = 16384  # elements, few enough for one thread
ALIGNMENT = 64  # bytes, as PyTorch allocates

NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg)

ELEMENTWISE = """
    acos acosh arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh celu cos
    cosh digamma elu erf erfc erfinv exp exp2 expit expm1 float_power gelu hardsigmoid hardswish hypot i0
    ldexp lgamma log log10 log1p log2 log_ndtr logaddexp logaddexp2 logit logsigmoid mish ndtr ndtri pow
    __pow__ __rpow__ reciprocal rsqrt selu sigmoid silu sin sinc sinh softplus softsign sqrt tan tanh
    tanhshrink xlog1py xlogy addcdiv addcmul lerp
"""
# The least number of dimensions of an input with a batch.
BY_SAMPLE = {
    "linear": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5,
    "conv_transpose1d": 3, "conv_transpose2d": 4, "conv_transpose3d": 5,
    "avg_pool1d": 3, "avg_pool2d": 4, "avg_pool3d": 5, "lp_pool1d": 3, "lp_pool2d": 4,
    "adaptive_avg_pool1d": 3, "adaptive_avg_pool2d": 4, "adaptive_avg_pool3d": 5,
    "interpolate": 3, "upsample": 3, "fold": 3, "group_norm": 2, "instance_norm": 2, "local_response_norm": 3,
}  # fmt: skip
# Where the dimensions that are summed over stand among the arguments, and their default; None: all.
REDUCED = {
    "softmax": (1, None), "log_softmax": (1, None), "softmin": (1, None), "logsumexp": (1, None), "glu": (1, -1),
    "sum": (1, None), "nansum": (1, None), "mean": (1, None), "nanmean": (1, None), "prod": (1, None),
    "var": (1, None), "std": (1, None), "var_mean": (1, None), "std_mean": (1, None),
    "norm": (2, None), "vector_norm": (2, None), "normalize": (2, 1),
    "cumsum": (1, None), "cumprod": (1, None),
}  # fmt: skip
REFUSED = """
    multi_head_attention_forward bilinear tensordot inner chain_matmul multi_dot vecdot cdist pdist addbmm addmv
    addmm_ addmv_ addbmm_ baddbmm_ embedding_bag lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell cosine_similarity grid_sample cov corrcoef
"""


class _State(threading.local):
    active = False
    single = False  # what runs is a call for one sample


_state = _State()


def active() -> bool:
    """Whether the calling thread is inside of :func:`batch_invariant`."""
    return _state.active


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside of this context, what is computed for a sample depends on that sample alone, bit for bit, on the CPU.

    Size and order of the batch and the stages of the neighbours then change nothing, in float32, bfloat16, float16 and
    float64: a sample gives the bits that it gives alone. Outside, results agree to rounding. It holds for the calling
    thread, on one machine and number of threads, and may be nested::

        with msd_kernels.batch_invariant():
            y = network(x, noise, stage)

    It covers the ops of this package and, of PyTorch's functions on tensors whose dimension 0 counts samples, the
    convolutions, linear layers, matrix products, ``scaled_dot_product_attention``, normalisations, poolings, sums and
    elementwise functions: any network of such layers. What calls ``torch.ops`` itself or a compiled extension of its
    own is not seen. It is about the forward: gradients of weights sum over the batch, and all gradients agree to
    rounding. A mixed batch of 8 through EDM's CIFAR-10 network takes 1.04 to 1.32 times the processor's time of the
    ordinary call (float32, five pairs of calls on a busy AVX2 processor, one thread; median 1.15).

    Raises, from the call in question:
        NotImplementedError: tensors on another device than the CPU (GPU kernels are not promised); inside of
            ``torch.compile``; a function that has no sample-by-sample form here, such as
            ``torch.nn.MultiheadAttention``, recurrent layers, or batch normalisation in training.
    """
    if active():
        yield
        return
    refuse_compilation()
    _state.active = True
    try:
        with _Functions():
            yield
    finally:
        _state.active = False


def refuse_compilation() -> None:
    """Raises NotImplementedError inside of a compiled function."""
    if torch.compiler.is_compiling() or callable(_private.compiled_frames()):
        raise NotImplementedError(
            "batch_invariant: what torch.compile fuses and orders anew is not promised; call the function uncompiled, "
            "for instance inside of torch.compiler.set_stance('force_eager')"
        )


class _Functions(TorchFunctionMode):
    """Gives PyTorch's functions to their rule; the calls that a rule makes are PyTorch's own again."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rule = None if _state.single else RULES.get(function)
        if rule is None:
            return function(*args, **(kwargs or {}))
        refuse_compilation()
        return rule(function, *args, **(kwargs or {}))


@contextmanager
def single_samples() -> Iterator[None]:
    """Leaves PyTorch's functions as they are, for calls that are made sample by sample already."""
    before, _state.single = _state.single, True
    try:
        with _private.without_function_modes():  # which would only pass every call on
            yield
    finally:
        _state.single = before


def elementwise(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """``function(x)``, in blocks inside of :func:`batch_invariant`; for code that runs below PyTorch's dispatcher."""
    return _elementwise(function, x) if active() else function(x)


def require_cpu(*tensors: Tensor | None) -> None:
    """Raises NotImplementedError for a tensor elsewhere."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type not in ("cpu", "meta"):
            raise NotImplementedError(
                f"batch_invariant: holds on the CPU, got a tensor on {tensor.device}; GPU kernels are not promised"
            )


def of_one_layout(sample: Tensor) -> Tensor:
    """A sample ``[1, ...]`` as kernels are to see it: dense, of the strides that follow from its shape, aligned.

    Kernels may be chosen by strides, those of dimensions of size 1 included, and by the alignment of the first element.
    """
    if sample.is_meta:
        return sample
    nhwc = sample.dim() == 4 and not sample.is_contiguous() and sample.permute(0, 2, 3, 1).is_contiguous()
    flat = (sample.permute(0, 2, 3, 1) if nhwc else sample).reshape(-1)
    if flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()
    if not nhwc:
        return flat.view(sample.shape)
    n, channels, height, width = sample.shape
    return flat.view(n, height, width, channels).permute(0, 3, 1, 2)


def _elementwise(function, *args, inplace: bool = False, **kwargs) -> Tensor:
    """On blocks of one size."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    _refuse_out(function, kwargs)
    require_cpu(*tensors)
    spread = [t for t in tensors if t.dim()] or tensors
    shape = torch.broadcast_shapes(*(t.shape for t in spread))
    if 0 in shape or any(t.is_meta for t in tensors):
        return function(*args, **kwargs)
    first = max(spread, key=lambda t: (t.dim(), t.numel()))
    order = sorted(range(len(shape)), key=lambda d: -first.stride(d))  # as it lies in memory
    blocks = [_blocks(a.expand(shape).permute(order)) if any(a is t for t in spread) else None for a in args]
    count = next(len(b) for b in blocks if b is not None)
    parts = [
        function(*(a if b is None else b[i] for a, b in zip(args, blocks, strict=True)), **kwargs)
        for i in range(count)
    ]
    flat = parts[0] if count == 1 else torch.cat(parts)
    result = flat[: shape.numel()].view([shape[d] for d in order])
    result = result.permute([order.index(d) for d in range(len(shape))])
    return args[0].copy_(result) if inplace else result


def _blocks(x: Tensor) -> Sequence[Tensor]:
    flat = x.reshape(-1)
    missing = -flat.numel() % BLOCK
    if missing:
        flat = F.pad(flat, (0, missing), value=1)
    elif flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()
    return flat.split(BLOCK)


def _in_place(name: str) -> Callable[..., Tensor]:
    """The rule of ``x.name_()``."""
    function = next(getattr(space, name) for space in NAMESPACES if hasattr(space, name))
    return lambda _, *args, **kwargs: _elementwise(function, *args, inplace=True, **kwargs)


def _each(count: int, rank: int, call: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Joins ``call(*parts)`` for every sample.

    A tensor of ``rank`` dimensions with ``count`` samples gives its sample; another one belongs to all samples.
    """
    require_cpu(*tensors)

    def part(tensor: Tensor | None, i: int) -> Tensor | None:
        if tensor is None or tensor.dim() != rank or tensor.shape[0] != count:
            return tensor
        return of_one_layout(tensor[i : i + 1])

    if count == 0:
        return call(*tensors)
    parts = [call(*(part(tensor, i) for tensor in tensors)) for i in range(count)]
    return joined(parts)


def joined(parts: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
    """Results of single samples as those of their batch."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(tuple(parts))
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def _by_sample(least: int, function, input: Tensor, *args, **kwargs):
    _refuse_out(function, kwargs)
    if input.dim() < least:
        return function(input, *args, **kwargs)
    return _each(input.shape[0], input.dim(), lambda x: function(x, *args, **kwargs), input)


def _layer_norm(function, input: Tensor, normalized_shape, *args, **kwargs):
    return _by_sample(len(normalized_shape) + 1, function, input, normalized_shape, *args, **kwargs)


def _batch_norm(
    function,
    input: Tensor,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    *args,
    **kwargs,
):
    if training:
        raise NotImplementedError(
            "batch_invariant: batch normalisation in training takes statistics of the batch"
        )
    return _by_sample(2, function, input, running_mean, running_var, weight, bias, training, *args, **kwargs)


def _reduced(position: int, default: int | None, function, input: Tensor, *args, **kwargs):
    """Sums over dimensions among which may be that of the samples, which is then meant to be summed over."""
    _refuse_out(function, kwargs)
    dims = kwargs.get("dim", kwargs.get("axis", args[position - 1] if len(args) >= position else default))
    if dims is None or isinstance(dims, bool) or not (input.is_floating_point() or input.is_complex()):
        return function(input, *args, **kwargs)
    dims = dims if isinstance(dims, Iterable) else (dims,)
    if input.dim() < 2 or not dims or 0 in {d % input.dim() for d in dims}:
        return function(input, *args, **kwargs)
    return _by_sample(2, function, input, *args, **kwargs)


def _product(function, input: Tensor, other: Tensor, **kwargs):
    """``input @ other``: along the first dimension of the result, which may come from either."""
    _refuse_out(function, kwargs)
    rank = max(input.dim(), other.dim())
    if input.dim() == 2 >= other.dim():  # rows of the first; the second holds weights
        return _each(input.shape[0], 2, lambda a: function(a, other), input)
    if rank < 3:
        return function(input, other)
    count = max(t.shape[0] for t in (input, other) if t.dim() == rank)
    return _each(count, rank, function, input, other)


def _right_product(function, input: Tensor, other: Tensor):
    """``input.__rmatmul__(other)``"""
    return _product(torch.matmul, other, input)


def _added_product(rank: int, function, input: Tensor, first: Tensor, second: Tensor, **kwargs):
    _refuse_out(function, kwargs)
    if rank == 2:
        return _each(first.shape[0], 2, lambda a, i: function(i, a, second, **kwargs), first, input)
    return _each(first.shape[0], 3, lambda i, a, b: function(i, a, b, **kwargs), input, first, second)


def _attention(
    function, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args, **kwargs
):
    if query.dim() < 3:
        return function(query, key, value, attn_mask, *args, **kwargs)
    tensors = (query, key, value, attn_mask)
    return _each(query.shape[0], query.dim(), lambda *parts: function(*parts, *args, **kwargs), *tensors)


def _einsum(function, equation: str, *operands: Tensor):
    """Along the first index of the result."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    inputs, arrow, output = (
        equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    )
    if not arrow or "." in inputs:
        raise NotImplementedError(
            "batch_invariant: einsum needs an equation with '->' and without '...', whose result begins with the "
            f"index of the samples, got {equation!r}"
        )
    terms = inputs.split(",")
    require_cpu(*operands)
    if not output:
        return function(equation, *operands)
    along = [term.find(output[0]) for term in terms]
    count = next(x.shape[d] for x, d in zip(operands, along, strict=True) if d >= 0)

    def part(x: Tensor, d: int, i: int) -> Tensor:
        return x if d < 0 else of_one_layout(x.narrow(d, i, 1).transpose(0, d)).transpose(0, d)

    if count == 0:
        return function(equation, *operands)
    return joined(
        [
            function(equation, *(part(x, d, i) for x, d in zip(operands, along, strict=True)))
            for i in range(count)
        ]
    )


def _refused(function, *args, **kwargs):
    raise NotImplementedError(
        f"batch_invariant: {function.__name__} has no sample-by-sample form here; use layers of torch.nn.functional's "
        "convolutions, linear, matmul and scaled_dot_product_attention"
    )


def _refuse_out(function, kwargs: dict[str, Any]) -> None:
    if kwargs.get("out") is not None:
        raise NotImplementedError(
            f"batch_invariant: {function.__name__} with out= is not covered; assign the result"
        )


def _rules() -> dict[Callable, Callable]:
    """By function, under each of its names."""
    rules: dict[str, Callable] = dict.fromkeys(ELEMENTWISE.split(), _elementwise)
    rules |= {f"{name}_": _in_place(name) for name in rules if not name.startswith("__")}
    rules["__ipow__"] = _in_place("pow")
    rules |= {name: partial(_by_sample, least) for name, least in BY_SAMPLE.items()}
    rules |= {name: partial(_reduced, *where) for name, where in REDUCED.items()}
    rules |= dict.fromkeys(REFUSED.split(), _refused)
    rules |= dict.fromkeys(("matmul", "__matmul__", "mm", "bmm", "mv"), _product)
    rules |= {
        "__rmatmul__": _right_product,
        "addmm": partial(_added_product, 2),
        "baddbmm": partial(_added_product, 3),
        "einsum": _einsum,
        "scaled_dot_product_attention": _attention,
        "layer_norm": _layer_norm,
        "rms_norm": _layer_norm,
        "batch_norm": _batch_norm,
    }
    found = ((getattr(space, name, None), rule) for name, rule in rules.items() for space in NAMESPACES)
    return {function: rule for function, rule in found if function is not None}


RULES = _rules()
