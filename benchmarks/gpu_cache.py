"""Compiles the Triton kernels of ``make gpu-smoke`` and ``gpu-check`` for a GPU that is not here: ``make gpu-cache``.

Triton's own cache does not travel: its entries hold the absolute paths of their files, and their names are hashes of
Triton's build, of what ``platform`` says of the machine, and more. So :func:`make` keeps, for each kernel, the parts of
its key besides those and the two files that Triton reads, and for each launcher (the C code with which Triton passes
the arguments) its source and what the compiler made of it. :func:`install` puts all of it into a cache of Triton's,
by Triton's own functions, under the keys of the Triton that is there. :func:`missing` asks Triton's own look-up.

    python benchmarks/gpu_cache.py            # make, then check the copy in a folder of another name
    python benchmarks/gpu_cache.py --check    # only check

with the interpreter, the PyTorch and the Triton of the machine with the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import torch  # noqa: E402
from gpu_parts import append  # noqa: E402
from launches import ARCHITECTURE, AbsentGPU, Launch  # noqa: E402

from msd_kernels.runtime.launch import fix_cache_keys  # noqa: E402

CACHE = ROOT / "build" / "gpu-cache"
MANIFEST, ARCHIVE = "manifest.json", "kernels.zip"
VARIABLE = "TRITON_CACHE_DIR"
# What Triton reads of an entry; the other files are steps on the way.
KEPT = (".json", ".cubin")


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        label: the launch that it was compiled for.
        source, options: the parts of its key.
        files: of its entry.
        launcher: digest of its launcher's source, "" where its Triton has none.
    """

    label: str
    source: str
    options: str
    files: list[str]
    launcher: str = ""

    @property
    def folder(self) -> str:
        return f"kernels/{hashlib.sha256(f'{self.source}-{self.options}'.encode()).hexdigest()[:32]}"

    @property
    def metadata(self) -> str:
        """The file that Triton looks for."""
        return next(name for name in self.files if name.endswith(".json"))


@dataclass(frozen=True)
class CSource:
    """C code that Triton compiles when it first needs it."""

    name: str
    text: str
    include_dirs: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        return f"launchers/{self.digest[:32]}"

    @property
    def file(self) -> str:
        return f"{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"


@dataclass
class Manifest:
    """What a cache holds and what it was made with."""

    architecture: int
    triton: str
    triton_key: str
    backend: str
    suffix: str
    machine: str
    sources: str
    kernels: list[Kernel] = field(default_factory=list)
    launchers: list[str] = field(default_factory=list)

    @staticmethod
    def of_here(architecture: int) -> Manifest:
        """With nothing in it yet."""
        import triton
        from triton.runtime.cache import triton_key

        return Manifest(
            architecture,
            triton.__version__,
            hashlib.sha256(triton_key().encode()).hexdigest(),
            _backend(architecture).hash(),
            sysconfig.get_config_var("EXT_SUFFIX"),
            platform.machine(),
            source_digest(),
        )

    @staticmethod
    def read(folder: Path) -> Manifest:
        fields = json.loads((folder / MANIFEST).read_text())
        return Manifest(**{**fields, "kernels": [Kernel(**kernel) for kernel in fields["kernels"]]})

    def differences(self, here: Manifest) -> tuple[list[str], list[str]]:
        """Why this cache cannot serve here, and what else is not the same."""
        apart = {
            name: f"{name} {getattr(self, name)}, here {getattr(here, name)}"
            for name in ("triton", "architecture", "suffix", "machine")
            if getattr(self, name) != getattr(here, name)
        }
        notes = {
            "triton_key": f"another build of Triton {self.triton}",
            "backend": "another ptxas",
            "sources": "made from other sources: kernels that changed since are compiled",
        }
        fatal = [text for name, text in apart.items() if name != "suffix"]
        others = [text for name, text in notes.items() if getattr(self, name) != getattr(here, name)]
        if "suffix" in apart:
            others.append(f"{apart['suffix']}: launchers are compiled")
        return fatal, others


@dataclass(frozen=True)
class Installed:
    """What became of a cache.

    Attributes:
        kernels, launchers: that Triton will find.
        detail: in words.
    """

    kernels: int
    launchers: int
    detail: str


