"""Quantised stage layers by torchao."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from ecosystem_networks import NETWORKS, STAGE, Network, copies, difference, filled, images
from multistage_diffusion.networks.layers import StageConv2d, StageLinear

pytestmark = pytest.mark.ecosystem
quantization = pytest.importorskip(
    "torchao.quantization", reason="needs torchao: make test-ecosystem installs it"
)
integration = import_module("multistage_diffusion.integrations.torchao")

each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def stage_layers(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, StageConv2d | StageLinear)}


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    return network(images(), STAGE)


def test_torchao_alone_skips_stage_layers_without_a_word():
    """What :func:`quantize_stages_` is for; where this fails, torchao has learned of them."""
    network = filled(Network())
    before = copies(network.state_dict())
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    assert difference(network.state_dict(), before) is None


@each_network
def test_each_stages_weight_is_what_torchao_makes_of_an_ordinary_linear_layer(make):
    network, config = filled(make()), quantization.Int8WeightOnlyConfig()
    weights = {name: copies(layer.weight.state_dict()) for name, layer in stage_layers(network).items()}
    integration.quantize_stages_(network, config)
    expected = filled(make())
    for name, layer in stage_layers(network).items():
        assert layer.weight.state_dict().keys() == weights[name].keys()
        for (key, weight), given in zip(weights[name].items(), layer.weight(), strict=True):
            linear = torch.nn.Linear(weight[0].numel(), len(weight), bias=False)
            linear.weight.data = weight.flatten(1)
            quantization.quantize_(linear, config)
            assert torch.equal(given, linear.weight.dequantize().view_as(weight))
            assert (given - weight).abs().max() <= weight.abs().max() / 127
            assert not torch.equal(given, weight)
            with torch.no_grad():
                expected.get_parameter(f"{name}.weight.{key}").copy_(given)
    assert torch.equal(output(network), output(expected))


def test_a_quantised_layer_holds_a_byte_a_weight():
    network = filled(Network())
    integration.quantize_stages_(network, quantization.Int8WeightOnlyConfig())
    for weight in network.decoder.merge.weight:
        assert weight.qdata.dtype == torch.int8
        assert weight.qdata.nbytes == weight.numel()


@each_network
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_saved_quantised_weights_arrive(make, assign, tmp_path):
    config = quantization.Int8WeightOnlyConfig()
    network, other = filled(make()), filled(make(), seed=1)
    for each in (network, other):
        integration.quantize_stages_(each, config)
    torch.save(network.state_dict(), tmp_path / "quantised.pt")
    other.load_state_dict(torch.load(tmp_path / "quantised.pt"), assign=assign)
    for name, layer in stage_layers(other).items():
        pairs = zip(layer.weight, network.get_submodule(name).weight, strict=True)
        for got, expected in pairs:
            assert torch.equal(got.qdata, expected.qdata)
            assert torch.equal(got.scale, expected.scale)
    assert torch.equal(output(other), output(network))


def test_a_filter_leaves_layers_as_they_are():
    network = filled(Network())
    before = copies(network.decoder.merge.state_dict())
    config = quantization.Int8WeightOnlyConfig()
    integration.quantize_stages_(network, config, lambda layer, name: name == "decoder.mix")
    assert isinstance(network.decoder.mix.weight, integration.QuantizedPerStage)
    assert difference(network.decoder.merge.state_dict(), before) is None


def test_weights_that_torchao_would_leave_are_named():
    network = filled(Network())
    before = copies(network.state_dict())
    with pytest.raises(
        ValueError, match=r"Int4WeightOnlyConfig quantises no weight like those of decoder\.up"
    ):
        integration.quantize_stages_(network, quantization.Int4WeightOnlyConfig(group_size=128))
    assert difference(network.state_dict(), before) is None
