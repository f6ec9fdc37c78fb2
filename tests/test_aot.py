"""Compilation of all Triton kernels without a GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from msd_kernels import aot, tuned
from msd_kernels.triton import launch

needs_compiler = pytest.mark.skipif(
    bool(launch.unavailable()) or launch.interpreted(), reason="needs Triton's compiler"
)

LOOP = """
$L__BB0_1:                              // header
    ld.global.b32 { %r0 }, [ %rd0 + 0 ];
$L__BB0_2:
    @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
    ld.global.v2.b32 { %r4, %r5 }, [ %rd1 + 0 ];
    @%p2 bra $L__BB0_2;
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%f0}, %rd3, %rd4;
    bra.uni $L__BB0_2;
    @%p3 bra $L__BB0_1;
waitLoop:
    @!complete bra.uni waitLoop;
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("module", aot.kernel_modules())
def test_every_kernel_compiles_without_spills(module):
    command = [sys.executable, "-m", "msd_kernels.aot", "--only", module]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 not well" in result.stdout


@needs_compiler
@pytest.mark.parametrize("module", aot.kernel_modules())
def test_every_kernel_is_registered(module):
    from triton import JITFunction

    defined = {
        name
        for name, value in vars(import_module(module)).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and value.__module__ == module
    }
    for architecture in tuned.architectures():
        registered = {c.kernel.__name__ for c in aot.compilations(module, architecture)}
        assert defined == registered


def test_innermost_loops_are_those_that_work():
    (loop,) = aot.innermost_loops(LOOP)
    assert len(loop) == 6
    assert loop[0] == "$L__BB0_2:"
    assert any(aot.TENSOR_CORES["wgmma"] in line for line in loop)


def test_loads_count_bytes_per_instruction():
    assert aot._loads(aot.innermost_loops(LOOP)) == (24, 16)


def test_table_shows_errors():
    report = aot.Report("_a_kernel", "bf16", 90, registers=255, spilled=8, error="spills 8 bytes")
    assert "spills 8 bytes" in aot.format_table([report]).splitlines()[1]
