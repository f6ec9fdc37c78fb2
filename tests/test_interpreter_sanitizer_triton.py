"""The interpreter's sanitizer finds planted faults, and nothing in kernels without."""

from __future__ import annotations

import pytest
import torch
from interpreter import require_interpreter

require_interpreter()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def _copy(source, target, size, shift, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets + shift, mask=offsets < size, other=0)
    tl.store(target + offsets, values, mask=offsets < size)


@triton.jit
def _write_over(target, stride, BLOCK: tl.constexpr):
    """Every program writes BLOCK elements, ``stride`` behind those of the one before."""
    tl.store(target + tl.program_id(0) * stride + tl.arange(0, BLOCK), tl.arange(0, BLOCK))


@triton.jit
def _neighbours(data, size, BLOCK: tl.constexpr):
    """In place: every program reads an element of the next."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(data + offsets + 1, mask=offsets + 1 < size, other=0)
    tl.store(data + offsets, values, mask=offsets < size)


@triton.jit
def _lanes(target, DIFFERENT: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(target + lanes // 2, lanes * DIFFERENT)


@triton.jit
def _promise(target, number, MULTIPLE: tl.constexpr):
    tl.store(target, tl.multiple_of(number, MULTIPLE))


@triton.jit
def _count(target):
    tl.atomic_add(target, 1)


def integers(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32)


def test_a_kernel_without_faults_passes():
    source, target = integers(21), integers(21)
    _copy[(3,)](source, target, 21, 0, BLOCK=8)
    assert torch.equal(source, target)
    _write_over[(3,)](target, 7, BLOCK=4)
    _neighbours[(1,)](target, 21, BLOCK=32)  # one program alone has nobody to race with
    _lanes[(1,)](target, False, BLOCK=8)
    _promise[(1,)](target, 24, MULTIPLE=8)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda: _copy[(3,)](integers(21), integers(21), 21, 1, BLOCK=8), "load of 4 bytes at byte 84 of a tensor's"),
        (lambda: _copy[(3,)](integers(24), integers(21), 24, 0, BLOCK=8), "store of 4 bytes at byte 92 of a tensor's"),
        (lambda: _copy[(3,)](integers(21), integers(21), 21, -(2**40), BLOCK=8), "load at 0x.* before all tensors"),
        (lambda: _write_over[(2,)](integers(9), 3, BLOCK=4), "race at byte 12: program 1 writes what program 0 writes"),
        (lambda: _neighbours[(2,)](integers(8), 8, BLOCK=4), "race at byte 16: program 1 writes what program 0 reads"),
        (lambda: _lanes[(1,)](integers(8), True, BLOCK=8), "different values to one address in one store"),
        (lambda: _promise[(1,)](integers(1), 20, MULTIPLE=8), r"tl.multiple_of\(20, 8\)"),
        (lambda: _count[(1,)](integers(1)), "atomics are not checked"),
    ],
    ids=["load beyond", "store beyond", "load before", "writers", "reader and writer", "lanes", "promise", "atomics"],
)  # fmt: skip
def test_a_planted_fault_is_found(launch, message):
    with pytest.raises(Exception, match=message):
        launch()
