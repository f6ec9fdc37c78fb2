"""What the environment tells the build: which compilers, how many, for which GPUs; a bad value is reported by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").is_file():
    pytest.skip("the sources are not part of an install", allow_module_level=True)
sys.path.append(str(ROOT / "build_support"))

import toolchain  # noqa: E402
from toolchain import BuildError, Compilation, run_ninja  # noqa: E402

# Makes the file behind -o and, behind -MF, a list of one dependency; writes down its arguments.
COMPILER = """#!/bin/sh
echo "$0 $@" >> {log}
while [ $# -gt 0 ]; do
    case "$1" in -o) touch "$2"; shift;; -MF) echo "x: $(ls header.h 2>&-)" > "$2"; shift;; esac
    shift
done
"""


@pytest.mark.parametrize(
    ("names", "kept", "too_old"),
    [
        ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"], []),
        ("7.5 8.0 9.0 12.0+PTX", ["8.0", "9.0", "12.0+PTX"], ["7.5"]),
        ("Ampere", ["8.0", "8.6+PTX"], []),
        ("Turing;Ada Hopper", ["8.9+PTX", "9.0+PTX"], ["7.5+PTX"]),
        ("Ampere 8.0 8.0", ["8.0", "8.6+PTX"], []),
        ("Ampere+Tegra", ["8.7"], []),
        ("Blackwell", ["10.0", "10.3", "12.0", "12.1+PTX"], []),
    ],
)
def test_architectures_are_those_that_the_kernels_run_on(names, kept, too_old):
    assert toolchain.select_architectures(names) == (tuple(kept), tuple(too_old))


@pytest.mark.parametrize("names", ["7.5", "Volta;Turing", "5.0 6.1+PTX", ";"])
def test_no_architecture_that_can_be_compiled_for_is_an_error(names):
    with pytest.raises(BuildError, match=r"need an architecture from 8\.0 on"):
        toolchain.select_architectures(names)


@pytest.mark.parametrize("name", ["sm_90", "9", "9.0b", "ampere", "Ampere+PTX", "native"])
def test_unknown_architectures_are_named(name):
    with pytest.raises(BuildError, match=rf"'{name.replace('+', '.')}' is neither of the form 9\.0.*Ampere"):
        toolchain.select_architectures(f"8.0 {name}")


@pytest.mark.parametrize("name", ["Turing", "Ampere", "Ada", "Hopper"])  # Blackwell grows with PyTorch
def test_names_of_architectures_are_pytorchs(name, monkeypatch):
    """What PyTorch takes for each name, it compiles for."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
    ours = toolchain.gencode(toolchain.NAMED_ARCHITECTURES[name].split(";"))
    assert set(ours) == set(_get_cuda_arch_flags())


@pytest.mark.parametrize(("text", "jobs"), [(None, 2), ("", 2), (" ", 2), ("1", 1), ("16", 16)])
def test_jobs_at_a_time(text, jobs, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", text) if text is not None else monkeypatch.delenv(
        "MAX_JOBS", raising=False
    )
    assert toolchain.max_jobs() == jobs


@pytest.mark.parametrize("text", ["0", "all", "-1", "1.5"])
def test_a_bad_number_of_jobs_is_named(text, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(BuildError, match=rf"MAX_JOBS={text}: needs a whole number of at least 1"):
        toolchain.max_jobs()


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_compiler_is_no_compiler(text, monkeypatch):
    monkeypatch.setenv("CXX", text)
    assert toolchain.find_cxx("sh -c") == ("sh",)
    monkeypatch.setenv("CXX", "ccache g++")
    assert toolchain.find_cxx("sh") == ("ccache", "g++")


def test_pybind11_is_that_of_its_wheel_else_of_pytorch(monkeypatch):
    pybind11 = pytest.importorskip("pybind11")
    _, first, *_ = toolchain.python_includes()
    assert first == pybind11.get_include()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    _, second, *_ = toolchain.python_includes()
    assert second == str(toolchain.torch_folder() / "include")
    assert (Path(second) / "pybind11" / "pybind11.h").is_file()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BuildError, match="no torch at build time: install it"):
        toolchain.python_includes()


