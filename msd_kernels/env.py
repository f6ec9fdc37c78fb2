"""``python -m msd_kernels.env``: versions, devices, what was built, and which backend serves which op here."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

import msd_kernels
from msd_kernels.dispatch.backends import VARIABLE
from msd_kernels.runtime import extension as native
from msd_kernels.runtime import processor

PACKAGES = ("torch", "triton", "numpy", "safetensors", "ninja", "pybind11", "pytest", "pytest-benchmark")


def report() -> str:
    """All of it as text, one ``title`` line and indented lines below it per section."""
    lines = []
    for title, section in SECTIONS.items():
        lines.append(title)
        lines += [f"  {line}" for line in section()]
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    system = f"{platform.system()} {platform.machine()}"
    yield f"msd_kernels {msd_kernels.__version__}, Python {platform.python_version()} on {system}"
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name} not installed"


def _devices() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"cpu: {_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"
    yield f"  {processor.describe()}"
    if not torch.cuda.is_available():
        built = (
            f"this PyTorch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "a CPU build of PyTorch"
        )
        yield f"cuda: none visible ({built})"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            models = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(models, platform.processor())
    except OSError:
        return platform.processor()


def _built() -> Iterator[str]:
    for name in ("cpu", "cuda"):
        module, reason = native.load(name).module, native.load(name).reason
        yield f"{name}: {Path(module.__file__).name}" if module else f"{name}: unavailable, {reason}"
        if note := native.build_report().get(name, {}).get("note"):
            yield f"  {note}"
        for fact, value in module.build_info().items() if module else ():
            yield f"  {fact}: {value}"
    if module := native.load("cpu").module:
        yield f"cpu instruction set: {module.cpu_isa()}"


def _backends() -> Iterator[str]:
    yield f"{VARIABLE}={os.environ.get(VARIABLE, 'auto')}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op, example in EXAMPLES.items():
        explanation = example(device)
        yield f"{op} (bfloat16 on {device}): {explanation.backend} ({explanation.why})"
        for backend, reason in explanation.why_not.items():
            yield f"  not {backend}: {reason}"


def _batch(device: str, channels: tuple[int, ...] = (32, 16)) -> msd_kernels.StageBatch:
    values = torch.zeros(sum(channels) * 16, device=device, dtype=torch.bfloat16)
    return msd_kernels.StageBatch(values, (1,) * len(channels), channels, 4, 4)


def _weights(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


EXAMPLES: dict[str, Callable[[str], msd_kernels.Explanation]] = {
    "attention": lambda d: msd_kernels.explain("attention", *(_batch(d) for _ in range(3))),
    "group_norm": lambda d: msd_kernels.explain("group_norm", _batch(d), 4, activation="silu"),
    "grouped_conv2d": lambda d: msd_kernels.explain(
        "grouped_conv2d", _batch(d), _weights(d, (8, 32, 3, 3), (8, 16, 3, 3))
    ),
    "grouped_linear": lambda d: msd_kernels.explain(
        "grouped_linear", _batch(d), _weights(d, (8, 32), (8, 16))
    ),
    "optimal_denoiser": lambda d: msd_kernels.explain(
        "optimal_denoiser", torch.zeros(1, 4, device=d), torch.ones(1, device=d), torch.zeros(2, 4, device=d)
    ),
    "resample2d": lambda d: msd_kernels.explain("resample2d", _batch(d), (1, 3, 3, 1), up=2),
}

SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    "Versions": _versions,
    "Devices": _devices,
    "Compiled extension": _built,
    "Backends": _backends,
}


def main() -> None:
    try:
        print(report(), flush=True)
    except BrokenPipeError:  # a reader who leaves early, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit


if __name__ == "__main__":
    main()
