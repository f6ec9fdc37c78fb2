"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import cuda_emulator
from helpers import unavailable
from msd_kernels.dispatch.backends import use
from msd_kernels.nn import norms


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors of these tests are too small to be worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the backend that the test is parametrised with; skips where this machine does not have it."""
    if reason := unavailable(request.param):
        pytest.skip(f"backend {request.param}: {reason}")
    with use(request.param):
        yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240617)


@pytest.fixture
def activations(monkeypatch) -> list[str | None]:
    """The activations of the calls of group_norm that the modules of msd_kernels.nn make."""
    called, op = [], norms.group_norm

    def group_norm(*args, activation: str | None = None, **kwargs) -> torch.Tensor:
        called.append(activation)
        return op(*args, activation=activation, **kwargs)

    monkeypatch.setattr(norms, "group_norm", group_norm)
    return called


@pytest.fixture
def exact_cuda() -> Iterator[None]:
    """Sums in float32, without TF32 and without partial sums in 16 bits, in the same order every time."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.fixture(scope="session")
def emulated_cuda() -> cuda_emulator.Emulator:
    """The CUDA kernels for the CPU, compiled once for all tests."""
    if reason := cuda_emulator.missing():
        pytest.skip(reason)
    return cuda_emulator.Emulator(cuda_emulator.build(cuda_emulator.REPOSITORY / "build" / "emulator"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After an illegal access no test of this process can pass: pytest-xdist puts a fresh worker in its place."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_available():
        return
    if report.failed and "gpu" in report.keywords:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)
