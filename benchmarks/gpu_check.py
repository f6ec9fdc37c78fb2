"""Measures on this machine's GPU in under 400 seconds: ``make gpu-check``.

Ours beside eager PyTorch, the library and ``torch.compile``; see gpu_races.py. No tests: ``make gpu-smoke`` says
whether it works, ``python -m pytest -m gpu`` runs all. Every benchmark runs in a process of its own within its share of
the time; each result is a line of ``benchmarks/results/gpu-check-<name of the GPU>.jsonl`` as soon as it is there, and
short tables come last. Uses the interpreter it is started with, installs nothing, needs no network. Kernels come from
the cache of ``make gpu-cache``, where there is one; what compiles on the clock all the same, ``torch.compile``, comes
last. Exit status 1 if the build fails or a result that was to be timed is wrong.

Without a GPU it rehearses: it prints the plan, takes every race through the same functions with tensors that have no
memory, and looks up every kernel in the cache; exit status 1 if one is missing.

Environment: as for gpu_smoke.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import gpu_cache  # noqa: E402
import gpu_races  # noqa: E402
from gpu_parts import Clock, Part, Record, build, folders, log_file, plan_text, run_part, state  # noqa: E402
from sanitize_cuda import no_gpu  # noqa: E402

import harness  # noqa: E402

# The parts in their order, with the seconds that each gets if all before it use up theirs. What is left is shared anew
# before every part. What is compiled while it runs comes last, because nobody knows how long that takes: it gets all
# that is left, and is cut off where it is too little.
SECONDS = {
    "build": 80.0,
    "group_norm": 35.0,
    "grouped_conv2d": 50.0,
    "attention": 30.0,
    "grouped_linear": 12.0,
    "resample2d": 23.0,
    "sampling_step": 35.0,
    "training_step": 45.0,
    "compiled_ops": 35.0,
    "compiled_steps": 35.0,
}
# The part of a benchmark's share after which it starts no further race.
STARTS_RACES = 0.7


def benchmark(name: str, limit: float, record: Record, log: Path) -> Part:
    """One benchmark; it stops itself a little before it would be stopped."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_races.py"), name]
    command += ["--seconds", f"{limit * STARTS_RACES:.0f}", *(f"--out={file}" for file in record.files)]
    part = run_part(name, command, limit, log)
    results = [result for result in record.results("benchmark") if result["benchmark"] == name]
    wrong = [f"{result['failed']} failed: {result['error']}" for result in results if "failed" in result]
    missing = [f"not run: {result['not_run']}" for result in results if "not_run" in result]
    part.detail = "; ".join([*filter(None, [part.detail]), *wrong, *missing])
    if wrong:
        part.status = "failed"
    return part


def summary(record: Record) -> str:
    """The tables that are printed last."""
    results = record.results("benchmark")
    rows = [
        (result["benchmark"], result["case"], result["backend"] or "", result["l2"],
         f"{result['seconds']['ours'][0] * 1e6:.1f}", f"{result['share_of_floor']:.2f}",
         "  ".join(f"{peer} {ratio[0]:.2f}x" for peer, ratio in result["ratio"].items()))
        for result in results
        if "case" in result and result["l2"] != "warm"
    ]  # fmt: skip
    header = ("benchmark", "case", "backend", "L2", "ours us", "floor / ours", "peer / ours")
    lines = [harness.table(rows, header)] if rows else []
    for result in (result for result in results if "peak_bytes" in result):
        sizes = "  ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in result["peak_bytes"].items())
        lines.append(f"{result['benchmark']}, {result['case']}: peak memory beside the weights: {sizes}")
    for measured in (result for result in results if "copy_bytes_per_second" in result):
        lines.append(
            f"{measured['benchmark']}: copy {measured['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 matrix product "
            f"{measured['matmul_operations_per_second'] / 1e12:.0f} TFLOP/s"
        )
    return "\n".join([*lines, *gpu_cache.counts(record.results("cache")), state(record.parts)])


def run_all(record: Record, log: Path) -> None:
    """Every part in its order."""
    clock = Clock(SECONDS)
    for name in SECONDS:
        limit = clock.share(name)
        record.add(build(limit, log) if name == "build" else benchmark(name, limit, record, log))


def exit_status(parts: Sequence[Part]) -> int:
    """A benchmark that is stopped has told what it found; a build that is, has not."""
    return int(
        any(part.status == "failed" or (part.name, part.status) == ("build", "stopped") for part in parts)
    )


def rehearse() -> int:
    """The plan, every race without memory, and the look-up of every kernel."""
    labels = {name: [race.label for race in races()] for name, races in gpu_races.BENCHMARKS.items()}
    print(plan_text("gpu-check", SECONDS, labels), flush=True)
    if reason := gpu_cache.not_made():
        print(reason)
        return 1
    found = {}
    for name in gpu_races.BENCHMARKS:
        for label, launches, results in gpu_races.rehearse(name):
            found[f"{name}, {label}"] = launches
            for result in results:
                print(
                    f"{name}, {result['case']}, {result['l2']}: ours, {', '.join(result['ratio'])}",
                    flush=True,
                )
    return gpu_cache.rehearse(found)


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if reason := no_gpu():
        print(f"gpu-check: {reason}; a rehearsal")
        return rehearse()
    log = log_file("check")
    log.unlink(missing_ok=True)
    record = Record("check", harness.machine_facts(), folders())
    with gpu_cache.installed_for_this_gpu(record.files):
        run_all(record, log)
    print(f"log: {log}\nwritten: {', '.join(map(str, record.files))}\n\n{summary(record)}")
    return exit_status(record.parts)


if __name__ == "__main__":
    sys.exit(main())
