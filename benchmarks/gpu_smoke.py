"""Says in under 200 seconds whether everything works on this machine's GPU: ``make gpu-smoke``.

Every op forward and backward, by every backend and in every dtype, against float64 (see gpu_cases.py); the build of
the compiled kernels; one captured training step; compute-sanitizer's memory checker on three kernels. Each result is a
line of ``benchmarks/results/gpu-smoke-<name of the GPU>.jsonl`` as soon as it is there. Exit status 1, after all
have run, if one is wrong. Uses the interpreter it is started with, installs nothing, needs no network and no pytest.
Kernels come from the cache of ``make gpu-cache``, where there is one.

Without a GPU it rehearses: it prints the plan, runs the smallest cases on the processor through the same processes, and
looks up every kernel in the cache; exit status 1 if one is missing.

Environment: OUT, a folder for the log and a copy of the results, else the log goes to
``benchmarks/results/gpu-logs.local``; MAX_JOBS, the compilers at a time, else one per core; TORCH_CUDA_ARCH_LIST, else
this GPU alone.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import gpu_cache  # noqa: E402
import gpu_cases  # noqa: E402
import sanitize_cuda  # noqa: E402
import torch  # noqa: E402
import training_steps  # noqa: E402
import whole_networks  # noqa: E402
from gpu_cases import Case  # noqa: E402
from gpu_parts import (  # noqa: E402
    Clock,
    Part,
    Record,
    append,
    build,
    folders,
    log_file,
    plan_text,
    read_lines,
    run_part,
    state,
)
from launches import ARCHITECTURE, Launch, recorded  # noqa: E402
from sanitize_cuda import FOUND, no_gpu  # noqa: E402

import harness  # noqa: E402
from msd_kernels.dispatch.backends import BackendError, use  # noqa: E402

# What needs no build comes first: it is there whatever becomes of the build.
SECONDS = {"triton": 45.0, "build": 75.0, "cuda": 18.0, "step": 17.0, "memcheck": 30.0}
# The backends of each part of ops.
OPS = {"triton": ("triton", "library"), "cuda": ("cuda",)}
# After which a process can do nothing more on its GPU.
LOST = 70
NETWORK = {
    "family": "edm",
    "image_size": 16,
    "encoder_widths": (32,),
    "decoder_widths": (48, 32, 16),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (8,),
    "dropout": 0.13,
    "augment_dim": 9,
}
COUNTS = (3, 0, 2)
# The largest error of a gradient of the step, as a share of it: a hundred roundings and more lie on the way.
STEP_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: whole_networks.TOLERANCE}
# Of the rehearsal: elements of a case that a processor has computed at once, and how many times as long parts may take.
SMALL, REHEARSAL_PATIENCE = 40_000, 10


def part_cases(part: str, op: str, rehearsed: bool = False) -> list[Case]:
    """Those of an op in a part; rehearsed are small ones, whose backend is then the library."""
    found = [case for case in gpu_cases.cases(op) if case.backend in OPS[part]]
    if rehearsed:
        found = [c for c in found if sum(map(math.prod, c.call.shapes)) < SMALL and c.backend != "library"]
    return found


def judge(case: Case, device: str, backend: str | None = None) -> dict:
    """The result of one case."""
    start = time.perf_counter()
    result = {"case": str(case), "op": case.call.op, "backend": case.backend, "kind": case.kind}
    try:
        norms, elements = case.errors(device, backend)
    except BackendError as error:
        return {**result, "status": "refused", "error": str(error)}
    except Exception as error:  # Triton's have no common base; each is a finding
        return {**result, "status": "wrong", "error": f"{type(error).__name__}: {error}"[:1000]}
    right = max(norms, elements) <= 1
    seconds = time.perf_counter() - start
    shares = {"share_of_norm_tolerance": round(norms, 3), "share_of_element_tolerance": round(elements, 3)}
    shares = {name: value if math.isfinite(value) else str(value) for name, value in shares.items()}
    return {**result, "status": "right" if right else "wrong", **shares, "seconds": round(seconds, 3)}


def work(part: str, op: str, done: set[str], files: Sequence[Path], rehearsed: bool) -> int:
    """The cases of an op that are not done yet, each written down; :data:`LOST` when this process has lost the GPU."""
    watch = gpu_cache.Watch()
    device, backend = ("cpu", "library") if rehearsed else ("cuda", None)
    # Memory that nobody writes is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for case in part_cases(part, op, rehearsed):
        if str(case) in done:
            continue
        result = judge(case, device, backend)
        append(files, result)
        if result["status"] == "wrong" and is_lost():
            return LOST
    append(files, {"cache": f"{part}, {op}", **watch.as_dict()})
    return 0


def is_lost() -> bool:
    """Whether nothing works any more on this process's GPU."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_ops(part: str, files: Sequence[Path], rehearsed: bool) -> int:
    """A process per op at a time; where one dies, its case is wrong and another one takes over. 1 if one is wrong."""
    expected = {op: [str(c) for c in part_cases(part, op, rehearsed)] for op in gpu_cases.CALLS}
    running: dict[str, subprocess.Popen] = {}
    waiting = [op for op, cases in expected.items() if cases]
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            op = waiting.pop(0)
            running[op] = start_worker(part, op, files, rehearsed)
        time.sleep(0.05)
        for op, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[op]
            left = [case for case in expected[op] if case not in finished(files)]
            if not left:
                continue
            if process.returncode != LOST:
                error = f"its process ended with exit status {process.returncode}"
                append(files, {"case": left[0], "op": op, "status": "wrong", "error": error})
            if left[1:] or process.returncode == LOST:
                waiting.append(op)
    names = {case for cases in expected.values() for case in cases}
    results = [line for line in read_lines(files[0]) if line.get("case") in names]
    wrong = [r for r in results if r["status"] == "wrong"]
    for r in wrong:
        print(f"{r['case']}: {r.get('error', 'off by more than is allowed')}")
    return int(bool(wrong) or not any(r["status"] == "right" for r in results))


