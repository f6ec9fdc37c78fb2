"""The GPU benchmarks: ours beside eager PyTorch and ``torch.compile``.

Ops are timed by CUDA events with a cold and a warm L2, whole networks by the host's clock, launches included.

``python benchmarks/gpu_races.py NAME --seconds S --out FILE`` runs one benchmark and appends each result to FILE as a
line of JSON as soon as it is there; what does not fit into the seconds is written as not run. ``gpu_check.py`` calls
it. ``--rehearse``, for machines without a GPU, goes the same way with tensors that have no memory, and times nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "python")]

import bench_attention  # noqa: E402
import bench_group_norm  # noqa: E402
import bench_grouped_conv2d  # noqa: E402
import bench_grouped_linear  # noqa: E402
import bench_resample2d  # noqa: E402
import gpu_cache  # noqa: E402
import sampling_steps  # noqa: E402
import torch  # noqa: E402
import training_steps  # noqa: E402
import whole_networks  # noqa: E402
from gpu_parts import append  # noqa: E402
from launches import ARCHITECTURE, Launch, recorded  # noqa: E402
from sanitize_cuda import no_gpu  # noqa: E402
from training_steps import COMPILED, GRAPH  # noqa: E402

import harness  # noqa: E402
from harness import OURS, Function, Timer  # noqa: E402
from msd_kernels import explain  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from multistage_diffusion.networks.stage_order import StageOrder  # noqa: E402

DTYPE = torch.bfloat16
WIDTHS = bench_grouped_conv2d.WIDTHS
# What the L2 holds before a call. A network finds there what the call before has left.
L2_OF_OPS, L2_OF_NETWORKS = ("cold", "warm"), ("as found",)
THIRDS, FEW = (32, 32, 32), (3, 3, 2)
SECONDS_PER_RACE = 0.5
WIDEST_HEAD = "64 of head 384, 256 tokens", ((64,), (1,), (384,), 16)


@dataclass(frozen=True)
class Prepared:
    """Inputs on the device, results checked.

    Attributes:
        cases: ``cases(backward)`` gives the functions to time by name.
        backend: what serves ours.
        least_bytes: what must move, forward and for forward + backward.
        operations: what must be computed in a forward; with the backward three times as much.
        passes: what to time: the forward (False), forward and backward (True).
        l2: states of the L2 to time it in.
        weighed: cases whose peak memory on a GPU is of interest.
    """

    cases: Callable[[bool], dict[str, Function]]
    backend: str | None
    least_bytes: tuple[int, int]
    operations: int = 0
    passes: Sequence[bool] = (False, True)
    l2: Sequence[str] = L2_OF_OPS
    weighed: Sequence[str] = ()


@dataclass(frozen=True)
class Race:
    """One comparison.

    Attributes:
        prepare: takes the device.
        ours: takes the device and gives ours alone, of what a rehearsal cannot prepare.
    """

    label: str
    prepare: Callable[[str], Prepared]
    ours: Callable[[str], Function] | None = None


def mix_text(counts: Sequence[int]) -> str:
    """Samples per stage, as 92+3+1."""
    return "+".join(map(str, counts))


def group_norm_race(shape: tuple[int, int, int], groups: int, compiled: bool, device: str) -> Prepared:
    problem = bench_group_norm.Problem.of(shape, groups, DTYPE, device)
    problem.check()
    x, weight, bias, scale, shift = problem.leaves
    served = explain("group_norm", x, groups, weight, bias, scale=scale, shift=shift, activation="silu")
    least = problem.least_bytes(False), problem.least_bytes(True)

    def cases(backward: bool) -> dict[str, Function]:
        found = problem.cases(backward, compiled)
        if served.backend == "cuda":
            found["triton"] = with_backend("triton", found[OURS])
        return found

    return Prepared(cases, served.backend, least)


def with_backend(name: str, function: Function) -> Function:
    """Ours by another backend than the one that serves it."""

    def run():
        with use(name):
            return function()

    return run


def with_other(served: str, cases: dict[str, Function]) -> dict[str, Function]:
    """The cases and ours once more: by the library where Triton serves it, else by Triton."""
    other = "library" if served == "triton" else "triton"
    return {**cases, other: with_backend(other, cases[OURS])}


def group_norm() -> list[Race]:
    """EDM at batch 512, 64 and 8, LDM at 16, NHWC."""
    groups = {(64, 256, 32): 16, (16, 224, 64): 32, (512, 256, 32): 16, (64, 640, 32): 16}
    groups |= {(64, 384, 16): 16, (64, 512, 8): 16, (8, 256, 32): 16}
    return [
        Race("x".join(map(str, (*shape, shape[-1]))), partial(group_norm_race, shape, count, False))
        for shape, count in groups.items()
    ]


def grouped_conv2d_race(counts: tuple[int, ...], side: int, device: str) -> Prepared:
    problem = bench_grouped_conv2d.Problem.of(counts, side, DTYPE, device)
    # A copy of the weight per sample does not scale to large batches.
    ways = [way for way in bench_grouped_conv2d.WAYS if sum(counts) <= 8 or way != "as_groups"]
    problem.check(ways)
    x, weight, *_ = problem.arguments(problem.leaves)
    least = DTYPE.itemsize * (3 * x.values.numel() + sum(w.numel() for w in weight))
    operations = sum(2 * n * side**2 * 9 * c * c for n, c in zip(counts, WIDTHS, strict=True))
    served = explain("grouped_conv2d", x, weight).backend

    def cases(backward: bool) -> dict[str, Function]:
        return with_other(served, problem.cases(backward, ways=ways))

    return Prepared(cases, served, (least, 3 * least), operations)


def grouped_conv2d() -> list[Race]:
    """The EDM decoders' 3x3 convolutions: thirds and EDM's own mix of stages, at batch 96 and 8."""
    return [
        Race(f"{mix_text(counts)} at {side}x{side}", partial(grouped_conv2d_race, counts, side))
        for side in (32, 16, 8)
        for counts in ((32, 32, 32), (92, 3, 1), (3, 3, 2), (7, 1, 0))
    ]


def grouped_linear_race(counts: tuple[int, ...], device: str) -> Prepared:
    problem = bench_grouped_linear.Problem.of(counts, DTYPE, device)
    problem.check()
    x, *weights = problem.leaves
    weight = weights[: len(bench_grouped_linear.WIDTHS)]
    features = bench_grouped_linear.FEATURES
    elements = sum(tensor.numel() for tensor in (x, *weight, problem.dy))
    least = DTYPE.itemsize * elements
    operations = sum(2 * n * features * o for n, o in zip(counts, bench_grouped_linear.WIDTHS, strict=True))
    served = explain("grouped_linear", x, weight, counts=counts)
    return Prepared(problem.cases, served.backend, (least, 3 * least), operations)


def grouped_linear() -> list[Race]:
    """The projections of the embedding in the EDM decoders."""
    mixes = bench_grouped_linear.MIXES.items()
    return [Race(name, partial(grouped_linear_race, counts)) for name, counts in mixes]


def attention_race(shape, layout: str, compiled: bool, device: str) -> Prepared:
    problem = bench_attention.Problem.of(shape, layout, DTYPE, device)
    problem.check()
    served = problem.explain().backend

    def cases(backward: bool) -> dict[str, Function]:
        return with_other(served, problem.cases(backward, compiled, backends=tuple(bench_attention.SDPA)))

    return Prepared(cases, served, problem.least_bytes, problem.operations)


def attention() -> list[Race]:
    """EDM's one head of 384, 256 and 32 over 256 and 64 tokens, goal G7, and LDM's heads of 32; packed, all stages.

    The peers get q, k and v apart and dense, one call per stage.
    """
    heads = ((1, 1, 1), bench_attention.EDM_HEADS, 16)
    shapes = {
        WIDEST_HEAD[0]: WIDEST_HEAD[1],
        "64 of head 256, 256 tokens": ((64,), (1,), (256,), 16),
        "64 of head 256, 64 tokens": ((64,), (1,), (256,), 8),
        "32+32+32, 256 tokens": ((32, 32, 32), *heads),
        "3+3+2, 256 tokens": ((3, 3, 2), *heads),
        "16 of 16 heads of 32, 1024 tokens": ((16,), (16,), (32,), 32),
    }
    races = {name: (shape, "per_head", False) for name, shape in shapes.items()}
    races[f"{WIDEST_HEAD[0]}, interleaved"] = (WIDEST_HEAD[1], "interleaved", False)
    return [Race(name, partial(attention_race, *arguments)) for name, arguments in races.items()]


def resample2d_race(
    shape: tuple[int, int, int], filter: str, upward: bool, compiled: bool, device: str
) -> Prepared:
    taps = bench_resample2d.FILTERS[filter]
    problem = bench_resample2d.Problem.of(shape, taps, upward, DTYPE, torch.channels_last, device)
    problem.check()
    served = explain("resample2d", problem.x, taps, problem.up, problem.down)
    least = problem.least_bytes(False), problem.least_bytes(True)
    return Prepared(partial(problem.cases, compiled=compiled), served.backend, least)


def resample2d() -> list[Race]:
    """EDM's and score SDE's feature maps, NHWC; goal G10."""
    cases = [(64, 256, 32, "box")]
    cases += [(*shape, "fir") for shape in ((64, 256, 32), (256, 256, 32), (64, 384, 16), (8, 256, 32))]
    return [
        Race(
            f"{batch}x{channels}x{side}x{side} {filter} {'up' if upward else 'down'}",
            partial(resample2d_race, (batch, channels, side), filter, upward, False),
        )
        for batch, channels, side, filter in cases
        for upward in (False, True)
    ]


def compiled_ops() -> list[Race]:
    """One or two cases of an op with its peers compiled as well, which takes long and can be prepared by nobody."""
    return [
        Race("group_norm 64x256x32x32", partial(group_norm_race, (64, 256, 32), 16, True)),
        Race("resample2d 64x256x32x32 fir down", partial(resample2d_race, (64, 256, 32), "fir", False, True)),
        Race(f"attention {WIDEST_HEAD[0]}", partial(attention_race, WIDEST_HEAD[1], "per_head", True)),
        Race("group_norm 16x224x64x64", partial(group_norm_race, (16, 224, 64), 32, True)),
    ]


def of_stage(batch: int, stage: int) -> tuple[int, ...]:
    """Counts of a batch of one stage."""
    return tuple(batch if other == stage else 0 for other in range(len(whole_networks.SIGMAS)))


def sampling_step_race(batch: int, stage: int, compiled: bool, device: str) -> Prepared:
    problem = sampling_steps.Problem.of(of_stage(batch, stage), device)
    cases = problem.checked_cases(compiled)
    networks, counts = problem.networks, problem.counts
    least = networks.weight_bytes(counts), 0
    return Prepared(
        lambda backward: cases, None, least, networks.operations(counts), passes=(False,), l2=L2_OF_NETWORKS
    )


def sampling_step() -> list[Race]:
    """Evaluations of EDM's denoiser, all samples of one stage; goal G8."""
    return [
        Race(
            f"{batch} of stage {stage}",
            partial(sampling_step_race, batch, stage, False),
            partial(our_sampling_step, batch, stage),
        )
        for batch in (1, 8)
        for stage in (0, 1, 2)
    ]


