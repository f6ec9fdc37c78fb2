"""Whether Triton kernels can run, and the one place that launches them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

from msd_kernels.runtime.compilation import OPTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_ARCHITECTURE = 80
INTERPRETED_MULTIPROCESSORS = 3
# Triton compiles anew for tensors and integers that are not multiples of this.
ALIGNMENT = 16
MAX_COMPILED = 4096

# By kernel, device, kinds of arguments and options: what Triton compiled, and the constants that it wants to see again.
_compiled: dict[tuple, tuple] = {}


@cache
def unavailable() -> str:
    """Why Triton cannot be used in this process, or an empty string."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    return ""


@cache
def interpreted() -> bool:
    """Whether kernels run on CPU tensors in Triton's interpreter: ``TRITON_INTERPRET=1`` from the start."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return asked and find_spec("triton") is not None


def devices() -> tuple[str, ...]:
    """Device types whose tensors the kernels can read in this process."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def slower_than_others(device_type: str) -> str | None:
    """Why any other backend is preferred on a device, or None."""
    return None if device_type == "cuda" else "Triton's interpreter is for tests; force the backend to use it"


def cannot_run(device_type: str, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel of this package can serve tensors of a device type and dtype, or None."""
    if unavailable():
        return unavailable()
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    if device_type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter truncates to bfloat16 and multiplies it wrongly"
    if device_type == "cuda" and torch.cuda.get_device_capability() < divmod(OLDEST_ARCHITECTURE, 10):
        return f"needs compute capability 8.0, got {torch.cuda.get_device_capability()}"
    if device_type == "cuda" and not _has_compiler():
        return "needs a C compiler, with which Triton builds its launchers: install gcc or clang, or set CC"
    return None


@cache
def _has_compiler() -> bool:
    """Where Triton looks for one (``triton.runtime.build``)."""
    return bool(os.environ.get("CC") or which("gcc") or which("clang"))


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter a few, so that the walk over tiles is exercised."""
    return _multiprocessors_of_gpu(device) if device.type == "cuda" else INTERPRETED_MULTIPROCESSORS


@cache
def _multiprocessors_of_gpu(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device, tiles: int, per_multiprocessor: int) -> int:
    """The size of a grid that walks ``tiles`` tiles."""
    return min(tiles, multiprocessors(device) * per_multiprocessor)


def launch(kernel, grid: int, on: Tensor, *arguments, by_value: Sequence[int] = (), **options) -> None:
    """Runs ``grid`` programs of a kernel on the device of ``on``.

    ``arguments`` are the kernel's first parameters, then come numbers ``by_value``, on which its code does not depend;
    ``options`` are its constants and the compiler's. Triton's own dispatch
    binds and looks up all of them in every call, which takes the host longer than many of the kernels take the GPU.
    Here it does so once for each kind of arguments; after that, what it compiled is launched directly, without the
    hooks that run before Triton's dispatch and without regard to settings of its compiler that change later.
    """
    elsewhere = on.device.type == "cuda" and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else nullcontext():
        kinds = _kinds(arguments)
        key = (id(kernel), on.device, kinds, tuple(options), tuple(options.values()))
        found = _compiled.get(key) if kinds else None
        arguments = (*arguments, *by_value)
        if found is not None:
            compiled, constants = found
            compiled[grid, 1, 1](*arguments, *constants)
            return
        fix_cache_keys(kernel.__module__)
        compiled = kernel[(grid,)](*arguments, **OPTIONS, **options)
        if compiled is not None and kinds:
            if len(_compiled) >= MAX_COMPILED:
                _compiled.clear()
            _compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(arguments) :]]


@cache
def fix_cache_keys(module: str) -> None:
    """Gives all functions of a module of kernels the keys by which Triton's cache on disk finds them.

    A key tells the constants of the functions that a function calls, but only of those whose own key was asked for
    before: left to Triton, it depends on which kernels a process launched earlier, and what another process compiled
    is compiled again. So keys are asked for in the order of the definitions, those of imported functions first.
    """
    from triton import JITFunction

    for value in list(vars(sys.modules[module]).values()):
        if isinstance(value, JITFunction):
            if value.__module__ != module:
                fix_cache_keys(value.__module__)
            _ = value.cache_key


def _kinds(arguments: Sequence) -> tuple | None:
    """What the compiled kernel depends on: types, and of integers whether they are 1, multiples of 16, or large.

    None where a tensor is not aligned.
    """
    kinds, addresses = [], 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            addresses |= argument.data_ptr()
            kinds.append(argument.dtype)
        elif type(argument) is int:
            small = 0 <= argument < 2**31
            kinds.append((argument == 1, argument % ALIGNMENT == 0) if small else argument)
        else:
            kinds.append(float if type(argument) is float else argument)
    return None if addresses % ALIGNMENT else tuple(kinds)
