"""A whole step of the EDM CIFAR-10 multi-stage network on this processor: ours, plain PyTorch's, and the floor.

    python benchmarks/whole_step.py [--counts 8,0,0] [--dtype float32] [--forward] [--compiled] [--json]

A training step is the loss and the gradients of all parameters, with dropout; --forward evaluates the denoiser, as
sampling does. They take turns in one process, on the same samples, with the same weights:

  ours      one mixed batch, by whatever `auto` chooses
  plain     the same networks in ordinary PyTorch, channels_last, one per stage; in float32 where the processor lacks
            the dtype that is asked for, as that is faster there
  compiled  the plain ones by torch.compile (--compiled), the weights frozen for --forward
  floor     every convolution, linear layer and product of attention that the step asks for, as often as it does,
            alone on random tensors; each by our kernels or by oneDNN, whichever is faster here and now. Nothing else
            of a step is in it: no norm, activation, dropout, sum or cast

ours and plain are first compared with plain in float32, loss and all gradients: a wrong network has no speed. ratio is
plain / ours of the medians, spread has the quartiles of each and of the ratios of the rounds. peak_bytes is how far the
memory of a process that does one step, and nothing else, rises above what it has before: weights are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import products  # noqa: E402
import sampling_steps  # noqa: E402
import torch  # noqa: E402
import training_steps  # noqa: E402
import whole_networks  # noqa: E402

import harness  # noqa: E402
from harness import OURS, Comparison, Function, Rounds  # noqa: E402
from msd_kernels import frozen_weights  # noqa: E402
from multistage_diffusion.common.host_memory import keep_freed_memory  # noqa: E402

PLAIN, COMPILED, FLOOR = "plain", "compiled", "floor"
# What the problems call their peers.
NAMES = {"loop": PLAIN, "eager": PLAIN, training_steps.COMPILED: COMPILED}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Say = Callable[[str], None]


@dataclass(frozen=True)
class WholeStep:
    """What is measured.

    Attributes:
        counts: samples per stage.
        forward: an evaluation of the denoiser; else a training step.
        compiled: plain PyTorch once more, compiled.
    """

    counts: tuple[int, ...] = (8, 0, 0)
    dtype: torch.dtype = torch.float32
    forward: bool = False
    compiled: bool = False

    @property
    def seconds(self) -> float:
        """What all of it may take, one round apart: the whole of a training step stays under three minutes."""
        return 80.0 if self.forward else 140.0

    def __str__(self) -> str:
        kind = "sampling" if self.forward else "training"
        return f"{kind} step, {'/'.join(map(str, self.counts))}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def plain_dtype(self) -> torch.dtype:
        return whole_networks.plain_dtype("cpu", self.dtype)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What the steps run in: sampling says that weights do not change, and memory is kept as in training."""
        keep_freed_memory()
        if not self.forward:
            yield
            return
        with frozen_weights():
            yield

    def cases(self, say: Say) -> dict[str, Function]:
        """Ours, plain, and the floor, each called once at least; refuses wrong results."""
        say("         checks every network against plain float32")
        found = {NAMES.get(name, name): run for name, run in self._checked().items()}
        say("         looks for the faster way of every product")
        layouts = products.layouts(whole_networks.CONFIG, self.counts)
        found[FLOOR] = products.Floor(layouts, self.dtype, backward=not self.forward)
        return found

    def _checked(self) -> dict[str, Function]:
        if self.forward:
            problem = sampling_steps.Problem.of(self.counts, dtype=self.dtype)
            return problem.checked_cases(self.compiled, graphed=False)
        extra = training_steps.COMPILED if self.compiled else None
        problem = training_steps.Problem.of(self.counts)
        return problem.checked_cases(extra, self.dtype, at_once=self.compiled)

    def _alone(self, name: str) -> Function:
        """One case, without the networks of the others."""
        if self.forward:
            cases = sampling_steps.Problem.of(self.counts, dtype=self.dtype).cases(False, graphed=False)
        else:
            cases = training_steps.Problem.of(self.counts).cases(dtype=self.dtype)
        whole_networks.published.cache_clear()
        return next(run for known, run in cases.items() if NAMES.get(known, known) == name)

    def weigh(self, name: str) -> int:
        """Bytes by which one step of a case alone raises the memory of this process, for a process that ends then."""
        run = self._alone(name)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with self.scope():
            return harness.extra_bytes(run)

    def peak_bytes(self, say: Say) -> dict[str, int]:
        """Of ours and of plain, each in a process of its own."""
        return {name: self._weighed_apart(name, say) for name in (OURS, PLAIN)}

    def _weighed_apart(self, name: str, say: Say) -> int:
        say(f"         weighs {name} in a process of its own")
        command = [sys.executable, __file__, "--weigh", name, "--counts", ",".join(map(str, self.counts))]
        command += ["--dtype", str(self.dtype).removeprefix("torch."), *["--forward"] * self.forward]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return int(done.stdout)

    def summary(self, comparison: Comparison, peak_bytes: dict[str, int]) -> dict[str, object]:
        """What is printed."""
        spreads = {name: comparison.time(name) for name in comparison.turns}
        seconds = {name: _short(spread.median) for name, spread in spreads.items()}
        quartiles = {name: (spread.low, spread.high) for name, spread in spreads.items()}
        ratio = comparison.ratio(PLAIN)
        quartiles["ratio"] = (ratio.low, ratio.high)
        return {
            **{name: seconds.get(name) for name in (OURS, PLAIN, COMPILED, FLOOR)},
            "ratio": _short(seconds[PLAIN] / seconds[OURS]),
            "spread": {name: [_short(value) for value in pair] for name, pair in quartiles.items()},
            "peak_bytes": peak_bytes,
            "rounds": len(comparison.turns[OURS]),
            "counts": self.counts,
            "dtype": str(self.dtype).removeprefix("torch."),
            "plain_dtype": str(self.plain_dtype).removeprefix("torch."),
            "pass": "forward" if self.forward else "forward + backward",
        }


