"""Requests that arrive at random, served by continuous batching, by static batches, and one at a time.

    python benchmarks/serving.py [--requests 60] [--max-batch 8] [--load 0.9] [--json]

A request asks for one image of a small EDM network by Heun's sampler, in 8, 18 or 32 steps. Static batches take the
oldest request and those like it that wait, up to the same number. The clock is that of the calls alone, so that a
server's waiting costs nothing here; arrivals are the same for all three. Capacity is the rate at which each works off
requests that are all there; then they arrive as a Poisson process at a share of the static batches' capacity.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "", "python")]

import torch  # noqa: E402

import harness  # noqa: E402
from multistage_diffusion import EDMPreconditioner, SamplerConfig, SamplerService, Stages, generate  # noqa: E402
from multistage_diffusion.networks import build  # noqa: E402

NETWORK = {
    "family": "edm",
    "image_size": 16,
    "encoder_widths": [32],
    "decoder_widths": [48, 32, 8],
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
SHAPE = (3, 16, 16)
STEPS = (8, 18, 32)


@dataclass(frozen=True)
class Arrival:
    """A request: its seed, its sampler's steps, and when it comes, in seconds."""

    seed: int
    steps: int
    at: float


@dataclass
class Clock:
    """Seconds of the calls that were timed, and of waiting for arrivals."""

    now: float = 0.0
    waits: dict[int, float] = field(default_factory=dict)

    def run(self, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        self.now += time.perf_counter() - start
        return result

    def finish(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self.waits[arrival.seed] = self.now - arrival.at


def continuous(denoiser: EDMPreconditioner, arrivals: Sequence[Arrival], most: int) -> Clock:
    clock, left = Clock(), list(arrivals)
    service, asked = SamplerService(denoiser, max_batch=most), {}
    while left or service.pending:
        while left and left[0].at <= clock.now:
            arrival = left.pop(0)
            asked[service.submit(seed=arrival.seed, steps=arrival.steps)] = arrival
        if not service.pending:
            clock.now = left[0].at
            continue
        clock.finish([asked[request] for request in clock.run(service.step)])
    return clock


def static(denoiser: EDMPreconditioner, arrivals: Sequence[Arrival], most: int) -> Clock:
    clock, left = Clock(), list(arrivals)
    while left:
        clock.now = max(clock.now, left[0].at)
        batch = [a for a in left if a.at <= clock.now and a.steps == left[0].steps][:most]
        seeds, config = [a.seed for a in batch], SamplerConfig(batch[0].steps)
        clock.run(lambda: generate(denoiser, seeds, SHAPE, config, batch_size=most))  # noqa: B023 (called at once)
        clock.finish(batch)
        left = [a for a in left if a not in batch]
    return clock


def one_at_a_time(denoiser: EDMPreconditioner, arrivals: Sequence[Arrival], most: int) -> Clock:
    return static(denoiser, arrivals, 1)


SERVERS = {"continuous": continuous, "static": static, "one at a time": one_at_a_time}


def poisson(count: int, rate: float, seed: int) -> list[Arrival]:
    """Arrivals at ``rate`` per second; all at once for an infinite one."""
    generator = torch.Generator().manual_seed(seed)
    gaps = -torch.rand(count, generator=generator, dtype=torch.float64).log() / rate
    steps = torch.randint(len(STEPS), (count,), generator=generator).tolist()
    times = gaps.cumsum(0).tolist()
    return [Arrival(seed, STEPS[s], at) for seed, (s, at) in enumerate(zip(steps, times, strict=True))]


def percentiles(clock: Clock) -> dict[str, float]:
    cuts = statistics.quantiles(clock.waits.values(), n=20, method="inclusive")
    return {"p50": cuts[9], "p95": cuts[18], "makespan": clock.now}


def check(denoiser: EDMPreconditioner) -> None:
    """The service's images are those of the sampler, to rounding."""
    service = SamplerService(denoiser, max_batch=3)
    requests = [service.submit(seed=seed, steps=8) for seed in range(3)]
    service.run()
    expected = generate(denoiser, range(3), SHAPE, SamplerConfig(8)).images
    error = (
        torch.stack([request.image for request in requests]) - expected
    ).abs().max() / expected.abs().max()
    if not error < 1e-4:
        raise AssertionError(f"the service's images are off by {error:.2g}")


def measure(count: int, most: int, load: float, say: Callable[[str], None]) -> dict:
    torch.manual_seed(0)
    network = build(NETWORK).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = EDMPreconditioner(network, Stages.edm())
    check(denoiser)
    at_once = poisson(count, float("inf"), seed=1)
    found: dict = {"capacity": {}, "waits": {}}
    for name, serve in SERVERS.items():
        say(f"capacity, {name}")
        found["capacity"][name] = count / serve(denoiser, at_once, most).now
    arrivals = poisson(count, load * found["capacity"]["static"], seed=2)
    for name, serve in SERVERS.items():
        say(f"at {load:g} of the static batches' capacity, {name}")
        found["waits"][name] = percentiles(serve(denoiser, arrivals, most))
    found["capacity_ratio"] = found["capacity"]["continuous"] / found["capacity"]["static"]
    found["p95_ratio"] = found["waits"]["continuous"]["p95"] / found["waits"]["static"]["p95"]
    return {"requests": count, "max_batch": most, "load": load, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--max-batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--load", type=float, default=0.9, help="of the static batches' capacity; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = measure(options.requests, options.max_batch, options.load, say)
    if options.json:
        print(json.dumps({"machine": harness.machine_facts(), **found}, indent=1))
        return 0
    rows = [
        (name, f"{found['capacity'][name]:.3f}", f"{waits['p50']:.2f}", f"{waits['p95']:.2f}")
        for name, waits in found["waits"].items()
    ]
    print(harness.table(rows, ("server", "images/s", "p50 s", "p95 s")))
    print(
        f"continuous over static: capacity {found['capacity_ratio']:.2f} times, p95 wait {found['p95_ratio']:.2f} times"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
