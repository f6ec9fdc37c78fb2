"""accelerate: prepared, saved, loaded, dispatched and offloaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ecosystem_networks import (
    NETWORKS,
    STAGE,
    STAGE_LAYERS,
    UNet,
    assert_arrived,
    copies,
    difference,
    filled,
    images,
    loss_of,
)

pytestmark = pytest.mark.ecosystem
accelerate = pytest.importorskip("accelerate", reason="needs accelerate: make test-ecosystem installs it")

each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
PARTS = {
    "readme": {"fine": "cpu", "coarse": "cpu"},
    "edm": {"enc": "cpu", "conv": "cpu", "map_layers": "cpu"},
}
DECODER = {"readme": "decoder", "edm": "dec"}


@pytest.fixture
def accelerator():
    accelerate.Accelerator(cpu=True)  # what one test sets up, another must not find
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


def step(accelerator, model, optimizer) -> None:
    optimizer.zero_grad()
    accelerator.backward(loss_of(model))
    optimizer.step()


@each_network
def test_a_saved_state_arrives_and_goes_on(make, accelerator, tmp_path):
    network = filled(make())
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    step(accelerator, model, optimizer)
    accelerator.save_state(tmp_path)
    saved = copies(network.state_dict())
    assert difference(load_file(tmp_path / "model.safetensors"), saved) is None
    step(accelerator, model, optimizer)
    expected = copies(network.state_dict())
    filled(network, seed=1)
    accelerator.load_state(tmp_path)
    assert_arrived(network, saved)
    step(accelerator, model, optimizer)
    assert_arrived(network, expected)


@each_network
def test_a_saved_model_has_every_tensor(make, accelerator, tmp_path):
    network = filled(make())
    accelerator.save_model(accelerator.prepare(network), tmp_path)
    assert difference(load_file(tmp_path / "model.safetensors"), network.state_dict()) is None


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_checkpoint_is_loaded_and_dispatched(kind, where, accelerator, tmp_path):
    network = filled(NETWORKS[kind]())
    size = accelerate.utils.compute_module_sizes(network)[""]
    accelerator.save_model(network, tmp_path, max_shard_size=size // 3)
    saved = copies(network.state_dict())
    with accelerate.init_empty_weights():
        other = NETWORKS[kind]()
    assert all(parameter.is_meta for parameter in other.parameters())
    device_map = {**PARTS[kind], DECODER[kind]: where}
    folder = tmp_path / "offloaded"
    other = accelerate.load_checkpoint_and_dispatch(
        other, tmp_path, device_map=device_map, offload_folder=folder
    )
    if where == "cpu":
        assert_arrived(other, saved)
    else:
        decoder = other.get_submodule(DECODER[kind])
        assert all(parameter.is_meta for parameter in decoder.parameters())
    with torch.no_grad():  # the file's tensors begin anywhere, where sums run in another order
        torch.testing.assert_close(other(images(), STAGE), network(images(), STAGE), rtol=1e-5, atol=1e-5)


def test_an_automatic_device_map_names_layers_and_loads(accelerator, tmp_path):
    network = filled(UNet())
    accelerator.save_model(network, tmp_path)
    layers = {name for name, module in network.named_modules() if isinstance(module, STAGE_LAYERS)}
    size = accelerate.utils.compute_module_sizes(network)[""]
    device_map = accelerate.infer_auto_device_map(
        network,
        max_memory={"cpu": size // 2, "disk": size},
        no_split_module_classes=[layer.__name__ for layer in STAGE_LAYERS],
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not [name for name in device_map if any(name.startswith(f"{layer}.") for layer in layers)]
    other = accelerate.load_checkpoint_and_dispatch(
        UNet(), tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        torch.testing.assert_close(other(images(), STAGE), network(images(), STAGE), rtol=1e-5, atol=1e-5)