def write_compiler(path: Path, log: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(COMPILER.format(log=log))
    path.chmod(0o755)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Builds a library of two sources, whose names a shell would take apart; gives what was compiled and linked."""
    folder, log = tmp_path / "a b$c:d", tmp_path / "calls"
    monkeypatch.chdir(tmp_path)
    write_compiler(folder / "c++", log)
    for name in ("one.cpp", "two.cpp", "header.h"):
        (tmp_path / name).touch()

    def build(**flags: str) -> list[str]:
        log.write_text("")
        compilations = [
            Compilation(
                Path(f"{name}.cpp"), (str(folder / "c++"), flags.get(name, "-O2")), folder / f"{name}.o"
            )
            for name in ("one", "two")
        ]
        run_ninja(folder, compilations, folder / "both.so", (str(folder / "c++"),))
        return sorted(Path(call).name for call in log.read_text().splitlines())

    return build


def test_only_what_changed_is_compiled(library, tmp_path):
    assert library() == ["both.so", "one.o", "two.o"]
    assert library() == []
    assert library(two='-DNAME="$HOME; exit 1"') == ["both.so", "two.o"]
    assert library(two='-DNAME="$HOME; exit 1"') == []
    later = time.time() + 1
    os.utime(tmp_path / "header.h", (later, later))
    assert library(two='-DNAME="$HOME; exit 1"') == ["both.so", "one.o", "two.o"]


def test_a_compiler_that_fails_is_named_with_its_first_error(library, tmp_path, capfd):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho warning: old >&2\necho 'one.cpp:1: error: wrong' >&2\nexit 1\n")
    compiler.chmod(0o755)
    failing = Compilation(tmp_path / "one.cpp", (str(compiler), "-Werror"), tmp_path / "one.o")
    with pytest.raises(BuildError, match=rf"^{compiler} failed: one\.cpp:1: error: wrong$"):
        run_ninja(tmp_path, [failing])
    assert "warning: old" in capfd.readouterr().out
    with pytest.raises(BuildError, match=r"^none failed: .*not found"):
        run_ninja(tmp_path, [failing._replace(command=("none",))])
    with pytest.raises(BuildError, match=r"^ninja failed: .*missing\.cpp"):
        run_ninja(tmp_path, [failing._replace(source=tmp_path / "missing.cpp")])


def test_ninja_is_that_of_the_environment_else_of_the_path(tmp_path, monkeypatch):
    wheel = pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(toolchain.find_ninja()).parent == Path(wheel.BIN_DIR)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="no ninja found: pip install ninja"):
        toolchain.find_ninja()
    write_compiler(tmp_path / "ninja", tmp_path / "calls")
    assert toolchain.find_ninja() == str(tmp_path / "ninja")


@pytest.fixture
def build(tmp_path):
    """Builds a copy of the sources with compilers that only pretend; gives the report and their calls."""
    copy, log = tmp_path / "copy", tmp_path / "calls"
    for compiler in ("g++", "nvcc"):
        write_compiler(tmp_path / "bin" / compiler, log)
    copy.mkdir()
    for name in ("build_support", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    (copy / "msd_kernels").mkdir()
    (copy / "msd_kernels" / "__init__.py").touch()

    def build_with(**environment: str) -> tuple[dict, list[str]]:
        own = {"CXX": str(tmp_path / "bin" / "g++"), "CUDA_HOME": str(tmp_path), "MSD_KERNELS_CUDA": "auto"}
        kept = {
            name: os.environ[name] for name in os.environ if name not in ("MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
        }
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib"]
        done = subprocess.run(
            command, cwd=copy, env=kept | own | environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((copy / "lib" / "msd_kernels" / "_build_report.json").read_text())
        return report, log.read_text().splitlines() if log.exists() else []

    return build_with


def test_the_build_leaves_out_architectures_that_are_too_old_and_says_so(build):
    report, calls = build(TORCH_CUDA_ARCH_LIST="7.5 8.0 9.0 12.0+PTX")
    assert report["cuda"]["built"]
    assert report["cuda"]["note"].startswith("left out the architectures 7.5 of TORCH_CUDA_ARCH_LIST")
    (device,) = {
        tuple(word for word in call.split() if "-gencode" in word) for call in calls if "-gencode" in call
    }
    assert [flag.partition("=")[2] for flag in device] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]
    assert any('MSD_CUDA_ARCHITECTURES="8.0 9.0 12.0+PTX"' in call for call in calls)


def test_the_build_reports_why_there_are_no_cuda_kernels(build):
    report, _ = build(TORCH_CUDA_ARCH_LIST="7.5")
    assert report["cuda"]["reason"].startswith("TORCH_CUDA_ARCH_LIST=7.5: the CUDA kernels need")
    assert report["cpu"]["built"]
    assert "note" not in report["cuda"]


def test_the_build_reports_a_bad_number_of_jobs(build):
    report, calls = build(MAX_JOBS="all")
    assert not calls
    assert {target["reason"] for target in report.values()} == {
        "MAX_JOBS=all: needs a whole number of at least 1"
    }


def test_the_check_of_the_cuda_sources_explains_itself_and_compiles_nothing(tmp_path):
    script = [sys.executable, ROOT / "scripts" / "compile_cuda.py"]
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 9\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "MAX_JOBS": "none"}
    helped, refused = (
        subprocess.run([*script, *options], env=environment, capture_output=True, text=True, timeout=60)
        for options in (["--help"], [])
    )
    assert (helped.returncode, refused.returncode) == (0, 1)
    assert "without a GPU" in helped.stdout
    assert refused.stdout == "MAX_JOBS=none: needs a whole number of at least 1\n"
