"""Requests that share calls of a network: the images of each alone, whoever comes, goes, fails or is cancelled."""

import asyncio
import gc
import random
import weakref

import pytest
import torch
from tiny_networks import TINY

from multistage_diffusion import SampleError, SamplerService, generate
from multistage_diffusion.networks import build
from multistage_diffusion.noise.preconditioning import precondition
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.sampling.samplers import class_labels, sampler_config, schedule_of
from multistage_diffusion.sampling.table import SAMPLERS

FAMILIES = {"edm": ("edm", {"label_dim": 4}), "vp": ("ncsnpp", {}), "ldm": ("ldm", {}), "ve": ("uvit", {})}
SHAPE = (3, 8, 8)


def denoiser(schedule):
    family, changes = FAMILIES[schedule]
    torch.manual_seed(0)
    network = build({"family": family, "image_size": 8, "in_channels": 3, **TINY[family], **changes}).eval()
    for parameter in network.parameters():  # the last layers of an untrained network are zero
        torch.nn.init.normal_(parameter, std=0.05)
    return precondition(network, Stages.edm(), schedule)


@pytest.fixture(scope="module")
def edm():
    return denoiser("edm")


def alone(denoiser, seed, sampler, steps, batch_invariant, class_label=None):
    config = sampler_config(sampler, schedule_of(denoiser), steps)
    conditioning = class_labels(denoiser.network, [seed], class_label)
    shape = (denoiser.network.in_channels, 8, 8)
    return generate(denoiser, [seed], shape, config, batch_invariant, **conditioning).images[0]


REQUESTS = [(0, "heun", 2), (1, "ddim", 3), (2, "dpm-singlestep", 4), (3, "dpm-multistep", 2)]


def staggered(service, requests):
    """Each request comes when the one before has been served once."""
    found = []
    for seed, sampler, steps in requests:
        found.append(service.submit(seed=seed, sampler=sampler, steps=steps))
        service.step()
    service.run()
    return [request.image for request in found]


@pytest.mark.parametrize("schedule", FAMILIES)
def test_images_are_bit_for_bit_those_of_their_requests_alone(schedule):
    D = denoiser(schedule)
    images = staggered(SamplerService(D, max_batch=3, batch_invariant=True), REQUESTS)
    for image, (seed, sampler, steps) in zip(images, REQUESTS, strict=True):
        assert torch.equal(image, alone(D, seed, sampler, steps, True))


def test_images_agree_to_rounding_without_the_promise(edm):
    images = staggered(SamplerService(edm, max_batch=4), REQUESTS)
    for image, (seed, sampler, steps) in zip(images, REQUESTS, strict=True):
        expected = alone(edm, seed, sampler, steps, False)
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_settings_noise_and_classes_are_each_request_s_own(edm):
    service = SamplerService(edm, batch_invariant=True)
    stochastic = {"S_churn": 10.0, "steps": 3}
    requests = [
        service.submit(seed=5, class_label=3, **stochastic),
        service.submit(seed=5, class_label=1, **stochastic),
        service.submit(seed=6, sampler="ddim", eta=1.0, steps=3),
    ]
    service.run()
    for request, label in zip(requests, (3, 1), strict=False):
        config = sampler_config("heun", schedule_of(edm), 3, S_churn=10.0)
        conditioning = class_labels(edm.network, [5], label)
        assert torch.equal(request.image, generate(edm, [5], SHAPE, config, True, **conditioning).images[0])
    config = sampler_config("ddim", schedule_of(edm), 3, eta=1.0)
    expected = generate(edm, [6], SHAPE, config, True, **class_labels(edm.network, [6])).images[0]
    assert torch.equal(requests[2].image, expected)


class Cheap:
    """The optimal denoiser of normal data, which notes its calls; a marked image turns to NaN, or raises."""

    def __init__(self):
        self.stages, self.calls, self.broken, self.raising = Stages.edm(), [], set(), set()
        self.network = torch.nn.Identity()
        self.network.in_channels, self.network.image_size = 1, 2

    def parameters(self):
        return iter(())

    def __call__(self, x, sigma):
        self.calls.append(sigma.tolist())
        marks = {round(float(image.sum()), 6) for image in x}
        if marks & self.raising:
            raise ValueError("refused")
        y = x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
        for image, result in zip(x, y, strict=True):
            if round(float(image.sum()), 6) in self.broken:
                result.fill_(torch.nan)
        return y


def mark(request):
    return round(float(request._trajectory.wanted.x.sum()), 6)


def test_a_call_takes_what_is_under_way_at_any_noise_level():
    D = Cheap()
    service = SamplerService(D, max_batch=2)
    for seed in range(3):
        service.submit(seed=seed, sampler="ddim", steps=2 + seed)
    assert service.pending == 3
    service.run()
    assert service.pending == 0
    assert [len(call) for call in D.calls] == [2, 2, 2, 1, 1, 1]
    assert any(len(set(call)) == 2 for call in D.calls)
    assert service.step() == []