def our_sampling_step(batch: int, stage: int, device: str) -> Function:
    """The network as the denoiser calls it, which computes its noise level and stage from values."""
    problem = sampling_steps.Problem.of(of_stage(batch, stage), device)
    network = problem.networks.ours.eval()
    order = StageOrder.of([stage] * batch, len(problem.counts), batch)
    inputs = problem.x.to(sampling_steps.DTYPE), torch.zeros(batch, device=device), order
    return torch.no_grad()(partial(network, *inputs))


def our_training_step(counts: tuple[int, ...], device: str) -> Function:
    (step,) = training_steps.Problem.of(counts, device).mixed()
    return step


def training_step_race(counts: tuple[int, ...], extra: str | None, device: str) -> Prepared:
    problem = training_steps.Problem.of(counts, device)
    cases = problem.checked_cases(extra)
    weights = problem.networks.weight_bytes(counts)  # to be read, and as many gradients written
    return Prepared(
        lambda backward: cases,
        None,
        (weights, 2 * weights),
        problem.networks.operations(counts),
        passes=(True,),
        l2=L2_OF_NETWORKS,
        weighed=[name for name in cases if name != GRAPH],  # which has its memory for itself
    )


def training_step() -> list[Race]:
    """EDM's network on mixed batches, goal G9: thirds, EDM's own mix of stages, few samples; then CUDA graphs."""
    mixes = (THIRDS, (92, 3, 1), FEW)
    extras = [(mix_text(counts), counts, None) for counts in mixes]
    extras += [(f"{mix_text(counts)}, graph", counts, GRAPH) for counts in (FEW, THIRDS)]
    return [
        Race(label, partial(training_step_race, counts, extra), partial(our_training_step, counts))
        for label, counts, extra in extras
    ]