def start_worker(part: str, op: str, files: Sequence[Path], rehearsed: bool) -> subprocess.Popen:
    return subprocess.Popen(own_command("--work", part, op, files=files, rehearsed=rehearsed))


def own_command(*arguments: str, files: Sequence[Path], rehearsed: bool) -> list[str]:
    """This program's command line for something inside of it."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    command += [f"--out={file}" for file in files]
    return command + ["--rehearse"] * rehearsed


def finished(files: Sequence[Path]) -> set[str]:
    return {line["case"] for line in read_lines(files[0]) if "case" in line}


def small_problem(device: str) -> training_steps.Problem:
    """A training step of a small network on a mixed batch; what asks for networks later gets the published one."""
    whole_networks.published.cache_clear()
    try:
        with mock.patch.object(whole_networks, "CONFIG", NETWORK):
            return training_steps.Problem.of(COUNTS, device)
    finally:
        whole_networks.published.cache_clear()


def step_case(dtype: torch.dtype) -> str:
    return f"captured step, {dtype}"


def run_step(files: Sequence[Path], device: str) -> int:
    """One training step from a CUDA graph, in bfloat16 and in float32, against plain layers in float32; 1 if wrong."""
    watch, wrong = gpu_cache.Watch(), 0
    with gpu_cases.exact(True):
        problem = small_problem(device)
        for network in (problem.networks.ours, *problem.networks.plain):
            network.train(False)
        exact = whole_networks.once(problem.loop(dtype=torch.float32).named)
        for dtype, tolerance in STEP_TOLERANCES.items():
            (step,) = problem.mixed()
            result = {"case": step_case(dtype), "op": "step", "status": "right"}
            try:
                found = training_steps.GraphedStep(replace(step, dtype=dtype)).named()
                whole_networks.check("step", found, exact, tolerance)
            except Exception as error:  # each is a finding
                result |= {"status": "wrong", "error": f"{type(error).__name__}: {error}"[:1000]}
                wrong = 1
            append(files, result)
    append(files, {"cache": "step", **watch.as_dict()})
    return wrong


def launches(architecture: int = ARCHITECTURE) -> dict[str, list[Launch]]:
    """The launches of every case."""
    found: dict[str, list[Launch]] = {}

    def note(name: str, run) -> None:
        inside: dict[Launch, None] = {}
        with recorded(inside, architecture):
            run()
        found[name] = list(inside)

    for case in gpu_cases.all_cases():
        if case.backend == "triton":
            note(str(case), partial(case.run, "cpu"))
    problem = small_problem("cpu")
    for dtype in STEP_TOLERANCES:
        (step,) = problem.mixed()
        with gpu_cases.exact(True):
            note(step_case(dtype), replace(step, dtype=dtype))
    for name, run in sanitize_cuda.THREE.items():
        note(f"memcheck, {name}", partial(forced, run))
    return found


def forced(run) -> None:
    """One of the memory checker's calls, of which each has a kernel of Triton's too; fake tensors have no values."""
    with use("triton"), mock.patch.object(sanitize_cuda, "require_finite"):
        run("cpu")


def memcheck(limit: float, log: Path, rehearsed: bool = False) -> Part:
    """Three kernels under compute-sanitizer, where it is installed and knows the device."""
    program = shutil.which("compute-sanitizer")
    script = [sys.executable, str(ROOT / "benchmarks" / "sanitize_cuda.py"), "--three"]
    if rehearsed:
        return run_part("memcheck", [*script, "--rehearse"], limit, log)
    if program is None:
        return Part("memcheck", "not run", detail="there is no compute-sanitizer")
    options = ["--tool", "memcheck", "--print-limit", "20", "--report-api-errors", "no"]
    command = [program, *options, "--error-exitcode", str(FOUND), *script]
    part = run_part("memcheck", command, limit, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if part.status == "failed" and part.detail != f"exit status {FOUND}":
        part.status, part.detail = "not run", f"compute-sanitizer cannot work here: {part.detail}"
    return part


def run_all(record: Record, log: Path, rehearsed: bool = False) -> None:
    """Every part in its order."""
    clock = Clock(SECONDS)
    for name in SECONDS:
        limit = REHEARSAL_PATIENCE * SECONDS[name] if rehearsed else clock.share(name)
        if name == "build":
            part = Part("build", "not run", detail="a rehearsal") if rehearsed else build(limit, log)
        elif name == "memcheck":
            part = memcheck(limit, log, rehearsed)
        else:
            arguments = ("--step",) if name == "step" else ("--ops", name)
            command = own_command(*arguments, files=record.files, rehearsed=rehearsed)
            part = run_part(name, command, limit, log)
        results = [r for r in record.results("case") if belongs(r, name)]
        counts = {s: sum(r["status"] == s for r in results) for s in ("right", "wrong", "refused")}
        if results:
            texts = [part.detail, *(f"{count} {status}" for status, count in counts.items() if count)]
            part.detail = "; ".join(filter(None, texts))
        record.add(part)


def belongs(result: dict, part: str) -> bool:
    return result["op"] == "step" if part == "step" else result.get("backend") in OPS.get(part, ())


def summary(record: Record) -> str:
    """What was wrong or refused, what was compiled, and the parts."""
    lines = [
        f"{r['status']}: {r['case']}: {r.get('error', 'off by more than is allowed')}"
        for r in record.results("case")
        if r["status"] != "right"
    ]
    return "\n".join([*lines, *gpu_cache.counts(record.results("cache")), state(record.parts)])


def exit_status(parts: Sequence[Part]) -> int:
    """What cannot run here, such as a tool that is not installed, is no failure."""
    return int(any(part.status in ("failed", "stopped") for part in parts))


def plan() -> dict[str, list[str]]:
    """The cases of every part."""
    cases = {name: [str(c) for op in gpu_cases.CALLS for c in part_cases(name, op)] for name in OPS}
    return {**cases, "step": list(map(step_case, STEP_TOLERANCES)), "memcheck": list(sanitize_cuda.THREE)}


def rehearse() -> int:
    """The plan, the same processes with small cases on the processor, and the look-up of every kernel."""
    print(plan_text("gpu-smoke", SECONDS, plan()), flush=True)
    if reason := gpu_cache.not_made():
        print(reason)
        return 1
    with tempfile.TemporaryDirectory() as name:
        record = Record("smoke", harness.machine_facts(), [Path(name)])
        run_all(record, Path(name) / "gpu-smoke.log", rehearsed=True)
        print(summary(record))
    all_passed = all(part.status == "passed" for part in record.parts if part.name != "build")
    return gpu_cache.rehearse(launches()) or int(not all_passed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inside = parser.add_argument_group("what the program calls itself with")
    inside.add_argument("--ops", choices=OPS)
    inside.add_argument("--work", nargs=2, metavar=("PART", "OP"))
    inside.add_argument("--step", action="store_true")
    inside.add_argument("--rehearse", action="store_true")
    inside.add_argument("--out", type=Path, action="append", default=[])
    options = parser.parse_args()
    if options.work:
        return work(*options.work, finished(options.out), options.out, options.rehearse)
    if options.ops:
        return run_ops(options.ops, options.out, options.rehearse)
    if options.step:
        return run_step(options.out, "cpu" if options.rehearse else "cuda")
    if reason := no_gpu():
        print(f"gpu-smoke: {reason}; a rehearsal")
        return rehearse()
    log = log_file("smoke")
    log.unlink(missing_ok=True)
    record = Record("smoke", harness.machine_facts(), folders())
    with gpu_cache.installed_for_this_gpu(record.files):
        run_all(record, log)
    print(f"log: {log}\nwritten: {', '.join(map(str, record.files))}\n\n{summary(record)}")
    return exit_status(record.parts)


if __name__ == "__main__":
    sys.exit(main())
