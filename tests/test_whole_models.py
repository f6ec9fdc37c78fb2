"""The benchmark of whole models: its own U-Net is known as guided diffusion's, and wrong results are not timed."""

from __future__ import annotations

import sys

import pytest
import torch

from helpers import import_benchmarks

import_benchmarks()
import guided_unet  # noqa: E402
import whole_models  # noqa: E402


@pytest.fixture
def model(monkeypatch) -> whole_models.Model:
    for name in ("guided_diffusion.nn", "guided_diffusion.unet"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    guided_unet.as_guided_diffusion()
    torch.manual_seed(0)
    network = guided_unet.GuidedUNet(width=64, mult=(1, 2))
    order, inputs = torch.contiguous_format, (torch.randn(1, 3, 8, 8), torch.tensor([3]))
    yield whole_models.replaced(network, order, torch.float32, *inputs)
    for name in ("guided_diffusion.nn", "guided_diffusion.unet"):
        del sys.modules[name]


def test_the_replaced_network_is_compared_and_shares_its_weights(model):
    assert model.notes == "25 of 25 norms, 21 with their SiLU, 20 of 27 convolutions"
    whole_models.require_alike("guided", model, torch.float32)
    assert whole_models.error(model.gradients(True), model.gradients(False)) <= 1e-4
    pairs = zip(model.ours.parameters(), model.original.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_a_network_whose_results_are_off_is_not_timed(model):
    torch.nn.init.ones_(model.ours.out[2].bias)
    model.ours.out[2].bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="guided: the results differ by"):
        whole_models.require_alike("guided", model, torch.float32)