def measure(
    step: WholeStep,
    seconds: float | None = None,
    say: Say = lambda text: None,
    race: Callable[[dict[str, Function], float], Comparison] | None = None,
) -> dict[str, object]:
    """Everything about a step, in so many seconds and at most one round more; a compilation takes its own.

    Args:
        seconds: where None, those of the step.
        race: lets the cases, which have been called before, take turns for so many seconds.
    """
    seconds = step.seconds if seconds is None else seconds
    began = time.monotonic()
    peak_bytes = step.peak_bytes(say)
    with step.scope():
        cases = step.cases(say)
        spent = 0.0 if step.compiled else time.monotonic() - began
        comparison = (race or announced(say))(cases, max(0.0, seconds - spent))
    return step.summary(comparison, peak_bytes)


def announced(say: Say) -> Callable[[dict[str, Function], float], Comparison]:
    """A race that tells every turn."""

    def race(cases: dict[str, Function], seconds: float) -> Comparison:
        names = {run: name for name, run in cases.items()}

        def timer(run: Function) -> float:
            spent = harness.wall_clock(run)
            say(f"         {spent:8.3f} s  {names[run]}")
            return spent

        say(f"         {seconds:.0f} s of {', '.join(cases)}")
        return Rounds(cases, timer).run(seconds, warm=True)

    return race


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def report(found: dict) -> str:
    """As a table."""
    rows = []
    for name in (OURS, PLAIN, COMPILED, FLOOR):
        if found[name] is not None:
            low, high = found["spread"][name]
            peak = found["peak_bytes"].get(name)
            rows.append(
                (
                    name,
                    f"{found[name]:.3f} [{low:.3f}, {high:.3f}]",
                    f"{found[name] / found[OURS]:.2f}",
                    f"{peak / 2**20:.0f}" if peak else "",
                )
            )
    low, high = found["spread"]["ratio"]
    return (
        harness.table(rows, ("", "seconds", "of ours", "peak MiB"))
        + f"\nplain / ours {found['ratio']:.2f} [{low:.2f}, {high:.2f}] in {found['rounds']} rounds"
    )


def parse_counts(text: str) -> tuple[int, ...]:
    """Samples per stage, as 8,0,0."""
    counts = tuple(int(part) for part in text.split(","))
    stages = len(whole_networks.SIGMAS)
    if len(counts) != stages or min(counts) < 0 or not any(counts):
        raise argparse.ArgumentTypeError(
            f"counts are {stages} numbers of samples, one per stage, got {text!r}"
        )
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=parse_counts, default=(8, 0, 0), help="samples per stage: 8,0,0")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--forward", action="store_true", help="sampling in place of training")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--seconds", type=float, help="of all (default: 140, for --forward 80)")
    parser.add_argument("--weigh", choices=(OURS, PLAIN), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    step = WholeStep(options.counts, DTYPES[options.dtype], options.forward, options.compiled)
    if options.weigh:
        print(step.weigh(options.weigh))
        return 0

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text.strip(), file=sys.stderr, flush=True)

    say(str(step))
    found = measure(step, options.seconds, say)
    if options.json:
        print(json.dumps({**found, "machine": harness.machine_facts()}))
    else:
        print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
