"""The package as a whole: what it imports, that it lives without its extension, and the rules of the house."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import forks
import msd_kernels
import multistage_diffusion
from msd_kernels import layouts
from msd_kernels.runtime.extension import load

KERNELS = Path(msd_kernels.__file__).parent
MODELS = Path(multistage_diffusion.__file__).parent
REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted([*KERNELS.rglob("*.py"), *MODELS.rglob("*.py")])

# The storeys of msd_kernels, lowest first. A part imports from its own storey and from those below; what is not
# listed stands on top.
STOREYS = (
    {"_private", "containers", "layouts", "stage_batch"},
    {"batch_invariance", "frozen", "runtime"},
    {"dispatch"},
    {"ops"},
)

# The rooms of multistage_diffusion, and the modules that lie flat beside them. Each imports only what stands before it.
ROOMS = (
    *("common", "networks", "noise", "data", "clustering", "sampling", "presets", "training", "official"),
    *("flops", "costs", "layers", "checkpoints", "evaluation", "commands", "cli", "integrations", "__main__"),
)
MOST_FLAT_MODULES = 10


def module_name(path: Path) -> str:
    package = KERNELS if path.is_relative_to(KERNELS) else MODELS
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def storey(part: str) -> int:
    return next((height for height, parts in enumerate(STOREYS) if part in parts), len(STOREYS))


def imported_modules(path: Path) -> set[str]:
    """The full names of the modules that a file imports anywhere, ``from a import b`` as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[module_name(path) for path in paths])


@each([path for path in SOURCES if path.is_relative_to(KERNELS)])
def test_package_imports_go_one_way(path):
    imported = imported_modules(path)
    assert not any(name.split(".")[0] == "multistage_diffusion" for name in imported)
    parts = {name.split(".")[1] for name in imported if name.startswith("msd_kernels.")}
    part = module_name(path).split(".")[1:2]
    above = {name for name in parts if part and storey(name) > storey(part[0])}
    assert not above


@each([path for path in MODELS.rglob("*.py") if path != MODELS / "__init__.py"])
def test_package_rooms_import_one_way(path):
    own = module_name(path).split(".")[1]
    parts = {
        name.split(".")[1] for name in imported_modules(path) if name.startswith("multistage_diffusion.")
    }
    assert {own} | parts <= set(ROOMS)
    assert not [part for part in parts if ROOMS.index(part) > ROOMS.index(own)]


def test_package_rooms_hold_nearly_everything():
    assert len(list(MODELS.glob("*.py"))) <= MOST_FLAT_MODULES


def test_package_modules_of_a_room_import_in_no_circle():
    imports = {module_name(path): imported_modules(path) for path in MODELS.rglob("*.py")}
    left = {name: {m for m in found if m in imports and m != name} for name, found in imports.items()}
    while free := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in free}
    assert not left


@each([path for path in SOURCES if path.name == "reference.py"])
def test_package_reference_needs_only_pytorch(path):
    allowed = {"torch", "msd_kernels"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imported_modules(path)} <= allowed


@each([path for path in SOURCES if path.is_relative_to(KERNELS)])
def test_package_reference_is_only_an_oracle(path):
    """An op offers it as the backend of that name; nothing else imports it."""
    oracles = [name for name in imported_modules(path) if name.endswith(".reference")]
    assert not oracles or oracles == [f"{module_name(path)}.reference"]


LAYOUTS = [value for value in vars(layouts).values() if isinstance(value, type) and hasattr(value, "_fields")]
# With at most so many of a layout's fields a function takes what it needs of it; with more it spells the layout again.
MOST_FIELDS = 4


def host_functions(path: Path) -> list[tuple[str, list[str]]]:
    """The functions of a file but kernels, which take numbers alone, with the names of their parameters."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not any(
            "jit" in ast.unparse(d) for d in node.decorator_list
        ):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            found.append((f"{module_name(path)}.{node.name}", names))
    return found


@each([path for path in SOURCES if path.is_relative_to(KERNELS) and path.name != "layouts.py"])
def test_package_spells_a_layout_once(path):
    for name, parameters in host_functions(path):
        for layout in LAYOUTS:
            again = set(layout._fields) & set(parameters)
            assert len(again) <= MOST_FIELDS, f"{name} spells {layout.__name__}: {sorted(again)}"


def test_package_functions_take_few_parameters():
    functions = [f for path in SOURCES if path.is_relative_to(KERNELS) for f in host_functions(path)]
    assert len([name for name, parameters in functions if len(parameters) >= 10]) <= 12


@each([path for path in SOURCES if path.is_relative_to(KERNELS)])
def test_package_kernels_need_few_packages(path):
    allowed = {"torch", "triton", "numpy", "msd_kernels"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imported_modules(path)} <= allowed


@each(SOURCES)
def test_package_files_are_short_and_free_of_asserts(path):
    text = path.read_text()
    assert text.count("\n") <= 600
    lines = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert not lines, f"an assert vanishes under python -O: lines {lines}"


def test_package_has_its_public_names():
    for name in msd_kernels.__all__:
        assert getattr(msd_kernels, name).__doc__, f"{name} has no docstring"


def run_python(code: str, path: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory) -> Path:
    """A folder with a copy of msd_kernels as it is where nothing could be compiled."""
    folder = tmp_path_factory.mktemp("unbuilt")
    shutil.copytree(
        KERNELS, folder / "msd_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.json")
    )
    return folder


def run_unbuilt(code: str, folder: Path) -> str:
    done = forks.run(code, path=[folder], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WITHOUT_EXTENSION = """
