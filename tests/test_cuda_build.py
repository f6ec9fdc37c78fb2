"""The CUDA extension where there is no GPU: it builds, loads and registers, and explains itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from msd_kernels import explain, group_norm
from msd_kernels.dispatch.backends import BackendError, use
from msd_kernels.runtime import cuda
from msd_kernels.runtime.extension import load

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SCHEMAS = {
    "group_norm_forward": "Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, int[]? cut, int stream) -> ()",
    "group_norm_backward": "Tensor(d!)? dscale, Tensor(e!)? dshift, int[]? cut, int stream) -> ()",
    "group_norm_cuts": "bool backward, int[] device) -> int[]",
    "resample2d": "bool channels_last, Tensor(a!) y, int stream) -> ()",
}


# Anything else that kept the extension from being built is a failure.
GOOD_REASONS = (
    "no nvcc found",
    "MSD_KERNELS_CUDA=0",
    "was not built at install",
    "was not built in the source folder",
)


@pytest.fixture
def library():
    found = load("cuda")
    if found.reason.startswith(GOOD_REASONS):
        pytest.skip(f"the CUDA extension is not here: {found.reason}")
    return found


def test_cuda_extension_loads_whatever_pytorch_was_built_for(library):
    assert library.reason == ""
    assert library.path.is_file()


@pytest.mark.parametrize("name", SCHEMAS)
def test_cuda_extension_registers_every_schema_once(name, library):
    load.cache_clear()
    assert load("cuda") == library  # loading again registers nothing again
    packet = getattr(torch.ops.msd_kernels_cuda, name)
    assert packet.overloads() == ["default"]
    assert str(packet.default._schema).endswith(SCHEMAS[name])


def test_cuda_kernels_refuse_cpu_tensors(library):
    x, statistics = torch.zeros(1 * 8 * 4), torch.zeros(2)
    layout = ([1], [8], [2], 4, True, 1e-5, False)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        torch.ops.msd_kernels_cuda.group_norm_forward(
            x, None, None, None, None, *layout, x.clone(), statistics, statistics.clone(), None, 0
        )


def test_cuda_backend_says_that_it_serves_cuda_tensors():
    x = torch.zeros(1, 8, 2, 2)
    assert explain("group_norm", x, 4).why_not["cuda"] == "serves cuda tensors, got a cpu tensor"
    with use("cuda"), pytest.raises(BackendError, match="serves cuda tensors, got a cpu tensor"):
        group_norm(x, 4)


def test_cuda_backend_says_which_dtypes_it_takes():
    said = cuda.cannot_run(torch.float64)
    assert said == "takes float32, bfloat16 and float16, got torch.float64"


def test_cuda_backend_says_why_the_extension_is_missing(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda name: type(load(name))(name, None, "no nvcc found"))
    assert cuda.cannot_run(torch.float32) == "no nvcc found"


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), ["8.0", "9.0a"], None),
        ((8, 6), ["8.0", "9.0a"], None),
        ((9, 0), ["8.0", "9.0a"], None),
        ((12, 0), ["8.0", "10.0+PTX"], None),
        ((7, 5), ["7.5"], "needs compute capability 8.0, got 7.5"),
        ((10, 0), ["8.0", "9.0a"], "was built for 8.0 9.0a, got compute capability 10.0"),
        ((8, 0), ["8.6"], "was built for 8.6, got compute capability 8.0"),
        ((9, 0), [], None),
    ],
    ids=str,
)
def test_cuda_backend_says_which_devices_it_runs_on(capability, architectures, expected):
    assert cuda.cannot_run_with(capability, architectures) == expected


PTXAS = """\
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    {stack} bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 512 bytes smem
"""


@pytest.mark.parametrize(("stack", "spilled"), [(0, 0), (8, 4), (16, 0)])
def test_cuda_check_reads_the_compilers_report_and_fails_on_spills(stack, spilled, monkeypatch, capsys):
    if not SCRIPTS.is_dir():
        pytest.skip("scripts are not part of an install")
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import compile_cuda

    report = PTXAS.format(stack=stack, spilled=spilled)
    kernels = compile_cuda.parse_ptxas("a.cu", report)
    assert [(k.architecture, k.registers, k.spills, k.stack, k.shared) for k in kernels] == [
        ("90a", 62, spilled, stack, 512)
    ]
    monkeypatch.setattr(compile_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(compile_cuda, "cuda_sources", lambda root: [Path("a.cu")])
    monkeypatch.setattr(compile_cuda, "compile_sources", lambda *_: kernels)
    assert compile_cuda.main([]) == (1 if stack else 0)
    assert ("keeps" in capsys.readouterr().out) == bool(stack)
