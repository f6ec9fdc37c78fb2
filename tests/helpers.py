"""What the tests of the ops share."""

from __future__ import annotations

import io
import math
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msd_kernels import StageBatch
from msd_kernels.dispatch.backends import OpBackends
from msd_kernels.runtime.extension import load

# The largest relative error of rounding to nearest.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


# EDM's CIFAR-10 network, small, for the benchmarks of whole networks.
SMALL_EDM = {
    "family": "edm",
    "image_size": 8,
    "encoder_widths": (16,),
    "decoder_widths": (24, 16, 8),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.13,
    "augment_dim": 9,
}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that an element that nobody writes shows.

    PyTorch does so under deterministic algorithms; that a peer has no such algorithm on CUDA is not the point here.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def import_benchmarks() -> None:
    """Lets a test module import the benchmarks, or skips it where there are none."""
    benchmarks = Path(__file__).resolve().parent.parent / "benchmarks"
    if not benchmarks.is_dir():
        pytest.skip("benchmarks are not part of an install", allow_module_level=True)
    sys.path.append(str(benchmarks))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def warm_up(function: Callable[[], object]) -> None:
    """Calls it on a stream of its own, as ``torch.cuda.graph`` asks for before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def exact_float32(settings) -> Iterator[None]:
    """Products in full float32; ``settings`` are PyTorch's own, as ``torch.backends.cuda.matmul``."""
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def assert_elements_close(actual: Tensor, expected: Tensor, *, rtol: float, atol: float | Tensor) -> None:
    """Every element within ``atol + rtol * |expected|``; ``expected`` is float64. NaN never passes.

    ``atol`` may be a tensor, one bound per element. Half a step of the subnormal numbers is always allowed: that is
    the rounding of a result too small for ``rtol``.
    """
    assert actual.shape == expected.shape, f"shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    actual = actual.detach().cpu()
    error = (actual.double() - expected).abs()
    limits = torch.finfo(actual.dtype)
    excess = error - rtol * expected.abs() - atol - limits.smallest_normal * limits.eps / 2
    worst = excess.nan_to_num(nan=torch.inf).argmax()
    assert excess.flatten()[worst] <= 0, (
        f"worst element, flat index {worst}: got {actual.flatten()[worst].item():.6e}, "
        f"expected {expected.flatten()[worst].item():.6e}, error {error.flatten()[worst].item():.3e}, "
        f"allowed {(error - excess).flatten()[worst].item():.3e}"
    )


def stage_batch(
    generator: torch.Generator,
    counts: Sequence[int],
    channels: Sequence[int],
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> StageBatch:
    """A random StageBatch; its flat buffer is the leaf."""
    size = sum(n * c for n, c in zip(counts, channels, strict=True)) * height * width
    values = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return StageBatch(values.requires_grad_(requires_grad), tuple(counts), tuple(channels), height, width)


def parts_of(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Consecutive parts of a flat tensor in these shapes: the weights of all stages out of one leaf."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def conv_forward(module, tensors: Sequence[Tensor | None], layout, scale: float) -> Tensor:
    """A backend's convolution of x, skip, weight, bias, sample_bias and residual, those of all stages in one tensor."""
    x, skip, weight, bias, sample_bias, residual = tensors
    weights = parts_of(weight, layout.weight_shapes)
    biases = [] if bias is None else parts_of(bias, layout.bias_shapes)
    return module.grouped_conv2d(x, skip, sample_bias, residual, weights, biases, layout, scale)


def conv_backward(
    module, tensors: Sequence[Tensor | None], layout, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """A backend's gradients of x, skip, weight, bias and sample_bias, of dy, x, skip and weight as they."""
    dy, x, skip, weight = tensors
    want_x, want_skip, want_weight, want_bias, want_sample_bias = wanted
    stages = len(layout.counts)
    flags = [want_x, want_skip, want_sample_bias, *[want_weight] * stages, *[want_bias] * stages]
    parts = parts_of(weight, layout.weight_shapes)
    dx, dskip, dsample_bias, *others = module.grouped_conv2d_backward(dy, x, skip, parts, layout, flags)
    dweight, dbias = (
        torch.cat([g.reshape(-1) for g in gradients]) if flag else None
        for gradients, flag in ((others[:stages], want_weight), (others[stages:], want_bias))
    )
    return [dx, dskip, dweight, dbias, dsample_bias]


def backend_names(backends: OpBackends, device_type: str = "cpu") -> list[str]:
    """The op's backends that serve tensors on a device type, the reference last."""
    return [c.name for c in backends.candidates if c.devices is None or device_type in c.devices]


def each_backend(backends: OpBackends, device_type: str = "cpu") -> pytest.MarkDecorator:
    """Runs a test once per backend of an op, with that backend forced (see the fixture ``backend``)."""
    return pytest.mark.parametrize("backend", backend_names(backends, device_type), indirect=True)


def on_cuda(t: Tensor) -> Tensor:
    """A leaf on the GPU with the values of ``t``."""
    return t.detach().cuda().requires_grad_()


def unavailable(backend: str) -> str:
    """Why this machine cannot run a backend at all, or an empty string."""
    if backend in ("cpu", "cuda"):
        return load(backend).reason
    if backend == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    return ""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "msd_kernels":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def dispatcher_calls(function: Callable[[], object]) -> list[tuple[Callable, tuple]]:
    """The calls of this library's dispatcher ops while ``function`` runs, with copies of their arguments."""
    with _Recorder() as recorder:
        function()
    return [(op, tuple(map(_leaf_copy, args))) for op, args in recorder.calls]


def _leaf_copy(argument):
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.is_floating_point())


def pickled(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that went through pickle."""
    return pickle.loads(pickle.dumps(module))


def saved(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that went through ``torch.save``."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
