"""What the wrappers of the compiled CUDA kernels share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from msd_kernels.runtime.extension import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)


def cannot_run(dtype: torch.dtype) -> str | None:
    """Why no compiled CUDA kernel can serve tensors of a dtype on the current device, or None."""
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    return load("cuda").reason or _cannot_run_on(torch.cuda.current_device())


def run(kernel: Callable[..., None], on: Tensor, *arguments) -> None:
    """Calls a registered function of the library: its last argument is the current stream of the device of ``on``."""
    elsewhere = on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else nullcontext():
        kernel(*arguments, torch.cuda.current_stream().cuda_stream)


def serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture such as ``9.0``, ``9.0a`` or ``10.0+PTX`` runs on a device."""
    major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture).groups()
    built = int(major), int(minor)
    if suffix == "a":
        return built == capability
    return built <= capability and (built[0] == capability[0] or bool(ptx))


@cache
def _cannot_run_on(device: int) -> str | None:
    return cannot_run_with(torch.cuda.get_device_capability(device), _architectures())


def cannot_run_with(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Why code for some architectures does not run on a device, or None; also None where they are not known."""
    if capability < OLDEST_CAPABILITY:
        return "needs compute capability 8.0, got {}.{}".format(*capability)
    if architectures and not any(serves(architecture, capability) for architecture in architectures):
        return "was built for {}, got compute capability {}.{}".format(" ".join(architectures), *capability)
    return None


def _architectures() -> Sequence[str]:
    """What the extension was built for, or nothing where the host module that knows was not built."""
    try:
        return import_module("msd_kernels._host").build_info()["cuda_architectures"]
    except ImportError:
        return ()
