"""What a call of each op costs the host, on tensors so small that little else counts, next to PyTorch's GroupNorm.

    python benchmarks/host_overhead.py [--json]

One thread. Times are medians; ``of torch`` is the median of the ratios to ``torch.nn.functional.group_norm`` of
2×32×4×4 in the same round, without gradients, or forward and backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import harness  # noqa: E402
import msd_kernels  # noqa: E402
from harness import OURS, Function  # noqa: E402
from msd_kernels import StageBatch  # noqa: E402

TORCH = "torch.group_norm"
COUNTS, CHANNELS, SIDE = (1, 0, 2), (16, 8, 8), 4


def stage_batch(channels: tuple[int, ...] = CHANNELS) -> StageBatch:
    elements = sum(n * c for n, c in zip(COUNTS, channels, strict=True)) * SIDE**2
    return StageBatch(torch.randn(elements), COUNTS, channels, SIDE, SIDE)


def weights(*sides: int) -> list[Tensor]:
    return [torch.randn(c, c, *sides) for c in CHANNELS]


def calls() -> dict[str, tuple[Function, list[Tensor]]]:
    """A call of each op, which returns a tensor, and what it is differentiated by."""
    x, packed = stage_batch(), stage_batch(tuple(3 * c for c in CHANNELS))
    image, scale, shift = torch.randn(2, 32, SIDE, SIDE), torch.randn(32), torch.randn(32)
    kernel, matrix = weights(3, 3), weights()
    return {
        "group_norm": (lambda: msd_kernels.group_norm(image, 8, scale, shift), [image, scale, shift]),
        "group_norm of stages": (lambda: msd_kernels.group_norm(x, 4).values, [x.values]),
        "grouped_conv2d": (lambda: msd_kernels.grouped_conv2d(x, kernel).values, [x.values, *kernel]),
        "grouped_linear": (lambda: msd_kernels.grouped_linear(x, matrix).values, [x.values, *matrix]),
        "attention": (lambda: msd_kernels.attention(packed, layout="blocked").values, [packed.values]),
        "resample2d": (lambda: msd_kernels.resample2d(x, (1, 1), up=2).values, [x.values]),
    }


def torch_group_norm() -> tuple[Function, list[Tensor]]:
    x, weight, bias = torch.randn(2, 32, SIDE, SIDE), torch.randn(32), torch.randn(32)
    return lambda: F.group_norm(x, 8, weight, bias), [x, weight, bias]


def step(call: Function, leaves: list[Tensor]) -> Function:
    """Forward and backward."""
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> None:
        y = call()
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    return run


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """Per op and direction: microseconds of a call, and how many times PyTorch's GroupNorm's that is."""
    found = {}
    for backward in (False, True):
        for name, (call, leaves) in calls().items():
            theirs, their_leaves = torch_group_norm()
            ours = step(call, leaves) if backward else call
            cases = {OURS: ours, TORCH: step(theirs, their_leaves) if backward else theirs}
            comparison = harness.Rounds(cases, span=0.01).run(seconds)
            found[f"{name}, forward and backward" if backward else f"{name}, forward"] = {
                "us": round(1e6 * comparison.time().median, 1),
                "of_torch": round(1 / comparison.ratio(TORCH).median, 2),
            }
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--seconds", type=float, default=2.0, help="per line (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(options.seconds)
    if options.json:
        print(json.dumps({"machine": harness.machine_facts(), "calls": found}, indent=1))
    else:
        rows = [(name, f"{entry['us']:.1f}", f"{entry['of_torch']:.2f}") for name, entry in found.items()]
        print(harness.table(rows, ("call", "us", "of torch")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
