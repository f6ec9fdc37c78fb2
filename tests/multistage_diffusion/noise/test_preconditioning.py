import math

import pytest
import torch

from multistage_diffusion.networks import build
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.preconditioning import EDMPreconditioner, edm_coefficients, precondition
from multistage_diffusion.noise.stages import Stages
from stand_ins import RecordingNetwork, TinyNetwork


def denoiser_of(network, **arguments):
    return EDMPreconditioner(network, Stages.edm(), **arguments)


def test_a_stage_order_in_place_of_the_stages():
    torch.manual_seed(0)
    widths = {"encoder_widths": (16,), "decoder_widths": (16, 8, 8)}
    network = build({"family": "uvit", "image_size": 8, **widths, "depth": 3, "num_heads": 2})
    denoiser = EDMPreconditioner(network, Stages.edm())
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([9.0, 0.5, 3.0])
    assert torch.equal(denoiser(x, sigma, StageOrder.of([2, 0, 1], 3, 3)), denoiser(x, sigma))


def test_coefficients_fulfil_what_they_were_made_for():
    # EDM, appendix B.6: unit variance of the network's input and of its training target.
    sigma = torch.logspace(-3, 2, 11, dtype=torch.float64)
    sigma_data = 0.7
    c_skip, c_out, c_in, c_noise = edm_coefficients(sigma, sigma_data)
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c_in**2 * (sigma_data**2 + sigma**2), one)
    target_variance = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, one)
    torch.testing.assert_close(c_noise, sigma.log() / 4)


def test_forward_is_the_formula():
    denoiser = denoiser_of(RecordingNetwork(F=lambda x, noise, stage: torch.sin(x)), sigma_data=0.5)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64)
    D = denoiser(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        # The network works in float32 (it has no float64 weights), hence float32 accuracy of c_out F.
        c_in, c_out = 1 / math.sqrt(s * s + 0.25), s * 0.5 / math.sqrt(s * s + 0.25)
        expected = 0.25 / (s * s + 0.25) * x[i] + c_out * torch.sin(c_in * x[i])
        torch.testing.assert_close(D[i], expected, rtol=0, atol=1e-6)


def test_stage_is_found_per_sample_on_the_host():
    network = RecordingNetwork()
    denoiser_of(network)(torch.zeros(4, 1, 4, 4), [80.0, 0.1, 3.0, 2.5103])
    stage = network.calls[0][2]
    assert stage.tolist() == [2, 0, 1, 0]
    assert (stage.dtype, stage.device.type) == (torch.int64, "cpu")


def test_one_sigma_and_one_stage_serve_the_whole_batch():
    network = RecordingNetwork()
    denoiser = denoiser_of(network)
    denoiser(torch.zeros(2, 1, 4, 4), 3.0, class_labels="labels")
    _, noise, stage, conditioning = network.calls[0]
    assert noise.tolist() == pytest.approx([math.log(3) / 4] * 2)
    assert stage.tolist() == [1, 1]
    assert conditioning == {"class_labels": "labels"}
    denoiser(torch.zeros(2, 1, 4, 4), 3.0, 2)
    assert network.calls[1][2].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_output_dtype(dtype, expected):
    denoiser = denoiser_of(TinyNetwork(image_size=4))
    assert denoiser(torch.zeros(2, 1, 4, 4, dtype=dtype), 1.0).dtype == expected


def test_arithmetic_outside_of_the_network_ignores_autocast():
    denoiser = denoiser_of(RecordingNetwork(F=lambda x, noise, stage: x.bfloat16()))
    x = torch.randn(2, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        D = denoiser(x, 1.0)
    c_skip, c_out, c_in = 0.25 / 1.25, 0.5 / math.sqrt(1.25), 1 / math.sqrt(1.25)
    assert D.dtype == torch.float32
    # float32 arithmetic around one bfloat16 rounding: exact to float32 rounding of values of order 1.
    torch.testing.assert_close(D, c_skip * x + c_out * (c_in * x).bfloat16().float(), rtol=0, atol=1e-6)


def test_float64_network_gets_float64():
    network = TinyNetwork(image_size=4, dropout=0).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    D = denoiser_of(network)(x, 1.0)
    c_noise = torch.zeros(2, dtype=torch.float64)
    expected = x / 5 + network(x / math.sqrt(1.25), c_noise, torch.zeros(2)) * 0.5 / math.sqrt(1.25)
    torch.testing.assert_close(D, expected)


@pytest.mark.parametrize(
    ("sigma", "stage", "message"),
    [
        (0.0, None, "sigma must be positive and finite, got 0"),
        ([1.0, math.inf], None, "sigma must be positive and finite, got inf"),
        ([1.0, -2.0], None, "got -2"),
        ([1.0, math.nan], None, "got nan"),
        ([1.0, 1.0, 1.0], None, r"sigma has shape \(3,\); .*\(2,\)"),
        (1.0, [0, 1, 2], r"stage has shape \(3,\)"),
    ],
)
def test_forward_rejects(sigma, stage, message):
    with pytest.raises(ValueError, match=message):
        denoiser_of(RecordingNetwork())(torch.zeros(2, 1, 4, 4), sigma, stage)


@pytest.mark.parametrize("stage", [1.7, [1.0, 2.0], torch.tensor([0.0, 1.0])])
def test_stages_are_integers(stage):
    with pytest.raises(TypeError, match=r"EDMPreconditioner: stage must be integers, got torch\.float"):
        denoiser_of(RecordingNetwork())(torch.zeros(2, 1, 4, 4), 1.0, stage)


def test_construction_rejects():
    with pytest.raises(ValueError, match="network has 2 stage"):
        denoiser_of(RecordingNetwork(num_stages=2))
    with pytest.raises(ValueError, match="sigma_data=0"):
        denoiser_of(RecordingNetwork(), sigma_data=0)
    with pytest.raises(ValueError, match="needs stages of 'sigma'"):
        EDMPreconditioner(RecordingNetwork(num_stages=1), Stages.single("t"))


@pytest.mark.parametrize(
    ("schedule", "constants", "message"),
    [
        ("vp", {"sigma_data": 0.5}, "vp takes beta_d, .* not 'sigma_data'"),
        ("edm", {"prediction": "epsilon"}, "edm takes sigma_data, .* not 'prediction'"),
    ],
)
def test_constants_of_other_schedules_are_refused(schedule, constants, message):
    with pytest.raises(ValueError, match=message):
        precondition(RecordingNetwork(), Stages.single(), schedule, **constants)