import warnings, torch, msd_kernels
from pathlib import Path
assert Path(msd_kernels.__file__).is_relative_to(Path.cwd())
x = torch.randn(2, 8, 4, 4)
print(msd_kernels.explain("group_norm", x, 4))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = msd_kernels.group_norm(x, 4, activation="silu")
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)))
print(caught[0].category.__name__, caught[0].message)
"""


def test_package_works_without_the_extension(unbuilt):
    printed = run_unbuilt(WITHOUT_EXTENSION, unbuilt)
    assert "group_norm: library" in printed
    assert "not cpu: was not built at install" in printed
    assert "FallbackWarning group_norm: served by 'library' because 'cpu' cannot: was not built" in printed


def test_package_says_why_the_extension_was_not_built(unbuilt):
    report = unbuilt / "msd_kernels" / "_build_report.json"
    report.write_text(json.dumps({"cpu": {"built": False, "reason": "no C++ compiler found"}}))
    try:
        assert "not cpu: no C++ compiler found" in run_unbuilt(WITHOUT_EXTENSION, unbuilt)
    finally:
        report.unlink()


def test_package_says_why_the_extension_does_not_load(unbuilt):
    broken = unbuilt / "msd_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    broken.write_bytes(b"no library")
    try:
        assert f"not cpu: {broken.name} does not load: " in run_unbuilt(WITHOUT_EXTENSION, unbuilt)
    finally:
        broken.unlink()


def test_package_says_that_the_source_folder_hides_an_installed_package(unbuilt):
    setup, report = unbuilt / "setup.py", unbuilt / "msd_kernels" / "_build_report.json"
    setup.touch()
    hidden = (
        f"not cpu: was not built in the source folder {unbuilt}, which hides an installed package: leave the"
    )
    try:
        assert hidden in run_unbuilt(WITHOUT_EXTENSION, unbuilt)
        report.write_text(json.dumps({"cpu": {"built": True, "reason": ""}}))
        assert "not cpu: was not built at install" in run_unbuilt(WITHOUT_EXTENSION, unbuilt)
    finally:
        setup.unlink()
        report.unlink(missing_ok=True)


def test_package_report_tells_of_architectures_that_were_left_out(unbuilt):
    report = unbuilt / "msd_kernels" / "_build_report.json"
    report.write_text(json.dumps({"cuda": {"built": True, "reason": "", "note": "left out 7.5"}}))
    try:
        printed = run_unbuilt("from msd_kernels.env import report; print(report())", unbuilt)
        assert "\n    left out 7.5\n" in printed
    finally:
        report.unlink()


def test_package_report_may_be_read_in_part():
    """``python -m msd_kernels.env | head``"""
    environment = {**os.environ, "PYTHONPATH": str(KERNELS.parent)}
    command = [sys.executable, "-m", "msd_kernels.env"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


OPTIONAL = ("matplotlib", "tqdm", "safetensors", "PIL", "sklearn", "scipy", "pytest_benchmark", "xdist")
BLOCKED = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""


def test_package_kernels_import_without_optional_packages():
    code = BLOCKED + "import msd_kernels; print(msd_kernels.__version__)"
    assert run_python(code, KERNELS.parent).strip() == msd_kernels.__version__


GPU_CHECK = """
sys.path.insert(0, "benchmarks")
import gpu_check, gpu_smoke, gpu_races, pytest
sys.exit(pytest.main(["-m", "gpu", "tests/gpu", "tests/ops", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


@pytest.mark.skipif(not (REPOSITORY / "benchmarks").is_dir(), reason="benchmarks are not part of an install")
def test_package_gpu_tests_and_benchmarks_need_no_optional_packages():
    """The machine with the GPU has no network, and PyTorch, Triton, NumPy and pytest only."""
    environment = {"PYTHONPATH": f"{REPOSITORY}:{MODELS.parent}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    printed = run_python(BLOCKED + GPU_CHECK, REPOSITORY, **environment)
    assert "test_cuda_graph_replays_with_new_inputs" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not (REPOSITORY / "benchmarks").is_dir(), reason="benchmarks are not part of an install")
@pytest.mark.parametrize("target", ["gpu_check", "gpu_smoke"])
def test_package_gpu_targets_print_their_plan_where_there_is_neither_gpu_nor_cache(target, tmp_path):
    code = f"""
import pathlib, sys
sys.path.insert(0, "benchmarks")
sys.argv[1:] = []
import gpu_cache, {target}
gpu_cache.CACHE = pathlib.Path({str(tmp_path)!r})
print("status", {target}.main())
"""
    first, *lines = run_python(code, REPOSITORY).splitlines()
    name = target.replace("_", "-")
    assert first.startswith(f"{name}: no GPU here")
    assert re.fullmatch(rf"{name}: \d+ s in \d+ parts", lines[0])
    assert lines[-2:] == [f"there is no {tmp_path}: make gpu-cache makes it", "status 1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not (REPOSITORY / "benchmarks").is_dir(), reason="benchmarks are not part of an install")
@pytest.mark.parametrize("command", ["sanitize_cuda", "gpu_races attention --out results.jsonl"])
def test_package_gpu_programs_without_a_gpu_say_so(command, tmp_path):
    name, *arguments = command.split()
    path = REPOSITORY / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, path, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{name}: no GPU here")
    assert list(tmp_path.iterdir()) == []


def test_package_import_initialises_no_device_and_starts_no_compiler():
    code = "import torch, sys, msd_kernels; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    assert run_python(code, KERNELS.parent).split() == ["False", "False"]


def test_package_kernels_of_this_build_serve():
    """Where the extension was built, a plain call must not end up somewhere else."""
    if reason := load("cpu").reason:
        pytest.skip(f"the CPU extension is not here: {reason}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(1, 8, 4, 4, dtype=dtype)
        assert msd_kernels.explain("group_norm", x, 4).backend == "cpu"
