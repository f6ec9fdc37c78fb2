"""Fills the launch table of this machine's GPU for the grouped linear layer and convolution.

    python benchmarks/tune_grouped_conv2d.py [--seconds 240] [--arithmetics half,tf32,float32] [--write]

For every arithmetic and pass it times the tile shapes below on one of EDM's decoder layers and keeps the fastest, and
the fastest larger one for launches that fill the GPU; then it measures from how much work per stage on the library's
loop over the stages is faster. With ``--write`` the result
replaces ``msd_kernels/tuned/sm_XX.json``; without, it is printed. ``python -m msd_kernels.aot`` must pass afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch  # noqa: E402

import harness  # noqa: E402
from msd_kernels.layouts import Conv2dLayout  # noqa: E402
from msd_kernels.ops.grouped_conv2d import library, triton  # noqa: E402
from msd_kernels.runtime import tuned  # noqa: E402

DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
# One third of the samples each, at the middle resolution: every tile kind has work.
MIX = Conv2dLayout((21, 21, 22), (384, 256, 32), (256, 256, 256), (384, 256, 32), 16, 16, 3, "none")
# As many samples as fill every GPU several times over, none of them in narrow tiles, for the tile that serves only such
# launches.
FULL = MIX._replace(counts=(64, 64, 0), height=32, width=32)
SHAPES = ((128, 128), (128, 256), (256, 128), (64, 128), (128, 64), (64, 64))
DEPTHS, STAGES, WARPS = (16, 32, 64), (2, 3, 4, 5), (4, 8)
REPETITIONS = 10
SAMPLES = (1, 2, 4, 8, 16, 32, 64)


def make_tensors(layout: Conv2dLayout, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, skip, weight and the output's cotangent."""
    sizes = (
        sum(n * c for n, c in zip(layout.counts, layout.channels, strict=True)) * layout.in_pixels,
        sum(n * d for n, d in zip(layout.counts, layout.skip_channels, strict=True)) * layout.in_pixels,
        sum(layout.weight_sizes),
        sum(n * o for n, o in zip(layout.counts, layout.out_channels, strict=True)) * layout.out_pixels,
    )
    return tuple(torch.randn(size, device="cuda").to(dtype) for size in sizes)


def tiles_unlike(current: tuned.Tile) -> list[tuned.Tile]:
    """All other tile shapes, early ones unlike each other."""
    shapes = [tuned.Tile(m, n, k, s) for (m, n), k, s in product(SHAPES, DEPTHS, STAGES)]
    others = [tile for tile in shapes if tile != current]
    random.Random(0).shuffle(others)
    return others


def seconds_of(parameters, run: Callable[[object], object], timer: harness.Timer) -> float:
    """The time of ``run(parameters)``, infinite where it cannot run."""
    shown = f"{parameters.wide} x {parameters.warps} warps"
    try:
        taken = harness.median_seconds(lambda: run(parameters), timer, REPETITIONS)
    except Exception as error:  # too much shared memory, too many registers: not a candidate
        print(f"  {shown}: {type(error).__name__}", file=sys.stderr)
        return float("inf")
    print(f"  {shown}: {harness.milliseconds(taken)} ms", file=sys.stderr)
    return taken


def fastest(
    trials: Iterable, run: Callable[[object], object], timer: harness.Timer, deadline: float
) -> tuple:
    """The parameters of ``trials`` that serve ``run(parameters)`` best, and their time; the first is always tried."""
    best, best_time = None, float("inf")
    for trial in trials:
        if best is not None and time.monotonic() > deadline:
            break
        taken = seconds_of(trial, run, timer)
        if best is None or taken < best_time:
            best, best_time = trial, taken
    return best, best_time


def wide_trials(parameters) -> Iterator:
    """The parameters with every wide tile and number of warps, the present tile first."""
    tiles = [parameters.wide, *tiles_unlike(parameters.wide)]
    return (replace(parameters, wide=tile, warps=warps) for tile in tiles for warps in WARPS)


def with_large(
    parameters: tuned.ProductParameters,
    present: tuned.Tile | None,
    run: Callable[[object], object],
    timer: harness.Timer,
    deadline: float,
) -> tuned.ProductParameters:
    """The parameters with the tile that serves ``run(parameters)``, a launch that fills the GPU, faster than the wide
    one does, and with its speed; without one if there is none. ``present`` is tried first.
    """
    area = parameters.wide.m * parameters.wide.n
    tiles = [t for t in (present, *tiles_unlike(present)) if t and t.m * t.n > area]
    taken = seconds_of(parameters, run, timer)
    best, best_time = fastest((replace(parameters, wide=tile) for tile in tiles), run, timer, deadline)
    if best is None or best_time >= taken:
        return parameters
    return replace(parameters, large=best.wide, large_speed=round(taken / best_time, 3))


