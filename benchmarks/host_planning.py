"""What a training step with a new mix of stages costs the host in planning: the tables of its Triton launches.

    python benchmarks/host_planning.py [--mixes N] [--json]

The plans are those that a step of the EDM CIFAR-10 network in bfloat16 asks for beyond those of another mix, forward
and backward, every op served by Triton; they are found on fake tensors. Timed is planning alone, on one thread, once
the shapes are known: no launches, those that write the tables among them. Times are medians over mixes that
were not there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import torch  # noqa: E402
import whole_networks  # noqa: E402
from launches import recorded  # noqa: E402

import harness  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from msd_kernels.runtime import formulas, plan_cache  # noqa: E402
from multistage_diffusion import StageOrder, networks  # noqa: E402

PLANS = {
    "group_norm": ("plan",),
    "resample2d": ("plan",),
    "attention": ("plan",),
    "grouped_conv2d": ("_plan_forward", "_plan_dgrad", "_plan_wgrad"),
}
MIXES = ((92, 3, 1), (60, 30, 6))
Call = tuple[str, Callable[..., object], tuple]  # what is planned, by which function, and its arguments


def plans_of_step(counts: Sequence[int]) -> dict[tuple, Call]:
    """All plans of one step, by what they are asked with."""
    found: dict[tuple, Call] = {}

    def noting(name: str, plan: Callable[..., object]) -> Callable[..., object]:
        def note(*arguments):
            found[name, arguments] = name, plan, arguments
            return plan(*arguments)

        return note

    side = whole_networks.CONFIG["image_size"]
    with ExitStack() as stack:
        for op, names in PLANS.items():
            module = import_module(f"msd_kernels.ops.{op}.triton")
            for name in names:
                noted = noting(f"{op}.{name}", getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, noted))
        stack.enter_context(recorded({}))
        stack.enter_context(use("triton"))
        network = networks.build(whole_networks.CONFIG)
        x, noise = torch.randn(sum(counts), 3, side, side), torch.randn(sum(counts))
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x, noise, StageOrder(tuple(counts), None, None))
        y.float().sum().backward()
    return found


def with_counts(calls: Sequence[Call], counts: Sequence[int]) -> list[Call]:
    """The same plans for other counts, on the CPU."""
    found = []
    for name, plan, (layout, *others, _) in calls:
        repeated = tuple(counts) * (len(layout.counts) // len(counts))
        found.append((name, plan, (layout._replace(counts=repeated), *others, torch.device("cpu"))))
    return found


def measure(mixes: int) -> dict[str, object]:
    """Milliseconds of all plans, microseconds of each by what is planned, and how many there are."""
    known, asked = map(plans_of_step, MIXES)
    calls = [call for key, call in asked.items() if key not in known]
    for _, plan, arguments in with_counts(calls, MIXES[1]):
        plan(*arguments)
    totals, single = [], {name: [] for name, _, _ in calls}
    with mock.patch.object(
        plan_cache, "written", lambda cells, device: torch.empty(len(cells), dtype=torch.int64)
    ):
        for mix in range(mixes):
            _time_mix(calls, mix, totals, single)
    return {
        "evaluated_by": formulas.implementation().__module__,
        "plans": len(calls),
        "ms": round(statistics.median(totals), 3),
        "least_ms": round(min(totals), 3),
        "us_each": {name: round(statistics.median(times), 1) for name, times in single.items()},
    }


def _time_mix(calls: Sequence[Call], mix: int, totals: list[float], single: dict[str, list[float]]) -> None:
    spent = 0.0
    for name, plan, arguments in with_counts(calls, (mix + 100, mix + 10, 1)):
        begin = time.perf_counter()
        plan(*arguments)
        seconds = time.perf_counter() - begin
        spent += seconds
        single[name].append(1e6 * seconds)
    totals.append(1e3 * spent)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--mixes", type=int, default=300, help="new mixes of stages (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.mixes)
    if options.json:
        print(json.dumps({"machine": harness.machine_facts(), "planning": found}, indent=1))
    else:
        print(
            f"{found['plans']} plans, {found['ms']} ms (least {found['least_ms']}), by {found['evaluated_by']}"
        )
        print(harness.table([(name, str(us)) for name, us in found["us_each"].items()], ("plan", "us")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
