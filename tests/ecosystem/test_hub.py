"""Networks as models of the Hugging Face hub, without a network."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ecosystem_networks import STAGE, UNET, Network, UNet, assert_arrived, copies, filled, images
from multistage_diffusion.networks import EDMUNet

pytestmark = pytest.mark.ecosystem
hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: make test-ecosystem installs it")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


class HubNetwork(Network, hub.PyTorchModelHubMixin):
    pass


class HubUNet(EDMUNet, hub.PyTorchModelHubMixin):
    pass


def test_readmes_network_is_saved_and_loaded_by_the_mixin(tmp_path):
    network = filled(HubNetwork(encoder=8, widths=(16, 8)))
    network.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = HubNetwork.from_pretrained(tmp_path)
    assert other.num_stages == 2
    assert_arrived(other, saved)
    assert_arrived(network, saved)
    assert torch.equal(other(images(3), [1, 0, 0]), network(images(3), [1, 0, 0]))


def test_an_edm_network_is_saved_and_loaded_by_the_mixin(tmp_path):
    network = filled(HubUNet(**UNET))
    network.save_pretrained(tmp_path)
    other = HubUNet.from_pretrained(tmp_path)
    assert other.config == network.config
    assert_arrived(other, load_file(tmp_path / "model.safetensors"))
    assert_arrived(other, copies(network.state_dict()))


@pytest.mark.parametrize("make", [Network, UNet])
def test_save_torch_model_splits_and_loads_all(make, tmp_path):
    network, other = filled(make()), filled(make(), seed=1)
    hub.save_torch_model(network, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert hub.load_torch_model(other, tmp_path) == ([], [])
    assert_arrived(other, copies(network.state_dict()))
    assert torch.equal(other(images(), STAGE), network(images(), STAGE))
