"""Continuous batching: requests at any step of any sampler share the calls of one network.

A grouped decoder runs every sample through its own stage's weights, so a batch need not stand at one noise level: a
request enters when there is a place and leaves when it is done, whatever the others are at.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, nullcontext
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

import msd_kernels
from multistage_diffusion.common.checks import integer
from multistage_diffusion.noise.preconditioning import Preconditioner
from multistage_diffusion.sampling.samplers import (
    SeededNoise,
    class_labels,
    device_of,
    require_seeds,
    sampler_config,
    schedule_of,
)
from multistage_diffusion.sampling.trajectory import Trajectory

__all__ = ["Request", "SampleError", "SamplerService"]


class SampleError(RuntimeError):
    """A request came to no image."""


class Request:
    """One image that was asked for; ``await request`` gives it, too.

    Attributes:
        seed: of its noise.
        evaluations: of the network, so far.
    """

    def __init__(self, seed: int, trajectory: Trajectory, conditioning: dict[str, Tensor]) -> None:
        self.seed, self.evaluations = seed, 0
        self._trajectory, self._conditioning = trajectory, conditioning
        self._future: Future[Tensor] = Future()

    @property
    def done(self) -> bool:
        """Whether it needs nothing more: it has its image, failed or was cancelled."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        return self._future.cancelled()

    def cancel(self) -> bool:
        """Gives its place back; returns whether it was in time."""
        return self._future.cancel()

    @property
    def image(self) -> Tensor:
        """``[C, H, W]`` on the CPU, in data range, not clipped.

        Raises:
            SampleError: it is not there yet, or will not be.
        """
        if not self.done:
            raise SampleError(f"the image of seed {self.seed} is not done; SamplerService.run() finishes all")
        return self.result()

    def result(self, timeout: float | None = None) -> Tensor:
        """Waits for the image, while another thread runs the service.

        Args:
            timeout: seconds; default: without end.

        Raises:
            SampleError: it failed or was cancelled.
            TimeoutError: it is not done in time.
        """
        try:
            return self._future.result(timeout)
        except CancelledError:
            raise SampleError(f"the image of seed {self.seed} was cancelled") from None

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.wrap_future(self._future).__await__()


