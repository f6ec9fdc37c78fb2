"""What the wrappers of the compiled CUDA kernels share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType

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


def kernels() -> ModuleType:
    """The compiled module, where :func:`cannot_run` has said that there is one."""
    return load("cuda").module


def run(launch: Callable[[int, int], None], on: Tensor) -> None:
    """Calls ``launch(device, stream)`` with the device of ``on`` as the current one, and its current stream."""
    device = on.device.index
    elsewhere = device != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        launch(device, torch.cuda.current_stream().cuda_stream)


def serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture such as ``9.0``, ``9.0a`` or ``10.0+PTX`` runs on a device."""
    major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture).groups()
    built = int(major), int(minor)
    if suffix == "a":
        return built == capability
    return built <= capability and (built[0] == capability[0] or bool(ptx))


@cache
def _cannot_run_on(device: int) -> str | None:
    architectures = kernels().build_info()["cuda_architectures"]
    return cannot_run_with(torch.cuda.get_device_capability(device), architectures)


def cannot_run_with(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Why code for some architectures does not run on a device, or None."""
    if capability < OLDEST_CAPABILITY:
        return "needs compute capability 8.0, got {}.{}".format(*capability)
    if not any(serves(architecture, capability) for architecture in architectures):
        return "was built for {}, got compute capability {}.{}".format(" ".join(architectures), *capability)
    return None
