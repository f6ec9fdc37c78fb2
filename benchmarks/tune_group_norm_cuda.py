"""Times every cut of the CUDA GroupNorm on the networks' feature maps, to check the estimates that choose one.

    python benchmarks/tune_group_norm_cuda.py [--seconds 240]

A cut is (groups of a unit, parts of a unit or 0 for two passes). For every shape and direction it prints the fastest
cuts and the estimates' own, each as a share of the bandwidth of a large copy in the same run, with a cold L2. The
constants of the estimates are at the top of csrc/cuda/group_norm_plan.cpp.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402

import harness  # noqa: E402
from msd_kernels.layouts import Affine, GroupNormLayout  # noqa: E402
from msd_kernels.ops.group_norm import cuda as implementation  # noqa: E402
from msd_kernels.runtime.extension import load  # noqa: E402

# (batch, channels, side): groups
SHAPES = {
    (512, 256, 32): 16,
    (64, 256, 32): 16,
    (64, 640, 32): 16,
    (64, 384, 16): 16,
    (64, 288, 16): 16,
    (64, 512, 8): 16,
    (8, 256, 32): 16,
    (1, 256, 32): 16,
    (16, 224, 64): 32,
    (64, 32, 32): 8,
}
PARTS = (1, 2, 4, 8, 0)
REPETITIONS = 7
BEST = 3


def directions(shape: tuple[int, int, int], groups: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, bytes that must move and one call, forward and backward, in bfloat16 NHWC with all parameters."""
    batch, channels, side = shape
    layout = GroupNormLayout((batch,), (channels,), (0,), (groups,), side**2, True, 1e-5, True)
    x, dy = (torch.randn(batch * channels * side**2, device="cuda").bfloat16() for _ in range(2))
    weight, bias = (torch.randn(channels, device="cuda") for _ in range(2))
    scale, shift = (torch.randn(batch * channels, device="cuda").bfloat16() for _ in range(2))
    affine = Affine(weight, bias, scale, shift)
    _, mean, rstd = implementation.group_norm(x, None, affine, layout)
    yield "forward", 2 * x.nbytes, lambda: implementation.group_norm(x, None, affine, layout)
    inputs = (dy, x, None, mean, rstd, affine)
    wanted = [True, False, *[True] * 4]
    yield (
        "backward",
        3 * x.nbytes,
        lambda: implementation.group_norm_backward(*inputs, layout, wanted),
    )


def time_cuts(run: Callable[[], object], groups: int, timer: harness.Timer) -> dict[str, float]:
    """Seconds by cut; those that the device cannot run are left out."""
    implementation.CUT = implementation.ESTIMATED
    times = {"estimated": harness.median_seconds(run, timer, REPETITIONS)}
    choices = [b for b in (1, 2, 4, 8, 16, 32) if b <= groups]
    for cut in ((b, parts) for b in choices for parts in PARTS):
        implementation.CUT = cut
        try:
            times[f"{cut[0]} groups x {cut[1] or 'two passes'}"] = harness.median_seconds(
                run, timer, REPETITIONS
            )
        except RuntimeError as error:
            if "impossible" not in str(error):
                raise
    implementation.CUT = implementation.ESTIMATED
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240.0)
    deadline = time.monotonic() + parser.parse_args().seconds
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    if reason := load("cuda").reason:
        raise SystemExit(f"the CUDA extension is not here: {reason}")
    timer = harness.cuda_timer(cold=True)
    bandwidth = harness.copy_bandwidth("cuda", timer, megabytes=1024)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for shape, groups in SHAPES.items():
        for direction, least, run in directions(shape, groups):
            if time.monotonic() > deadline:
                print(f"{shape} {direction}: no time was left")
                continue
            times = time_cuts(run, groups, timer)
            shown = sorted(times, key=times.get)[:BEST]
            shown += ["estimated"] if "estimated" not in shown else []
            shares = (f"{cut}: {least / times[cut] / bandwidth:.2f}" for cut in shown)
            print(f"{shape} {direction}: " + ", ".join(shares), flush=True)


if __name__ == "__main__":
    main()