def forward_of(layout: Conv2dLayout, arithmetic: str) -> Callable[[tuned.ProductParameters], None]:
    """A forward pass of a layout with given parameters."""
    x, skip, weight, y = make_tensors(layout, DTYPES[arithmetic])

    def run(parameters):
        triton.grouped_conv2d_forward(
            x, skip, weight, None, None, None, y, layout, 1.0, arithmetic, parameters
        )

    return run


def tune(architecture: int, arithmetics: Sequence[str], timer: harness.Timer, seconds: float) -> dict:
    """The committed table with other parameters for these arithmetics."""
    table = deepcopy(tuned.table(architecture))
    share = seconds / (3 * len(arithmetics))
    for arithmetic in arithmetics:
        x, skip, weight, dy = make_tensors(MIX, DTYPES[arithmetic])
        dweight = torch.empty_like(weight)

        def wgrad(trial, inputs=(dy, x, skip, dweight, None, None), arithmetic=arithmetic):
            triton.grouped_conv2d_wgrad(*inputs, MIX, arithmetic, trial)

        forward, full = (forward_of(layout, arithmetic) for layout in (MIX, FULL))
        committed = tuned.product(architecture, arithmetic)
        print(f"product, {arithmetic}", file=sys.stderr)
        trials = wide_trials(replace(committed, large=None, large_speed=1.0))
        best, _ = fastest(trials, forward, timer, time.monotonic() + share)
        print(f"large, {arithmetic}", file=sys.stderr)
        best = with_large(best, committed.large, full, timer, time.monotonic() + share)
        table["grouped"]["product"][arithmetic] = asdict(best)
        print(f"wgrad, {arithmetic}", file=sys.stderr)
        trials = wide_trials(tuned.wgrad(architecture, arithmetic))
        best, _ = fastest(trials, wgrad, timer, time.monotonic() + share)
        table["grouped"]["wgrad"][arithmetic] = asdict(best)
    return table


def crossover(linear: bool, parameters: tuned.ProductParameters, timer: harness.Timer) -> float:
    """The largest work per stage, in GFLOP, up to which one launch is never slower than the library's loop."""
    taken = 0.0
    for samples in SAMPLES:
        if linear:
            layout = Conv2dLayout((64 * samples,) * 3, (512,) * 3, (0,) * 3, (384, 256, 32), 1, 1, 1, "none")
        else:
            layout = MIX._replace(counts=(samples,) * 3)
        *inputs, y = (t if t.numel() else None for t in make_tensors(layout, torch.bfloat16))
        inputs += [None, None, None]
        one_launch = partial(triton.grouped_conv2d_forward, *inputs, y, layout, 1.0, "half", parameters)
        per_stage = partial(library.grouped_conv2d, *inputs, *asdict(layout).values(), 1.0)
        ours, loop = (harness.median_seconds(run, timer, REPETITIONS) for run in (one_launch, per_stage))
        shown, loop_shown = harness.milliseconds(ours), harness.milliseconds(loop)
        print(f"{samples} samples per stage: {shown} ms, loop {loop_shown} ms", file=sys.stderr)
        if ours > loop:
            break
        taken = layout.flops / 3 / 1e9
    return round(taken, 3)


def format_table(table: dict) -> str:
    """JSON with one line per tile and per crossover."""
    lines: list[str] = []

    def mark(value):
        if isinstance(value, list):
            return [mark(v) for v in value]
        if not isinstance(value, dict):
            return value
        if all(isinstance(v, (int, float, str)) for v in value.values()):
            lines.append(json.dumps(value))
            return f"@{len(lines) - 1}@"
        return {key: mark(v) for key, v in value.items()}

    text = json.dumps(mark(table), indent=2)
    for index, line in enumerate(lines):
        text = text.replace(f'"@{index}@"', line)
    return text + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=240, help="for the search; the crossover takes some more"
    )
    parser.add_argument(
        "--arithmetics",
        type=lambda text: text.split(","),
        default=list(tuned.ARITHMETICS),
        metavar="LIST",
        help=f"to search for, of {', '.join(tuned.ARITHMETICS)}; default: all",
    )
    parser.add_argument(
        "--write", action="store_true", help="replace the committed table of this architecture"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_grouped_conv2d: needs a CUDA device, torch sees none", file=sys.stderr)
        return 1
    architecture = tuned.architecture_of(torch.device("cuda", torch.cuda.current_device()))
    torch.backends.cudnn.benchmark = True
    timer = harness.cuda_timer(cold=False)
    table = tune(architecture, options.arithmetics, timer, options.seconds)
    name = torch.cuda.get_device_name()
    half = tuned.parse(tuned.ProductParameters, table["grouped"]["product"]["half"])
    for op, linear in (("grouped_conv2d", False), ("grouped_linear", True)):
        table["crossover"][op] = {"gflop_per_stage": crossover(linear, half, timer), "measured_on": name}
    text = format_table(table)
    if options.write:
        (Path(tuned.__file__).parent / f"sm_{architecture}.json").write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
