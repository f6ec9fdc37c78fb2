"""LoRA on stage layers by peft: trained, saved, loaded under another name, merged and taken out again."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

from ecosystem_networks import NETWORKS, STAGE, Network, copies, difference, filled, images, loss_of
from multistage_diffusion.networks.layers import StageConv2d, StageLinear

pytestmark = pytest.mark.ecosystem
peft = pytest.importorskip("peft", reason="needs peft: make test-ecosystem installs it")
integration = import_module("multistage_diffusion.integrations.peft")

each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def tolerance(y: torch.Tensor) -> dict[str, float]:
    """Of float32 products that are rounded in another order."""
    return {"rtol": 1e-3, "atol": 1e-4 * float(y.detach().abs().max())}


def config_for(network: torch.nn.Module, **changes) -> peft.LoraConfig:
    """Every stage layer, and the ordinary convolutions of README's encoder."""
    layers = (StageConv2d, StageLinear, torch.nn.Conv2d)
    targets = [name for name, module in network.named_modules() if isinstance(module, layers)]
    settings = {"r": 2, "lora_alpha": 6, "target_modules": targets} | changes
    return integration.on_stage_layers(peft.LoraConfig(**settings))


def adapted(network: torch.nn.Module, **changes) -> peft.PeftModel:
    """With an adapter of random numbers, which changes the output."""
    model = peft.get_peft_model(network, config_for(network, **changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def loaded(make, folder, **options) -> peft.PeftModel:
    """From a file, as its users write it."""
    config = integration.on_stage_layers(peft.LoraConfig.from_pretrained(folder))
    return peft.PeftModel.from_pretrained(filled(make()), folder, config=config, **options)


@each_network
def test_a_new_adapter_changes_nothing_and_every_one_of_its_parts_is_trained(make):
    network = filled(make())
    before, weights = network(images(), STAGE), copies(network.state_dict())
    model = peft.get_peft_model(network, config_for(network))
    assert torch.equal(model(images(), STAGE), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)  # which moves what has the smallest gradient
    start = copies(trained)
    for _ in range(2):  # B is 0 at first, where A has no gradient
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert [name for name, p in trained.items() if torch.equal(p, start[name])] == []
    base = {n.replace("base_layer.", ""): p for n, p in network.state_dict().items() if "lora_" not in n}
    assert difference(base, weights) is None


@each_network
@pytest.mark.parametrize("scaled", [False, True], ids=["lora", "rslora"])
def test_an_adapter_is_its_delta_weights(make, scaled):
    network, expected = filled(make()), filled(make())
    model = adapted(network, use_rslora=scaled)
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, integration.LoraStage)]
    assert len(layers) == sum(isinstance(m, StageConv2d | StageLinear) for m in expected.modules())
    scaling = 6 / 2**0.5 if scaled else 3.0
    with torch.no_grad():
        for name, layer in layers:
            weights = expected.get_submodule(name).weight()
            for stage, (weight, delta) in enumerate(
                zip(weights, layer.delta_weights("default"), strict=True)
            ):
                up, down = layer.lora_B["default"][stage], layer.lora_A["default"][stage]
                torch.testing.assert_close(delta, scaling * torch.einsum("or,r...->o...", up, down))
                weight.add_(delta)
        for name, module in network.named_modules():
            if isinstance(module, peft.tuners.lora.Conv2d):
                expected.get_submodule(name).weight.add_(module.get_delta_weight("default"))
    y = expected(images(), STAGE)
    torch.testing.assert_close(model(images(), STAGE), y, **tolerance(y))


@each_network
@pytest.mark.parametrize("name", ["default", "style"])
def test_saved_adapters_arrive_under_any_name(make, name, tmp_path):
    model = adapted(filled(make()))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = [parameter for key, parameter in model.named_parameters() if "lora_" in key]
    assert len(saved) == len(own)
    other = loaded(make, tmp_path, adapter_name=name)
    arrived = {
        key.replace(f".{name}", ""): tensor for key, tensor in other.state_dict().items() if "lora_" in key
    }
    assert difference(arrived, saved) is None
    assert torch.equal(other(images(), STAGE), model(images(), STAGE))


def test_two_adapters_are_switched_between_and_joined(tmp_path):
    adapted(filled(Network())).save_pretrained(tmp_path)
    model = loaded(Network, tmp_path)
    network = model.get_base_model()
    plain, first = filled(Network())(images(), STAGE), model(images(), STAGE)
    model.add_adapter("second", config_for(filled(Network()), init_lora_weights="gaussian"))
    model.set_adapter("second")
    assert torch.equal(model(images(), STAGE), plain)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(images(), STAGE), first)
    model.set_adapter("default")
    assert torch.equal(model(images(), STAGE), first)
    with model.disable_adapter():
        assert torch.equal(model(images(), STAGE), plain)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert "default" not in network.decoder.up.lora_A
    assert torch.equal(model(images(), STAGE), plain)


@each_network
def test_merged_adapters_are_ordinary_weights(make):
    network = filled(make())
    names = network.state_dict().keys()
    model = adapted(network)
    y = model(images(), STAGE)
    model.merge_adapter()
    torch.testing.assert_close(model(images(), STAGE), y, **tolerance(y))
    model.unmerge_adapter()
    torch.testing.assert_close(model(images(), STAGE), y, **tolerance(y))
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(merged(images(), STAGE), y, **tolerance(y))


def test_a_merge_that_would_not_be_finite_changes_nothing():
    model = adapted(filled(Network()))
    layer = model.get_base_model().decoder.mix
    before = copies(layer.base_layer.state_dict())
    with torch.no_grad():
        layer.lora_A["default"][1].fill_(float("inf"))
    with pytest.raises(ValueError, match="'default' would make weights that are not finite"):
        layer.merge(safe_merge=True)
    assert difference(layer.base_layer.state_dict(), before) is None
    assert not layer.merged


def test_dropout_acts_in_training_alone():
    model = adapted(filled(Network()), lora_dropout=0.5)
    exact = adapted(filled(Network()))(images(), STAGE)
    assert not torch.equal(model.train()(images(), STAGE), exact)
    assert torch.equal(model.eval()(images(), STAGE), exact)


def test_a_stage_without_samples_has_no_gradient():
    model = adapted(filled(Network()))
    loss_of(model, [0, 2, 2]).backward()
    stages = {n: p for n, p in model.named_parameters() if "lora_" in n and "decoder" in n}
    absent = {name for name, parameter in stages.items() if parameter.grad is None}
    assert absent == {name for name in stages if name.endswith(".1")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True}, "lora_bias must be False"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be True, False or 'gaussian', got 'olora'"),
        ({"use_dora": True}, "variant"),
    ],
)
def test_what_stage_layers_do_not_have_is_refused(settings, message):
    network = Network()
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(network, config_for(network, target_modules=["mix"], **settings))


def test_without_the_adapter_peft_refuses_stage_layers():
    """What :func:`on_stage_layers` is for; where this fails, peft has learned of them."""
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["merge"]))
