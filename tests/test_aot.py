"""Compilation of all Triton kernels without a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest

from msd_kernels import aot, tuned
from msd_kernels.triton import launch
from msd_kernels.triton.compilation import register_options

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


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("module", aot.kernel_modules())
def test_every_kernel_compiles_where_a_number_is_one(module):
    """A launch makes a constant of an integer that is 1, and a constant has no methods of a tensor."""
    errors = {}
    for compilation in _of_distinct_types(module):
        kernel, arguments = compilation.kernel, compilation.arguments
        for name in _specialised_numbers(compilation):
            one = replace(
                compilation,
                arguments={**arguments, name: None},
                constants={**compilation.constants, name: 1},
                tensor_cores=False,  # a loop of one pass is none
            )
            if error := aot.compile_one(one, 90).error:
                errors[kernel.__name__, compilation.configuration, name] = error
    assert not errors


def _of_distinct_types(module):
    found = aot.compilations(module, 90)
    return {(c.kernel, tuple(c.arguments.items())): c for c in found}.values()


def _specialised_numbers(compilation):
    """Integers of which a launch makes a constant where they are 1: neither excluded nor with a type of their own."""
    params = compilation.kernel.params
    excluded = {p.name for p in params if p.do_not_specialize or p.annotation_type}
    return {name for name, kind in compilation.arguments.items() if kind == "scalar i32"} - excluded


@pytest.mark.slow
@needs_compiler
def test_float64_products_fit_gpus_without_tensor_cores_for_them():
    reports = list(aot.compile_all([86], "optimal_denoiser"))
    assert {r.multiplies for r in reports} == {"-"}
    assert not [r for r in reports if r.error]


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


def test_registers_are_all_for_one_program_or_left_to_the_compiler():
    assert register_options(8, 1) == {"maxnreg": 255}
    assert register_options(16, 1) == {"maxnreg": 128}
    assert register_options(8, 2) == {}


@pytest.mark.parametrize("arithmetic", ["half", "tf32"])
@pytest.mark.parametrize("vector", [1, 8])
def test_pooled_launches_on_sm_90_finish_a_slice_before_the_next(arithmetic, vector):
    product = tuned.product(90, arithmetic).for_vectors(vector)
    wgrad = tuned.wgrad(90, arithmetic).for_vectors(vector)
    for launched in (product.launch(1024, 64, pooled=True), wgrad.launch(pooled=True)):
        assert (launched.wide.stages, launched.narrow.stages) == (1, 1)
    assert product.launch(1024, 64, pooled=False).wide.stages > 1


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
