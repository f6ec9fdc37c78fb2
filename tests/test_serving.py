"""The benchmark of serving: every request is served once, after it came, by each of the servers."""

import pytest
import torch

from helpers import import_benchmarks
from multistage_diffusion.noise.stages import Stages

import_benchmarks()

import serving  # noqa: E402


class Denoiser:
    """The optimal denoiser of normal data; notes how many samples each call has."""

    def __init__(self):
        self.stages, self.batches = Stages.edm(), []
        self.network = torch.nn.Identity()
        self.network.in_channels, self.network.image_size = 3, 16

    def parameters(self):
        return iter(())

    def __call__(self, x, sigma, stage=None):
        self.batches.append(len(x))
        return x / (1 + torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("name", serving.SERVERS)
def test_every_request_is_served_after_it_came(name):
    D, arrivals = Denoiser(), serving.poisson(12, rate=200.0, seed=3)
    clock = serving.SERVERS[name](D, arrivals, 4)
    assert sorted(clock.waits) == list(range(12))
    assert all(wait > 0 for wait in clock.waits.values())
    assert clock.now > arrivals[-1].at
    assert max(D.batches) <= (1 if name == "one at a time" else 4)


def test_requests_that_are_all_there_fill_the_batches():
    for name, least in (("continuous", 3.5), ("static", 2.0), ("one at a time", 1.0)):
        D = Denoiser()
        serving.SERVERS[name](D, serving.poisson(16, float("inf"), seed=1), 4)
        assert sum(D.batches) / len(D.batches) >= least
        assert sum(D.batches) == sum(2 * arrival.steps - 1 for arrival in serving.poisson(16, 1.0, seed=1))
