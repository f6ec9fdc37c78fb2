"""How kernels are launched: Triton's compiler with a driver that records instead of a GPU."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from msd_kernels.runtime import launch

pytestmark = pytest.mark.skipif(
    bool(launch.unavailable()) or launch.interpreted() or torch.cuda.is_available(),
    reason="needs Triton's compiler, and no GPU that would be launched on",
)

# Where a launcher takes what profilers are told.
METADATA = 6


class Recorder:
    """A driver of Triton for a GPU that is not there."""

    def __init__(self):
        self.launches = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, binary, shared, device: (name, object(), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 1234

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launches.append(arguments)


@pytest.fixture
def recorder(monkeypatch):
    from triton.runtime import driver

    monkeypatch.setattr(launch, "_compiled", {})
    recorder = Recorder()
    monkeypatch.setattr(driver, "_active", recorder)
    return recorder


@pytest.fixture
def kernel(recorder):
    """A small one, new in each test: Triton remembers what it compiled for a device."""
    import triton

    from msd_kernels.ops.grouped_conv2d.wgrad_kernels import _grouped_conv2d_sum_partials_kernel as kernel

    kernel = triton.jit(kernel.fn)
    yield kernel
    launch._compiled.clear()
    kernel.device_caches.clear()
    gc.collect()  # while there is a driver that can unload them


def run(kernel, dtype=torch.float32, offset=0, grid=3, bias=True):
    workspace, table = torch.zeros(64), torch.zeros(7, 4, dtype=torch.int64)
    weight = torch.zeros(64, dtype=dtype)[offset:]
    tensors = (workspace, weight, torch.zeros(64, dtype=dtype) if bias else None, None, table)
    constants = {"PROBLEMS": 4, "BLOCK_TERMS": 4, "BLOCK": 16, "BIAS_BLOCK_TERMS": 4, "BIAS_BLOCK": 16}
    launch.launch(kernel, grid, workspace, *tensors, **constants)


def same(a, b) -> bool:
    """Whether two launches are one but for their tensors' memory and what profilers are told about them."""
    pairs = [pair for i, pair in enumerate(zip(a, b, strict=True)) if i != METADATA]
    return all(
        (x.dtype, x.shape) == (y.dtype, y.shape) if isinstance(x, torch.Tensor) else x == y for x, y in pairs
    )


def test_the_second_launch_passes_what_the_first_did_without_asking_triton(recorder, kernel, monkeypatch):
    run(kernel)
    monkeypatch.setattr(kernel, "run", None)
    run(kernel)
    first, second = recorder.launches
    assert first[:4] == (3, 1, 1, 1234)
    assert [type(a) for a in first].count(torch.Tensor) == 4
    assert same(first, second)


def test_keys_are_fixed_before_triton_looks_a_kernel_up(recorder, kernel, monkeypatch):
    """Else its name in the cache on disk depends on what else this process has launched."""
    settled = []

    def fix_cache_keys(module):
        settled.append((module, len(recorder.launches)))

    monkeypatch.setattr(launch, "fix_cache_keys", fix_cache_keys)
    run(kernel)
    run(kernel)
    assert settled == [("msd_kernels.ops.grouped_conv2d.wgrad_kernels", 0)]


def test_grids_differ_between_launches_of_one_kernel(recorder, kernel, monkeypatch):
    run(kernel, grid=3)
    monkeypatch.setattr(kernel, "run", None)
    run(kernel, grid=70)
    assert [grid for grid, *_ in recorder.launches] == [3, 70]


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"bias": False}], ids=str)
def test_other_kinds_of_tensors_have_a_kernel_of_their_own(change, recorder, kernel):
    run(kernel)
    run(kernel, **change)
    run(kernel, **change)
    first, second, third = recorder.launches
    assert not same(first, second)
    assert same(second, third)
    assert first[4] != second[4] == third[4]  # the loaded functions


def test_memory_that_is_not_aligned_is_left_to_triton(recorder, kernel, monkeypatch):
    run(kernel)
    run(kernel, offset=1)
    aligned, unaligned = recorder.launches
    assert aligned[4] != unaligned[4]
    monkeypatch.setattr(kernel, "run", None)
    with pytest.raises(TypeError):
        run(kernel, offset=1)


def test_another_device_or_another_option_is_not_mixed_up(recorder, kernel):
    run(kernel)
    ((key, _),) = launch._compiled.items()
    assert torch.device("cpu") in key
    assert ("PROBLEMS", "BLOCK_TERMS", "BLOCK", "BIAS_BLOCK_TERMS", "BIAS_BLOCK") in key
    assert (4, 4, 16, 4, 16) in key


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (17, 33, True),
        (16, 4096, True),
        (16, 17, False),
        (1, 17, False),
        (2**31, 2**31 + 1, False),
        (2**31 - 16, 2**31, False),
        (0.5, 1.0, True),
        (1, 1.0, False),
        (None, 1.0, False),
    ],
)
def test_numbers_are_of_one_kind_where_triton_compiles_one_kernel(one, other, equal):
    assert (launch._kinds((one,)) == launch._kinds((other,))) == equal


def test_old_kernels_are_forgotten_when_there_are_too_many(recorder, kernel, monkeypatch):
    monkeypatch.setattr(launch, "MAX_COMPILED", 1)
    run(kernel)
    run(kernel, bias=False)
    assert len(launch._compiled) == 1
