"""A whole network on the Triton kernels, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import copy

import torch
from interpreter import require_interpreter

require_interpreter()

from msd_kernels.dispatch.backends import use  # noqa: E402
from multistage_diffusion.networks import EDMUNet  # noqa: E402


def test_mixed_edm_training_step_equals_reference(generator):
    torch.manual_seed(0)
    network = EDMUNet(
        4, encoder_widths=(8,), decoder_widths=(12, 8, 4), channel_mult=(1, 2), num_blocks=1, attn_resolutions=(2,),
        dropout=0.0,
    )  # fmt: skip
    with torch.no_grad():  # layers that start near zero would hide errors
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(4, 3, 4, 4, generator=generator)
    noise = torch.randn(4, generator=generator)
    target = torch.randn(4, 3, 4, 4, generator=generator)
    found = []
    for setting in ("triton", "reference"):
        copied = copy.deepcopy(network)
        with use(setting):
            loss = (copied(x, noise, [2, 0, 1, 0]) - target).square().mean()
            loss.backward()
        found.append([loss, *(p.grad for p in copied.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * max(expected.abs().max(), 1)
