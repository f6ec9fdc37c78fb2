import pytest
import torch

from multistage_diffusion.noise.losses import denoising_loss, edm_loss, edm_weight
from multistage_diffusion.noise.preconditioning import EDMPreconditioner, SchedulePreconditioner
from multistage_diffusion.noise.schedules import VP
from multistage_diffusion.noise.stages import Stages
from stand_ins import RecordingNetwork, TinyNetwork

EDM = Stages.edm()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_edm_loss_is_the_formula_per_sample():
    denoiser = EDMPreconditioner(TinyNetwork(dropout=0), EDM, sigma_data=0.5)
    y, noise = torch.randn(2, 3, 1, 8, 8, generator=generator())
    sigma = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64)
    losses = edm_loss(denoiser, y, sigma, noise=noise)
    for i, s in enumerate(sigma.tolist()):
        D = denoiser(y[i : i + 1] + s * noise[i : i + 1], s)
        weight = (s * s + 0.25) / (s * 0.5) ** 2
        # Sums of 64 float32 squares; batched and single convolutions may add up in another order.
        torch.testing.assert_close(losses[i], weight * (D[0] - y[i]).square().sum(), rtol=2e-5, atol=0)


def test_edm_loss_of_a_silent_network_is_one_per_pixel_at_every_sigma():
    network = RecordingNetwork(F=lambda x, noise, stage: torch.zeros_like(x))
    denoiser = EDMPreconditioner(network, EDM, sigma_data=0.5)
    y = 0.5 * torch.randn(6, 1, 300, 300, generator=generator(1))
    noise = torch.randn(y.shape, generator=generator(2))
    losses = edm_loss(denoiser, y, torch.tensor([0.002, 0.1, 0.5, 3, 8, 80]).double(), noise=noise)
    # Mean of 90,000 chi-square variables: standard deviation sqrt(2 / 90000) = 0.0047; five of them.
    torch.testing.assert_close(losses / 90_000, torch.ones(6), rtol=0, atol=0.024)


def test_edm_loss_reaches_the_weights_of_the_stage_only():
    network = TinyNetwork(dropout=0)
    denoiser = EDMPreconditioner(network, EDM)
    y = torch.randn(2, 1, 8, 8)
    edm_loss(denoiser, y, torch.tensor([0.1, 0.2]), noise=torch.randn_like(y)).sum().backward()
    assert bool(network.decoders[0].weight.grad.any())
    assert not bool(network.decoders[1].weight.grad.any())


def test_edm_weight():
    assert edm_weight(torch.tensor(2.0), 0.5).item() == pytest.approx(4.25 / 1.0)


@pytest.mark.parametrize("loss", [edm_loss, denoising_loss])
def test_one_sigma_serves_the_whole_batch(loss):
    denoiser = EDMPreconditioner(TinyNetwork(dropout=0), EDM)
    y, noise = torch.randn(2, 3, 1, 8, 8, generator=generator())
    expected = loss(denoiser, y, torch.full((3,), 0.7, dtype=torch.float64), noise=noise)
    for sigma in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        assert torch.equal(loss(denoiser, y, sigma, noise=noise), expected)


@pytest.mark.parametrize("loss", [edm_loss, denoising_loss])
def test_noise_has_the_shape_of_the_images(loss):
    y = torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"noise must be of y's shape \(3, 1, 8, 8\), got \(1, 1, 8, 8\)"):
        loss(EDMPreconditioner(TinyNetwork(), EDM), y, torch.ones(3), noise=y[:1])


def test_edm_loss_needs_sigma_data():
    denoiser = SchedulePreconditioner(RecordingNetwork(), EDM, VP())
    y = torch.zeros(2, 1, 8, 8)
    with pytest.raises(
        TypeError, match=r"must have sigma_data, .* got SchedulePreconditioner; denoising_loss"
    ):
        edm_loss(denoiser, y, torch.ones(2), noise=y)