def compiled_steps() -> list[Race]:
    """One case of each with the plain networks compiled as well, which takes long; goals G8 and G9."""
    return [
        Race(
            "sampling, 8 of stage 0",
            partial(sampling_step_race, 8, 0, True),
            partial(our_sampling_step, 8, 0),
        ),
        Race(
            f"training, {mix_text(THIRDS)}",
            partial(training_step_race, THIRDS, COMPILED),
            partial(our_training_step, THIRDS),
        ),
    ]


BENCHMARKS = {
    "group_norm": group_norm,
    "grouped_conv2d": grouped_conv2d,
    "attention": attention,
    "grouped_linear": grouped_linear,
    "resample2d": resample2d,
    "sampling_step": sampling_step,
    "training_step": training_step,
    "compiled_ops": compiled_ops,
    "compiled_steps": compiled_steps,
}


def matmul_rate(timer: Timer, device: str, size: int) -> float:
    """Operations per second of a matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / harness.median_seconds(lambda: a @ b, timer, 10)


def measure(name: str, device: str, timers: dict[str, Timer], seconds: float) -> Iterator[dict]:
    """The results of one benchmark, one after the other, and at last what did not fit into the seconds."""
    deadline = time.monotonic() + seconds
    large = device == "cuda"
    bandwidth = harness.copy_bandwidth(device, timers["cold"], megabytes=1024 if large else 16)
    rate = matmul_rate(timers["cold"], device, 8192 if large else 256)
    yield {"copy_bytes_per_second": bandwidth, "matmul_operations_per_second": rate}
    for race in BENCHMARKS[name]():
        if time.monotonic() > deadline:
            yield {"not_run": race.label}
            continue
        try:
            yield from run(race, device, timers, bandwidth, rate)
        except Exception as error:  # Triton's have no common base; the other races go on
            yield {"failed": race.label, "error": f"{type(error).__name__}: {error}"[:2000]}


def run(race: Race, device: str, timers: dict[str, Timer], bandwidth: float, rate: float) -> Iterator[dict]:
    prepared = race.prepare(device)
    for backward in prepared.passes:
        operations = prepared.operations * (3 if backward else 1)
        floor = max(prepared.least_bytes[backward] / bandwidth, operations / rate)
        cases = prepared.cases(backward)
        weighed = prepared.weighed if device == "cuda" else ()
        memory = {name: harness.peak_bytes(cases[name]) for name in weighed}
        for l2 in prepared.l2:
            comparison = harness.compare(cases, seconds=SECONDS_PER_RACE, timer=timers[l2])
            yield {
                "case": f"{race.label} {'step' if backward else 'forward'}",
                "backend": prepared.backend,
                "l2": l2,
                "share_of_floor": float(f"{floor / comparison.time().median:.3g}"),
                **({"peak_bytes": memory} if memory else {}),
                **comparison.as_dict(),
            }


class RehearsedTimer:
    """Calls a function the first time and says that it took a second."""

    def __init__(self) -> None:
        self._called: set[Function] = set()

    def __call__(self, function: Function) -> float:
        if function not in self._called:
            self._called.add(function)
            function()
        return 1.0


def rehearse(name: str, architecture: int = ARCHITECTURE) -> Iterator[tuple[str, list[Launch], list[dict]]]:
    """Each race of a benchmark with tensors that have no memory: its label, its launches and what it would write.

    Whole networks, whose checks look at values, are only called once.
    """
    timers = dict.fromkeys((*L2_OF_OPS, *L2_OF_NETWORKS), RehearsedTimer())
    for race in BENCHMARKS[name]():
        if race.ours is not None:
            yield race.label, launches_of_network(race.ours, architecture), []
            continue
        found: dict[Launch, None] = {}
        without_values = mock.patch.object(harness, "check")
        without_compiler = mock.patch.object(torch, "compile", lambda function, **_: function)
        with without_values, without_compiler, recorded(found, architecture):
            results = list(run(race, "cpu", timers, 1.0, 1.0))
        yield race.label, list(found), results


@functools.cache
def _launches_of_network(make: Callable[..., Function], arguments: tuple, architecture: int) -> list[Launch]:
    call, found = make(*arguments, "cpu"), {}
    with recorded(found, architecture):
        call()
    return list(found)


def launches_of_network(ours: partial, architecture: int) -> list[Launch]:
    """Of one call, found once however many races it has."""
    return _launches_of_network(ours.func, ours.args, architecture)


def launches(architecture: int = ARCHITECTURE) -> dict[str, list[Launch]]:
    """The launches of every race."""
    return {
        f"{name}, {label}": found for name in BENCHMARKS for label, found, _ in rehearse(name, architecture)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, action="append", required=True, help="may be given several times")
    arguments = parser.parse_args()
    if reason := no_gpu():
        print(f"gpu_races: {reason}")
        return
    watch = gpu_cache.Watch()
    torch.backends.cudnn.benchmark = True
    timers = {"cold": harness.cuda_timer(cold=True), "warm": harness.cuda_timer(cold=False)}
    timers["as found"] = harness.synchronised_clock
    for result in measure(arguments.name, "cuda", timers, arguments.seconds):
        append(arguments.out, {"benchmark": arguments.name, **result})
    append(arguments.out, {"cache": arguments.name, **watch.as_dict()})


if __name__ == "__main__":
    main()