def test_a_budget_bounds_what_a_call_costs_and_starves_nobody():
    D = Cheap()
    costs = (8.0, 2.0, 1.0)
    service = SamplerService(D, max_batch=20, max_cost=8.0, stage_costs=costs)
    requests = [service.submit(seed=seed, steps=4) for seed in range(20)]
    while service.pending:
        service.step()
        served = [request.evaluations for request in requests]
        assert max(served) - min(served) <= 1 or any(request.done for request in requests)
    spent = [sum(costs[stage] for stage in map(D.stages.assign, call)) for call in D.calls]
    assert max(spent) <= 8
    assert max(len(call) for call in D.calls) == 8  # of the cheapest stage
    assert all(request.evaluations == 7 for request in requests)


@pytest.mark.parametrize("kind", ["broken", "raising"])
def test_a_request_that_fails_ends_alone(kind):
    D = Cheap()
    service = SamplerService(D, max_batch=4)
    requests = [service.submit(seed=seed, steps=3) for seed in range(4)]
    service.step()
    getattr(D, kind).add(mark(requests[2]))
    ended = service.step()
    assert ended == [requests[2]]
    error, message = {"broken": (SampleError, "seed 2 became NaN"), "raising": (ValueError, "refused")}[kind]
    with pytest.raises(error, match=message):
        _ = requests[2].image
    service.run()
    assert [request.done for request in requests] == [True] * 4
    assert all(requests[i].image.isfinite().all() for i in (0, 1, 3))


def test_cancelling_gives_the_place_to_who_waits():
    service = SamplerService(Cheap(), max_batch=1)
    first, second, third = (service.submit(seed=seed, steps=5) for seed in range(3))
    service.step()
    assert first.cancel()
    assert second.cancel()
    service.step()
    assert (first.evaluations, second.evaluations, third.evaluations) == (1, 0, 1)
    assert first.cancelled
    assert service.pending == 1
    with pytest.raises(SampleError, match="the image of seed 0 was cancelled"):
        _ = first.image
    with pytest.raises(SampleError, match="the image of seed 2 is not done"):
        _ = third.image
    service.run()
    assert not third.cancel()


def test_five_hundred_requests_with_cancels_and_failures():
    D, chance = Cheap(), random.Random(0)
    service = SamplerService(D, max_batch=8)
    requests, cancelled, broken = [], set(), set()
    while len(requests) < 500 or service.pending:
        for _ in range(chance.randrange(4)):
            if len(requests) < 500:
                sampler = chance.choice(list(SAMPLERS))
                requests.append(
                    service.submit(seed=len(requests), sampler=sampler, steps=chance.randint(1, 6))
                )
        under_way = [request for request in requests[-30:] if not request.done]
        if under_way and chance.random() < 0.2:
            request = chance.choice(under_way)
            assert request.cancel()
            cancelled.add(request.seed)
        elif under_way and chance.random() < 0.2:
            request = chance.choice(under_way)
            D.broken.add(mark(request))
            broken.add(request.seed)
        service.step()
    assert all(request.done for request in requests)
    assert len(cancelled) > 5
    assert len(broken) > 5
    for request in requests:
        if request.seed in cancelled:  # which may have come after a mark
            assert request.cancelled
        elif request.seed in broken:
            assert request._future.exception() is not None
        else:
            assert request.image.isfinite().all()
    left = [weakref.ref(request) for request in requests]
    del requests, request, under_way
    gc.collect()
    assert not any(reference() for reference in left)


def test_a_thread_serves_others():
    D = Cheap()
    service = SamplerService(D, max_batch=4)
    with service.serving():
        first = service.submit(seed=0, steps=2)
        assert first.result(timeout=60).shape == (1, 2, 2)
        later = [service.submit(seed=seed, steps=2) for seed in range(6)]
    assert all(request.done for request in later)
    assert torch.equal(later[0].image, first.image)


def test_requests_are_awaited():
    service = SamplerService(Cheap())

    async def both():
        return await asyncio.gather(*(service.submit(seed=seed, steps=2) for seed in (1, 2)))

    with service.serving():
        images = asyncio.run(both())
    assert [image.shape for image in images] == [(1, 2, 2)] * 2


def test_bad_input_is_refused_at_once(edm):
    service = SamplerService(edm)
    for settings, message in (
        (
            {"sampler": "euler"},
            "sampler must be one of heun, dpm-singlestep, dpm-multistep, ddim, got 'euler'",
        ),
        ({"steps": 0}, "num_steps=0 must be at least 1"),
        ({"class_label": 4}, "class 4: this model has classes 0 to 3"),
        ({"seed": 2**64}, "does not fit into 64 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            service.submit(**settings)
    assert service.pending == 0
    for settings, message in (
        ({"max_batch": 0}, "max_batch=0 must be at least 1"),
        ({"max_cost": 1.0}, "go together"),
        ({"max_cost": 1.0, "stage_costs": (1.0,)}, "one cost for each of 3 stages"),
        ({"max_cost": 0.0, "stage_costs": (1.0, 1.0, 1.0)}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplerService(edm, **settings)