class SamplerService:
    """Samples images for requests that come and go, many of them in every call of the network.

    ::

        service = SamplerService(denoiser, max_batch=8)
        request = service.submit(seed=3, steps=18, sampler="heun")
        service.run()
        request.image

    Requests are admitted in the order in which they came, and each call serves those that have waited longest, so that
    none starves. Everything but :meth:`step` returns at once, and all of it may be called from any thread.

    Args:
        denoiser: D(x; sigma), in evaluation mode.
        max_batch: images under way at a time, and samples of a call.
        batch_invariant: on the CPU, an image is bit for bit that of its request alone, and of :func:`generate` with
            ``batch_invariant``; without it they agree to rounding.
        shape: (C, H, W); default: the network's own.
        max_cost: a call takes as many of the longest waiting as cost no more, and one at least; default: no limit.
        stage_costs: what a sample of each stage costs a call, in the unit of ``max_cost``, such as the
            multiply-accumulates of ``msd flops``; ``max_batch`` then bounds what is under way alone.
        dtype: of x between the steps.

    Raises:
        ValueError, TypeError: arguments out of their range.
        NotImplementedError: ``batch_invariant`` on another device than the CPU.
    """

    def __init__(
        self,
        denoiser: Preconditioner,
        max_batch: int = 8,
        batch_invariant: bool = False,
        *,
        shape: Sequence[int] | None = None,
        max_cost: float | None = None,
        stage_costs: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.denoiser, self.batch_invariant, self.dtype = denoiser, batch_invariant, dtype
        self.max_batch = integer("SamplerService", "max_batch", max_batch, 1)
        network = denoiser.network
        self.shape = tuple(shape or (network.in_channels, network.image_size, network.image_size))
        self._device = device_of(denoiser)
        if batch_invariant and self._device.type != "cpu":
            raise NotImplementedError(f"SamplerService: batch_invariant holds on the CPU, got {self._device}")
        self.max_cost, self.stage_costs = _checked_costs(max_cost, stage_costs, len(denoiser.stages))
        self._waiting: deque[Request] = deque()
        self._running: deque[Request] = deque()  # the longest waiting first
        self._changed = threading.Condition()
        self._stepping = threading.Lock()

    def submit(
        self,
        seed: int = 0,
        steps: int | None = None,
        sampler: str = "heun",
        class_label: int | None = None,
        **settings,
    ) -> Request:
        """Asks for one image.

        Args:
            seed: of its noise, 64 bits.
            steps: of the sampler; default: the sampler's own.
            sampler: ``"heun"``, ``"ddim"``, ``"dpm-singlestep"`` or ``"dpm-multistep"``.
            class_label: for a class-conditional network; default: the seed modulo the number of classes.
            **settings: of the sampler, as of :func:`sampler_config`.

        Raises:
            ValueError, TypeError: an unknown sampler or class, settings out of their range.
        """
        (seed,) = require_seeds([seed], "SamplerService.submit")
        config = sampler_config(sampler, schedule_of(self.denoiser), steps, **settings)
        conditioning = class_labels(self.denoiser.network, [seed], class_label)
        noise = SeededNoise([seed], self.shape, self._device, self.dtype)
        conditioning = {name: value.to(self._device) for name, value in conditioning.items()}
        request = Request(seed, Trajectory(config, noise.draw), conditioning)
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    @property
    def pending(self) -> int:
        """Requests that are waiting or under way."""
        with self._changed:
            self._forget_done()
            return len(self._waiting) + len(self._running)

    def step(self) -> list[Request]:
        """One call of the network; returns the requests that it finished, or ended by an error.

        A request whose numbers become NaN or infinite, or whose evaluation raises, ends with that error alone.
        """
        with self._stepping, msd_kernels.frozen_weights():
            batch = self._next_batch()
            if not batch:
                return []
            for request, denoised in zip(batch, self._evaluated(batch), strict=True):
                self._advance(request, denoised)
            with self._changed:
                self._running.rotate(-len(batch))
                self._forget_done()
            return [request for request in batch if request.done]

    def run(self) -> None:
        """Steps until every request is done."""
        with msd_kernels.frozen_weights():
            while self.pending:
                self.step()

    @contextmanager
    def serving(self) -> Iterator[SamplerService]:
        """Inside of this context a thread of its own steps; it is left when that has done what was asked for.

        Requests are then waited for by :meth:`Request.result`, or awaited.
        """
        closing = threading.Event()
        thread = threading.Thread(target=self._serve, args=(closing,), name="SamplerService", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            closing.set()
            with self._changed:
                self._changed.notify_all()
            thread.join()

    def _serve(self, closing: threading.Event) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: closing.is_set() or self._waiting or self._running)
                self._forget_done()
                if closing.is_set() and not (self._waiting or self._running):
                    return
            self.step()

    def _next_batch(self) -> list[Request]:
        """The first of those under way, who are filled up from those that wait."""
        with self._changed:
            self._forget_done()
            while self._waiting and len(self._running) < self.max_batch:
                self._running.append(self._waiting.popleft())
            costs = accumulate(map(self._cost, self._running))
            affordable = sum(self.max_cost is None or cost <= self.max_cost for cost in costs)
            return list(islice(self._running, max(affordable, 1)))

    def _forget_done(self) -> None:
        for name in ("_waiting", "_running"):
            setattr(self, name, deque(request for request in getattr(self, name) if not request.done))

    def _cost(self, request: Request) -> float:
        if self.stage_costs is None:
            return 0.0
        return self.stage_costs[self.denoiser.stages.assign(request._trajectory.wanted.sigma)]

    def _evaluated(self, batch: Sequence[Request]) -> list[Tensor | Exception]:
        """D(x; sigma) for each request; where the call raises, each by itself, or its error."""
        try:
            return list(self._denoised(batch).split(1))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [found for request in batch for found in self._evaluated([request])]

    @torch.no_grad()
    def _denoised(self, batch: Sequence[Request]) -> Tensor:
        wanted = [request._trajectory.wanted for request in batch]
        names = batch[0]._conditioning
        conditioning = {name: torch.cat([r._conditioning[name] for r in batch]) for name in names}
        sigma = torch.tensor([w.sigma for w in wanted], dtype=torch.float64)
        with msd_kernels.batch_invariant() if self.batch_invariant else nullcontext():
            return self.denoiser(torch.cat([w.x for w in wanted]), sigma, **conditioning)

    def _advance(self, request: Request, denoised: Tensor | Exception) -> None:
        request.evaluations += 1
        trajectory = request._trajectory
        error = denoised if isinstance(denoised, Exception) else None
        if error is None and not denoised.isfinite().all():
            error = SampleError(
                f"the image of seed {request.seed} became NaN or infinite at sigma={trajectory.wanted.sigma:.6g}"
            )
        if error is None:
            trajectory.advance(denoised)
            if trajectory.wanted is not None:
                return
        try:
            if error is None:
                request._future.set_result(trajectory.images[0].cpu())
            else:
                request._future.set_exception(error)
        except InvalidStateError:  # cancelled meanwhile
            pass


def _checked_costs(
    max_cost: float | None, stage_costs: Sequence[float] | None, stages: int
) -> tuple[float | None, tuple[float, ...] | None]:
    if (max_cost is None) != (stage_costs is None):
        raise ValueError("SamplerService: max_cost and stage_costs go together, got one of them alone")
    if stage_costs is None:
        return None, None
    costs = tuple(map(float, stage_costs))
    if len(costs) != stages or not all(0 < cost < float("inf") for cost in (*costs, max_cost)):
        raise ValueError(
            f"SamplerService: max_cost and stage_costs must be positive, with one cost for each of {stages} stages, "
            f"got {max_cost} and {list(costs)}"
        )
    return float(max_cost), costs
