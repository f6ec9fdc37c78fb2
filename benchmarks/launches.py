"""Which Triton kernels a piece of work launches on a GPU, found where there is none.

The work runs on PyTorch's fake tensors, which have shapes and no memory. Every op of ours that it calls is served a
second time as for a GPU of :data:`ARCHITECTURE`, by the library's own choice of backends, plans and launch parameters,
up to the call of Triton: that is what :func:`recorded` notes down, with the types, alignments and constants on which
the machine code depends. Compiled CUDA kernels are taken as missing, so that what stands in for them is noted too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from msd_kernels import ops
from msd_kernels.dispatch import autocast as _autocast
from msd_kernels.dispatch.backends import OpBackends
from msd_kernels.dispatch.operator import NAMESPACE, Operator
from msd_kernels.runtime import cuda as compiled_cuda
from msd_kernels.runtime import launch, weight_buffers

ARCHITECTURE = 90
MULTIPROCESSORS = 132
WARP_SIZE = 32
_OPTIMAL_DENOISER = import_module("msd_kernels.ops.optimal_denoiser")


@dataclass(frozen=True)
class Pointer:
    """A tensor as Triton sees it: the type of its elements and where its memory starts."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """A kernel and everything that its machine code depends on.

    Attributes:
        module, kernel: where it is defined, and its name.
        arguments: tensors as :class:`Pointer`, numbers, None.
        options: constants and compiler options by name.
    """

    module: str
    kernel: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Launch:
        found = (
            0 if parameter.do_not_specialize else _as_passed(argument)
            for parameter, argument in zip(kernel.params, arguments, strict=False)
        )
        return Launch(kernel.module, kernel.__name__, tuple(found), tuple(options.items()))

    @property
    def function(self) -> Any:
        """The ``triton.jit`` function."""
        return getattr(import_module(self.module), self.kernel)

    def __str__(self) -> str:
        kinds = [
            str(a.dtype).removeprefix("torch.") if isinstance(a, Pointer) else type(a).__name__
            for a in self.arguments
        ]
        constants = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.kernel}({', '.join(kinds)}; {constants})"


def _as_passed(argument: Any) -> Any:
    """An argument with nothing left that the machine code does not depend on."""
    if isinstance(argument, torch.Tensor):
        return Pointer(argument.dtype, argument.storage_offset() * argument.itemsize % launch.ALIGNMENT)
    if type(argument) is int and argument > 1:  # of numbers only the kind counts: one of each stands for all
        aligned = argument % launch.ALIGNMENT == 0
        small = argument < 2**31
        return {(True, True): 16, (True, False): 17, (False, True): 2**32, (False, False): 2**32 + 1}[
            small, aligned
        ]
    return 0.5 if type(argument) is float else argument


class AbsentGPU:
    """What Triton's compiler asks a driver for, of a GPU that is not there."""

    def __init__(self, architecture: int = ARCHITECTURE) -> None:
        self._architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, WARP_SIZE)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@cache
def _fake_mode() -> FakeTensorMode:
    """One for all: plans are kept, and their tensors are of this mode."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@cache
def _kernels() -> dict[Any, Callable[..., Any]]:
    """The function behind each of our dispatcher ops."""
    modules = [
        import_module(f"{ops.__name__}.{m.name}")
        for m in iter_modules(ops.__path__)
        if not m.name.startswith("_")
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Operator)]
    return {operator._overload: operator._form.of_flat(operator._kernel) for operator in found}


class _LaunchesNothing(Exception):
    """Another backend than Triton serves a call."""


def _only_triton(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*arguments, **options):
        implementation = choose(*arguments, **options)
        if not implementation.__name__.endswith(".triton"):
            raise _LaunchesNothing
        return implementation

    return chosen


class _ServeOnGPU(TorchDispatchMode):
    """Serves each call of our ops on tensors that claim to be on a GPU, then lets it pass."""

    def __init__(self, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        super().__init__()
        self._around = around

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == NAMESPACE:
            # The optimal denoiser looks at the values of its results, behind its launches.
            with suppress(_LaunchesNothing, DataDependentOutputException):
                self._around(_kernels()[function])(*tree_map(_on_gpu, args))
        return function(*args, **(kwargs or {}))


def _on_gpu(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(_extent(value), dtype=value.dtype, device="cuda")
    return whole.as_strided(value.size(), value.stride(), value.storage_offset())


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the start of the memory to the last of the tensor."""
    last = sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))
    return tensor.storage_offset() + last + 1 if tensor.numel() else tensor.storage_offset()


def recorded(found: dict[Launch, None], architecture: int = ARCHITECTURE) -> AbstractContextManager[None]:
    """Notes in ``found`` what is launched inside, once each, in order; inside it is as in :func:`served_on_gpu`."""

    def note(kernel, arguments, options) -> None:
        found.setdefault(Launch.of(kernel, arguments, options))

    return served_on_gpu(note, architecture)


@contextmanager
def served_on_gpu(
    note: Callable[[Any, Sequence[Any], Mapping[str, Any]], None],
    architecture: int = ARCHITECTURE,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda kernel: kernel,
) -> Iterator[None]:
    """Calls ``note(kernel, arguments, options)`` for every launch of the ops that are called inside.

    Inside, tensors are fake and on the CPU; autocast there acts as on a GPU. ``around`` makes of the function that
    serves an op's call, on tensors that claim to be on a GPU, what is called in its place.
    """
    from triton import JITFunction

    def run(kernel, *arguments, grid, warmup, **options) -> None:
        note(kernel, arguments, options)

    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    ask_autocast = _autocast.lower_precision_dtype
    replaced = mock.patch.object
    changes = [
        replaced(JITFunction, "run", run),
        # Fake tensors have no values.
        replaced(_OPTIMAL_DENOISER, "_require_values"),
        # Triton's own dispatch sees every launch.
        replaced(launch, "_kinds", return_value=None),
        replaced(compiled_cuda, "cannot_run", return_value="left out to see what stands in for it"),
        replaced(OpBackends, "choose", _only_triton(OpBackends.choose)),
        replaced(_autocast, "lower_precision_dtype", lambda _: ask_autocast("cpu")),
        replaced(torch.cuda, "get_device_capability", return_value=divmod(architecture, 10)),
        replaced(torch.cuda, "get_device_properties", return_value=properties),
        replaced(torch.cuda, "current_device", return_value=0),
        # Which keeps plans from asking for streams.
        replaced(torch.cuda, "is_current_stream_capturing", return_value=True),
        # Fake tensors have no addresses, on which no machine code depends.
        replaced(weight_buffers, "address", lambda tensor: 0),
        # Group norm asks its tensors whether autocast is CUDA's.
        replaced(FakeTensor, "is_cuda", property(lambda tensor: True), create=True),
    ]
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        stack.enter_context(_fake_mode())
        stack.enter_context(_ServeOnGPU(around))
        yield