def source_digest() -> str:
    """Of all files on which machine code depends."""
    digest = hashlib.sha256()
    for folder in ("triton", "tuned"):
        for path in sorted((ROOT / "msd_kernels" / folder).glob("*.*")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _backend(architecture: int) -> Any:
    from triton.compiler import make_backend

    return make_backend(AbsentGPU(architecture).get_current_target())


class NotThereError(Exception):
    """Triton would have to compile."""


@contextmanager
def compiling_for(architecture: int, cache: Path) -> Iterator[None]:
    """Triton compiles for a GPU that is not here, into a cache."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(AbsentGPU(architecture))
    try:
        with mock.patch.dict(os.environ, {VARIABLE: str(cache)}):
            yield
    finally:
        driver.set_active(before)


def compile_launch(launch: Launch, only_find: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """What Triton compiled for a launch, through its own dispatch, and the parts of the key: source, backend, options.

    Raises:
        NotThereError: it is not in the cache, and ``only_find``.
    """
    from triton.compiler import compiler
    from triton.runtime.cache import get_cache_manager

    make_key, parts = compiler.get_cache_key, []

    def key_of(source, backend, options, env_vars):
        key = make_key(source, backend, options, env_vars=env_vars)
        parts[:] = source, backend, options
        if only_find and not get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(
            f"{source.name[:150]}.json"
        ):
            raise NotThereError(source.name)
        return key

    function = launch.function
    fix_cache_keys(launch.module)
    function.device_caches.clear()  # of this process, which would hide what is missing
    with mock.patch.object(compiler, "get_cache_key", key_of):
        compiled = function.run(*launch.arguments, grid=(1,), warmup=True, **dict(launch.options))
    return compiled, tuple(parts)


def launcher_of(compiled: Any) -> CSource | None:
    """The launcher of a kernel, or None where Triton has one for all."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return None
    with _c_sources() as found:
        driver.CudaLauncher(compiled.src, compiled.metadata)
    return found[0]


def utilities() -> list[CSource]:
    """C code that Triton needs with any kernel."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return []
    with _c_sources() as found:
        driver.CudaUtils.__init__(SimpleNamespace())
    return found


@contextmanager
def _c_sources() -> Iterator[list[CSource]]:
    """What Triton would compile inside."""
    from triton.backends.nvidia import driver

    found: list[CSource] = []

    def note(src: str, name: str, include_dirs: Sequence[str] = (), **_) -> Any:
        found.append(CSource(name, src, tuple(include_dirs)))
        return mock.MagicMock()

    before = driver.PyCUtensorMap
    with (
        mock.patch.object(driver, "compile_module_from_src", note),
        mock.patch.object(driver, "library_dirs", return_value=[]),
    ):
        yield found
    driver.PyCUtensorMap = before


def compile_c(source: CSource, folder: Path) -> Path:
    """Compiles it as Triton does, against a CUDA driver without content, of which the name is all that counts."""
    from triton.runtime.build import _build

    made = folder / source.folder / source.file
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        (made.parent / f"{source.name}.c").write_text(source.text)
        stub = folder / "libcuda.so.1"
        if not stub.is_file():
            command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", str(stub)]
            subprocess.run(command, check=True)
        arguments = source.name, str(made.parent / f"{source.name}.c"), str(made.parent)
        _build(*arguments, [str(folder)], list(source.include_dirs), ["libcuda.so.1"], [])
    return made


def _compile_in_process(
    launch: Launch, architecture: int, work: Path
) -> tuple[Kernel, dict[str, bytes], CSource | None]:
    with compiling_for(architecture, work / "triton"):
        compiled, (source, _, options) = compile_launch(launch)
        files = {
            name: Path(path).read_bytes()
            for name, path in compiled.metadata_group.items()
            if name.endswith(KEPT)
        }
        launcher = launcher_of(compiled)
        if launcher is not None:
            compile_c(launcher, work)
    kernel = Kernel(
        str(launch), source.hash(), options.hash(), sorted(files), launcher.digest if launcher else ""
    )
    return kernel, files, launcher


def _compile_all(
    launches: Sequence[Launch], architecture: int, work: Path, workers: int
) -> Iterator[tuple[Kernel, dict[str, bytes], CSource | None]]:
    """In processes of their own, or with one worker in this one."""
    if workers == 1:
        yield from (_compile_in_process(launch, architecture, work) for launch in launches)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile_in_process, launch, architecture, work) for launch in launches]
        yield from (job.result() for job in jobs)


def make(launches: Sequence[Launch], folder: Path, architecture: int, workers: int = 1) -> Manifest:
    """Compiles all launches into ``folder``, whose neighbour keeps what need not be compiled again."""
    work = folder.with_name(f"{folder.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.of_here(architecture)
    sources = {source.digest: source for source in utilities()}
    for source in sources.values():
        compile_c(source, work)
    entries: dict[str, bytes] = {}
    kernels: dict[str, Kernel] = {}
    for number, (kernel, files, launcher) in enumerate(
        _compile_all(launches, architecture, work, workers), 1
    ):
        kernels.setdefault(kernel.folder, kernel)
        entries.update({f"{kernel.folder}/{name}": content for name, content in files.items()})
        if launcher is not None:
            sources[launcher.digest] = launcher
        if number % 25 == 0:
            print(f"  {number} of {len(launches)} launches", flush=True)
    for source in sources.values():
        made = compile_c(source, work)
        entries[f"{source.folder}/{source.name}.c"] = source.text.encode()
        entries[f"{source.folder}/{source.file}"] = made.read_bytes()
        manifest.launchers.append(source.folder)
    manifest.kernels = list(kernels.values())
    with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(entries.items()):
            archive.writestr(name, content)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def install(folder: Path, target: Path, architecture: int) -> Installed:
    """Puts what ``folder`` holds into the cache ``target`` of the Triton that is here, under its keys."""
    if not (folder / MANIFEST).is_file():
        return Installed(0, 0, f"no cache in {folder}: kernels are compiled")
    manifest = Manifest.read(folder)
    fatal, notes = manifest.differences(Manifest.of_here(architecture))
    if fatal:
        return Installed(0, 0, f"the cache does not serve here ({'; '.join(fatal)}): kernels are compiled")
    with mock.patch.dict(os.environ, {VARIABLE: str(target)}), zipfile.ZipFile(folder / ARCHIVE) as archive:
        for kernel in manifest.kernels:
            _install_kernel(kernel, archive, architecture)
        launchers = sum(_install_launcher(name, archive) for name in manifest.launchers)
    return Installed(len(manifest.kernels), launchers, "; ".join(notes) or "made for exactly this Triton")


def _install_kernel(kernel: Kernel, archive: zipfile.ZipFile, architecture: int) -> None:
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import get_cache_key, get_cache_manager

    source, options = (
        SimpleNamespace(hash=lambda part=part: part) for part in (kernel.source, kernel.options)
    )
    key = get_cache_key(source, _backend(architecture), options, env_vars=get_cache_invalidating_env_vars())
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    group = {
        name: manager.put(archive.read(f"{kernel.folder}/{name}"), name, binary=True) for name in kernel.files
    }
    manager.put_group(kernel.metadata, group)


def _install_launcher(folder: str, archive: zipfile.ZipFile) -> bool:
    """Whether there is one for this Python."""
    names = [name.removeprefix(f"{folder}/") for name in archive.namelist() if name.startswith(f"{folder}/")]
    text = next(name for name in names if name.endswith(".c"))
    made = f"{text[:-2]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if made not in names:
        return False
    manager = _c_manager(archive.read(f"{folder}/{text}").decode())
    manager.put(archive.read(f"{folder}/{made}"), made, binary=True)
    return True


def _c_manager(text: str) -> Any:
    """Where Triton looks for what it has compiled of a C source."""
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(hashlib.sha256((text + platform_key()).encode()).hexdigest())


def missing(launches: Iterable[Launch], cache: Path, architecture: int) -> list[str]:
    """The launches for which Triton would compile a kernel or a launcher, asked of Triton itself."""
    found = []
    with compiling_for(architecture, cache):
        found += [f"C code {s.name}" for s in utilities() if _c_manager(s.text).get_file(s.file) is None]
        for launch in launches:
            try:
                compiled, _ = compile_launch(launch, only_find=True)
            except NotThereError:
                found.append(str(launch))
                continue
            launcher = launcher_of(compiled)
            if launcher is not None and _c_manager(launcher.text).get_file(launcher.file) is None:
                found.append(f"launcher of {launch}")
    return found


class Watch:
    """Counts what Triton finds and compiles in this process."""

    def __init__(self) -> None:
        self.found = 0
        self.compiled: dict[str, float] = {}
        try:
            from triton import knobs
        except ImportError:
            return
        knobs.compilation.listener = self

    def __call__(
        self, *, src: Any, metadata: dict, metadata_group: dict, times: Any, cache_hit: bool
    ) -> None:
        if cache_hit:
            self.found += 1
        else:
            self.compiled[src.name] = self.compiled.get(src.name, 0.0) + times.total / 1e6

    def as_dict(self) -> dict[str, Any]:
        seconds = {name: round(value, 2) for name, value in self.compiled.items()}
        return {"kernels_found": self.found, "kernels_compiled": seconds}


def counts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What processes have written of their :class:`Watch`, in words."""
    found = []
    for line in lines:
        compiled = line["kernels_compiled"]
        found.append(
            f"cache, {line['cache']}: {line['kernels_found']} found, {len(compiled)} compiled in "
            f"{sum(compiled.values()):.1f} s"
        )
    return found


def check(launches: Sequence[Launch], folder: Path, architecture: int) -> tuple[Installed, list[str]]:
    """Installs the cache somewhere else and names what Triton does not find there."""
    with tempfile.TemporaryDirectory() as name:
        installed = install(folder, Path(name), architecture)
        return installed, missing(launches, Path(name), architecture)


@contextmanager
def installed_for_this_gpu(files: Sequence[Path]) -> Iterator[None]:
    """A cache of Triton's that lasts as long as the block, with what :data:`CACHE` holds; ``files`` get to know."""
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        try:
            major, minor = torch.cuda.get_device_capability()
            installed = install(CACHE, Path(name), 10 * major + minor)
        except Exception as error:  # a cache that cannot be used costs time, nothing else
            installed = Installed(0, 0, f"no use of the cache: {type(error).__name__}: {error}"[:500])
        print(
            f"cache: {installed.kernels} kernels, {installed.launchers} launchers; {installed.detail}",
            flush=True,
        )
        append(files, {"installed": asdict(installed), "seconds": round(time.perf_counter() - start, 2)})
        with mock.patch.dict(os.environ, {VARIABLE: name}):
            yield


def not_made() -> str:
    """What to say where there is no cache; empty where there is one."""
    return "" if (CACHE / MANIFEST).is_file() else f"there is no {CACHE}: make gpu-cache makes it"


def rehearse(found: Mapping[str, Sequence[Launch]], architecture: int = ARCHITECTURE) -> int:
    """Looks every kernel up in the cache, by case; 1 if one is missing."""
    launches = list(dict.fromkeys(launch for case in found.values() for launch in case))
    installed, absent = check(launches, CACHE, architecture)
    print(report(installed, absent, CACHE))
    for case, inside in found.items():
        lost = [str(launch) for launch in inside if any(name.endswith(str(launch)) for name in absent)]
        print(f"    {case}: {len(inside) - len(lost)} of {len(inside)} kernels in the cache")
    return int(bool(absent))


def report(installed: Installed, absent: Sequence[str], folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.glob("*")) / 2**20
    lines = [
        f"cache: {installed.kernels} kernels, {installed.launchers} launchers, {size:.1f} MiB, {installed.detail}"
    ]
    lines += [f"not in the cache: {name}" for name in absent]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=ARCHITECTURE, help="compute capability without its point")
    parser.add_argument("--out", type=Path, default=CACHE)
    parser.add_argument("--check", action="store_true", help="only check what is there")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="parallel compilations; default: one per core",
    )
    options = parser.parse_args(arguments)
    import gpu_races
    import gpu_smoke

    start = time.perf_counter()
    launches: dict[Launch, None] = {}
    for target in (gpu_smoke, gpu_races):
        for found in target.launches(options.arch).values():
            launches |= dict.fromkeys(found)
    print(f"{len(launches)} launches found in {time.perf_counter() - start:.0f} s", flush=True)
    if not options.check:
        make(list(launches), options.out, options.arch, options.workers)
    installed, absent = check(list(launches), options.out, options.arch)
    print(report(installed, absent, options.out))
    print(f"{time.perf_counter() - start:.0f} s")
    return int(bool(absent))


if __name__ == "__main__":
    sys.exit(main())
