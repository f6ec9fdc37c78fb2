"""The CUDA extension where there is no GPU: it builds, loads, plans and explains itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from msd_kernels import explain, group_norm
from msd_kernels.dispatch.backends import BackendError, use
from msd_kernels.layouts import GroupNormLayout
from msd_kernels.runtime import cuda
from msd_kernels.runtime.extension import compiled_layout, load

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
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
    assert load("cuda").module is library.module
    assert library.module.build_info()["cuda_architectures"]


def test_cuda_extension_has_the_functions_of_the_cpu_extension(library):
    if reason := load("cpu").reason:
        pytest.skip(reason)
    for name in (
        "GroupNormLayout",
        "Resample2dLayout",
        "group_norm_forward",
        "group_norm_backward",
        "resample2d",
    ):
        said, expected = (getattr(found.module, name).__doc__ for found in (library, load("cpu")))
        if not name.endswith("Layout"):  # the tensors are the same; the CPU takes no device and stream
            said, expected = (re.findall(r"\[[a-z, \n]+\]", text) for text in (said, expected))
        assert said == expected


def test_cuda_extension_plans_without_a_gpu(library):
    layout = GroupNormLayout((2, 0), (64, 32), (0, 0), (8, 8), 64, True, 1e-5, False)
    compiled = compiled_layout(library.module.GroupNormLayout, layout, torch.empty(0), *[None] * 4)
    h200 = (132, 227 << 10, 228 << 10, 1 << 10, 1)
    ((one_pass, groups, parts, pixels, shared),) = library.module.group_norm_cuts(compiled, False, h200)
    assert one_pass
    assert 1 <= groups <= 8
    assert (parts - 1) * pixels < 64 <= parts * pixels
    assert 0 < shared <= h200[1]


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
