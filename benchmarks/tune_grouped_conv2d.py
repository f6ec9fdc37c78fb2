"""Fills the launch table of this machine's GPU for the grouped linear layer and convolution.

    python benchmarks/tune_grouped_conv2d.py [--seconds 240] [--arithmetics half,tf32,float32] [--write]

For every arithmetic and pass it times the tile shapes below on one of EDM's decoder layers and keeps the fastest, then
measures from how much work per stage on the library's loop over the stages is faster. With ``--write`` the result
replaces ``msd_kernels/tuned/sm_XX.json``; without, it is printed. ``python -m msd_kernels.aot`` must pass afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch  # noqa: E402

import harness  # noqa: E402
from msd_kernels import tuned  # noqa: E402
from msd_kernels.library import grouped_conv2d as library  # noqa: E402
from msd_kernels.triton import grouped_conv2d as triton  # noqa: E402
from msd_kernels.triton.problems import Layout  # noqa: E402

DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
# One third of the samples each, at the middle resolution: every tile kind has work.
MIX = Layout((21, 21, 22), (384, 256, 32), (256, 256, 256), (384, 256, 32), 16, 16, 3, "none")
SHAPES = ((128, 128), (128, 256), (256, 128), (64, 128), (128, 64), (64, 64))
DEPTHS, STAGES, WARPS = (16, 32, 64), (2, 3, 4, 5), (4, 8)
REPETITIONS = 10
SAMPLES = (1, 2, 4, 8, 16, 32, 64)


def make_tensors(layout: Layout, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, skip, weight and the output's cotangent."""
    sizes = (
        sum(n * c for n, c in zip(layout.counts, layout.channels, strict=True)) * layout.in_pixels,
        sum(n * d for n, d in zip(layout.counts, layout.skip_channels, strict=True)) * layout.in_pixels,
        sum(layout.weight_sizes),
        sum(n * o for n, o in zip(layout.counts, layout.out_channels, strict=True)) * layout.out_pixels,
    )
    return tuple(torch.randn(size, device="cuda").to(dtype) for size in sizes)


def candidates(current: tuned.Tile) -> Iterator[tuple[tuned.Tile, int]]:
    """The present tile first, then all others with every number of warps; early ones are unlike each other."""
    shapes = [tuned.Tile(m, n, k, s) for (m, n), k, s in product(SHAPES, DEPTHS, STAGES)]
    others = list(product([tile for tile in shapes if tile != current], WARPS))
    random.Random(0).shuffle(others)
    yield from [*product([current], WARPS), *others]


def fastest(parameters, run: Callable[[], object], timer: harness.Timer, deadline: float):
    """The parameters with the wide tile and the warps that serve ``run(parameters)`` best."""
    best, best_time = parameters, float("inf")
    for tile, warps in candidates(parameters.wide):
        if time.monotonic() > deadline:
            break
        trial = replace(parameters, wide=tile, warps=warps)
        try:
            taken = harness.median_seconds(lambda trial=trial: run(trial), timer, REPETITIONS)
        except Exception as error:  # too much shared memory, too many registers: not a candidate
            print(f"  {tile} x {warps} warps: {type(error).__name__}", file=sys.stderr)
            continue
        if taken < best_time:
            best, best_time = trial, taken
            print(f"  {tile} x {warps} warps: {harness.milliseconds(taken)} ms", file=sys.stderr)
    return best


def tune(architecture: int, arithmetics: Sequence[str], timer: harness.Timer, seconds: float) -> dict:
    """The committed table with other parameters for these arithmetics."""
    table = deepcopy(tuned.table(architecture))
    share = seconds / (2 * len(arithmetics))
    for arithmetic in arithmetics:
        x, skip, weight, dy = make_tensors(MIX, DTYPES[arithmetic])
        y, dweight = torch.empty_like(dy), torch.empty_like(weight)

        def forward(trial, inputs=(x, skip, weight, None, None, None, y), arithmetic=arithmetic):
            triton.grouped_conv2d_forward(*inputs, MIX, 1.0, arithmetic, trial)

        def wgrad(trial, inputs=(dy, x, skip, dweight, None, None), arithmetic=arithmetic):
            triton.grouped_conv2d_wgrad(*inputs, MIX, arithmetic, trial)

        for name, run, read in (("product", forward, tuned.product), ("wgrad", wgrad, tuned.wgrad)):
            print(f"{name}, {arithmetic}", file=sys.stderr)
            best = fastest(read(architecture, arithmetic), run, timer, time.monotonic() + share)
            table["grouped"][name][arithmetic] = asdict(best)
    return table


def crossover(linear: bool, parameters: tuned.ProductParameters, timer: harness.Timer) -> float:
    """The largest work per stage, in GFLOP, up to which one launch is never slower than the library's loop."""
    taken = 0.0
    for samples in SAMPLES:
        if linear:
            layout = Layout((64 * samples,) * 3, (512,) * 3, (0,) * 3, (384, 256, 32), 1, 1, 1, "none")
        else:
            layout = replace(MIX, counts=(samples,) * 3)
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
