"""Compilation of all Triton kernels without a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest

from msd_kernels.runtime import launch, tuned
from msd_kernels.runtime.compilation import register_options
from msd_kernels.tools import aot

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


# Releases of Triton that the launch tables were made with: nothing spills there. Every release brings its own ptxas,
# and whether the last few values find a register is the choice of that ptxas: no table suits all of them.
RELEASES_OF_THE_TABLES = ("3.6", "3.9")
LAST_BYTES = 16


# Loops on sm_90 whose addresses and masks must leave the tensor cores no time to wait.
FED = {f"half {kernel} none {tiles}+narrow" for kernel in ("1x1", "3x3") for tiles in ("wide", "large")} | {
    "half EDM"
}
MOST_ISSUE = 0.9


def _allowed_spill(version):
    """Bytes per thread that a kernel may spill under a version of Triton."""
    return 0 if ".".join(version.split(".")[:2]) in RELEASES_OF_THE_TABLES else LAST_BYTES


def _wrong(reports, version=None):
    """The reports of kernels with an error other than an allowed spill."""
    if version is None:
        from triton import __version__ as version
    allowed = _allowed_spill(version)
    return [r for r in reports if r.error and (r.spilled > allowed or r.error != f"spills {r.spilled} bytes")]


# Those of a minute's compilation, of memory alone: make test-full compiles them.
MANY_KERNELS = ("msd_kernels.ops.group_norm.kernels", "msd_kernels.ops.resample2d.kernels")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("architectures", "module"),
    [
        *(((90,), module) for module in aot.kernel_modules() if module not in MANY_KERNELS),
        *(pytest.param(tuned.architectures(), m, marks=pytest.mark.full) for m in aot.kernel_modules()),
    ],
)
def test_every_kernel_compiles_without_spills(architectures, module):
    reports = list(aot.compile_all(architectures, module))
    wrong = _wrong(reports)
    assert reports
    assert not wrong, aot.format_table(wrong)
    fed = [r for r in reports if r.architecture == 90 and r.configuration in FED]
    slow = [r for r in fed if not 0 < r.issue <= MOST_ISSUE]
    assert not slow, aot.format_table(slow)
    assert fed or not any(name in module for name in ("grouped", "attention"))


def test_few_spilled_bytes_pass_only_under_releases_that_the_tables_were_not_made_with():
    few, many = (_report(spilled=n, error=f"spills {n} bytes") for n in (LAST_BYTES, LAST_BYTES + 8))
    both = _report(spilled=8, error="spills 8 bytes, multiplies without tensor cores")
    broken = _report(error="CompilationError: at 52:33:")
    reports = [_report(), few, many, both, broken]
    assert _wrong(reports, "3.9.0") == _wrong(reports, "3.6.1") == [few, many, both, broken]
    assert _wrong(reports, "3.7.1") == [many, both, broken]


@needs_compiler
@pytest.mark.parametrize(("spilled", "status"), [(0, 0), (8, 1)])
def test_command_fails_on_any_spill(spilled, status, monkeypatch, capsys):
    report = _report(spilled=spilled, error=f"spills {spilled} bytes" if spilled else "")
    monkeypatch.setattr(aot, "compile_all", lambda *_: [report])
    assert aot.main([]) == status
    assert f"{status} not well" in capsys.readouterr().out


@pytest.mark.slow
@needs_compiler
def test_command_compiles_what_it_is_asked_for():
    command = [sys.executable, "-m", "msd_kernels.aot", "--arch", "80", "--only", "_group_norm_parameters"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 compiled, 0 not well" in result.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "group_normm"], "--only group_normm: no kernel's module or name contains it"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--workers", "-1"], "--workers -1: must be at least 1"),
    ],
)
def test_command_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        aot.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def _report(**findings):
    return aot.Report("_a_kernel", "bf16", 90, **findings)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "module",
    [pytest.param(m, marks=pytest.mark.full if m in MANY_KERNELS else ()) for m in aot.kernel_modules()],
)
def test_every_kernel_compiles_where_a_number_is_one(module):
    """A launch makes a constant of an integer that is 1, and a constant has no methods of a tensor."""
    reports = []
    for compilation in _of_distinct_types(module):
        for name in _specialised_numbers(compilation):
            one = replace(
                compilation,
                configuration=f"{compilation.configuration}, {name} = 1",
                arguments={**compilation.arguments, name: None},
                constants={**compilation.constants, name: 1},
                tensor_cores=False,  # a loop of one pass is none
            )
            reports.append(aot.compile_one(one, 90))
    wrong = _wrong(reports)
    assert not wrong, aot.format_table(wrong)


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
    assert not _wrong(reports)


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
    ((pooled, _),) = product.launches(1024, 64, pooled=True, resampled=True)
    for launched in (pooled, wgrad.launch(pooled=True)):
        assert (launched.wide.stages, launched.narrow.stages) == (1, 1)
    for launched, _ in product.launches(1024, 64, pooled=False, resampled=False):
        assert launched.wide.stages > 1


def test_innermost_loops_are_those_that_work():
    (loop,) = aot.innermost_loops(LOOP)
    assert len(loop) == 6
    assert loop[0] == "$L__BB0_2:"
    assert any(aot.TENSOR_CORES["wgmma"] in line for line in loop)


def test_loads_count_bytes_per_instruction():
    assert aot._loads(aot.innermost_loops(LOOP)) == (24, 16)


def test_table_shows_errors():
    report = _report(registers=255, spilled=8, error="spills 8 bytes")
    assert "spills 8 bytes" in aot.format_table([report]).splitlines()[1]
