"""The networks inside of ``batch_invariant``, and ``generate`` with it."""

from __future__ import annotations

import pytest
import torch

from msd_kernels import batch_invariant
from multistage_diffusion import networks
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.schedules import LDM, VP
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.sampling.samplers import generate, sampler_config

STAGES = [2, 0, 2]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
U_NET = {"image_size": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
CONFIGS = {
    "edm": {**U_NET, "family": "edm", "in_channels": 3, "out_channels": 3, "encoder_widths": [48],
            "decoder_widths": [64, 48, 16]},
    # 256 channels before decoders of 384, 256 and 32, as in the published network at its coarsest level.
    "edm-wide": {**U_NET, "family": "edm", "channel_mult": [2], "in_channels": 3, "out_channels": 3,
                 "encoder_widths": [128], "decoder_widths": [192, 128, 16]},
    "ncsnpp": {**U_NET, "family": "ncsnpp", "channel_mult": [1, 2], "in_channels": 3, "encoder_widths": [32],
               "decoder_widths": [48, 32, 16]},
    "ldm": {**U_NET, "family": "ldm", "encoder_widths": [64], "decoder_widths": [96, 64, 32]},
    "ldm-context": {**U_NET, "family": "ldm", "encoder_widths": [64], "decoder_widths": [96, 64, 32],
                    "context_dim": 72, "label_dim": 7},
    "uvit": {"family": "uvit", "image_size": 8, "in_channels": 3, "encoder_widths": [96],
             "decoder_widths": [120, 96, 72], "depth": 3, "num_heads": 6, "patch_size": 2},
}  # fmt: skip

TINY = {**CONFIGS["edm"], "encoder_widths": [16], "decoder_widths": [32, 16, 16], "attn_resolutions": []}


def build(config):
    """A network none of whose weights is zero, as those of its last layers are before training."""
    torch.manual_seed(7)
    network = networks.build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.05)
    return network


SLOW = {"edm-wide": pytest.mark.full}


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in CONFIGS])
def test_a_networks_output_is_a_samples_own(name, generator):
    network = build(CONFIGS[name])
    size = CONFIGS[name]["image_size"]
    x, noise = torch.randn(3, 3, size, size, generator=generator), torch.rand(3, generator=generator)
    labels = {"class_labels": torch.eye(7)[[1, 4, 1]]} if network.config.get("label_dim") else {}
    # Rounding grows with the root of the length of sums, which are longer than those of the narrow networks here.
    widest = max(CONFIGS[name]["decoder_widths"]) * max(CONFIGS[name].get("channel_mult", [1]))
    longer = max(1.0, widest / 120)
    turned = torch.tensor([2, 0, 1])

    def run(samples):
        conditioning = {key: value[samples] for key, value in labels.items()}
        return network(x[samples].to(dtype), noise[samples], [STAGES[i] for i in samples], **conditioning)

    for dtype in DTYPES:
        network.to(dtype)
        with torch.no_grad():
            ordinary = run(range(3))
            with batch_invariant():
                turned_first = run(turned.tolist())
                single = torch.cat([run([i]) for i in range(3)])
        assert ordinary.std() > 1e-2
        rounding = 4 * torch.finfo(dtype).eps ** 0.9 * longer**0.5
        if dtype == torch.float32:  # of Winograd's convolutions: up to four times those of direct ones
            rounding *= 4
        assert (single - ordinary).abs().max() < rounding * ordinary.abs().max()
        assert torch.equal(turned_first, single[turned]), dtype


@pytest.mark.parametrize(
    ("config", "autocast"),
    [
        (sampler_config("heun", None, 2, S_churn=10.0), False),
        (sampler_config("heun", None, 2, S_churn=10.0), True),
        (sampler_config("dpm-singlestep", VP(), 3), False),
        (sampler_config("dpm-multistep", LDM(), 2), False),
        (sampler_config("ddim", VP(), 2, eta=0.7), False),
    ],
    ids=["heun-churn", "heun-churn-autocast", "dpm-singlestep", "dpm-multistep", "ddim-eta"],
)
def test_an_image_depends_on_its_seed_only(config, autocast):
    denoiser, shape = EDMPreconditioner(build(TINY), Stages.edm()), (3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = generate(denoiser, [4, 5, 6], shape, config, batch_invariant=True, batch_size=5).images
        split = generate(denoiser, [6, 5, 4], shape, config, batch_invariant=True, batch_size=2).images
        ordinary = generate(denoiser, [4, 5, 6], shape, config, batch_size=5).images
        with batch_invariant():
            alone = generate(denoiser, [6], shape, config).images
    assert torch.equal(together, split.flip(0))
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together[0], together[1])
    torch.testing.assert_close(ordinary, together, rtol=0, atol=0.5 if autocast else 1e-3)


def test_generate_refuses_batch_invariance_where_it_is_not_promised():
    denoiser = EDMPreconditioner(build(TINY), Stages.edm())
    with pytest.raises(
        NotImplementedError, match="generate: batch_invariant holds on the CPU, got device=cuda"
    ):
        generate(denoiser, [1], (3, 8, 8), batch_invariant=True, device="cuda")
