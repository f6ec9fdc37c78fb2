"""Files of other people's libraries: what they write holds every stage, and what was in the file arrives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from ecosystem_networks import NETWORKS, STAGE, Network, assert_arrived, copies, difference, filled, images

each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def test_the_comparison_sees_one_bit_a_type_and_a_name():
    tensors = copies(filled(Network()).state_dict())
    assert difference(tensors, copies(tensors)) is None
    changed = copies(tensors)
    changed["decoder.out.bias.2"].view(torch.int32)[-1] ^= 1
    assert difference(tensors, changed) == "decoder.out.bias.2 has other values"
    typed = tensors | {"fine.bias": tensors["fine.bias"].double()}
    assert "fine.bias is torch.float64" in difference(typed, tensors)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "decoder.up.weight.1"}
    assert difference(fewer, tensors) == "['decoder.up.weight.1'] missing"
    assert difference(tensors, fewer) == "['decoder.up.weight.1'] not expected"


@each_network
def test_safetensors_save_file(make, tmp_path):
    network = filled(make())
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    saved = load_file(tmp_path / "a.safetensors")
    assert difference(saved, network.state_dict()) is None
    other = filled(make(), seed=1)
    other.load_state_dict(saved)
    assert_arrived(other, saved)


@each_network
def test_safetensors_save_model_and_load_model(make, tmp_path):
    network, other = filled(make()), filled(make(), seed=1)
    save_model(network, tmp_path / "a.safetensors")
    assert load_model(other, tmp_path / "a.safetensors") == (set(), [])
    assert_arrived(other, copies(network.state_dict()))


@each_network
@pytest.mark.parametrize("weights_only", [True, False], ids=["weights_only", "pickle"])
def test_torch_save(make, weights_only, tmp_path):
    network, other = filled(make()), filled(make(), seed=1)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    other.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=weights_only))
    assert_arrived(other, copies(network.state_dict()))


@each_network
def test_copies_are_apart(make):
    network = filled(make())
    before = copies(network.state_dict())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert_arrived(other, before)
        filled(other, seed=1)
        assert_arrived(network, before)


@each_network
def test_assign_puts_the_files_own_tensors_in_place(make, tmp_path):
    network, other = filled(make()), filled(make(), seed=1)
    saved = copies(network.state_dict())
    other.load_state_dict(saved, assign=True)
    assert_arrived(other, saved)
    parameters = dict(other.named_parameters())
    assert all(parameters[name].data_ptr() == saved[name].data_ptr() for name in parameters)
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert torch.equal(other(images(), STAGE), network(images(), STAGE))


@each_network
def test_assign_takes_another_type(make):
    halves = {name: tensor.bfloat16() for name, tensor in filled(make()).state_dict().items()}
    other = make()
    other.load_state_dict(halves, assign=True)
    assert_arrived(other, halves)


@each_network
def test_a_network_on_the_meta_device_is_filled_from_a_file(make, tmp_path):
    network = filled(make())
    saved = copies(network.state_dict())
    buffers = {name for name, _ in network.named_buffers()}
    with torch.device("meta"):
        assigned, emptied = make(), make()
    assert all(parameter.is_meta for parameter in assigned.parameters())
    assigned.load_state_dict(saved, assign=True)
    emptied.to_empty(device="cpu")
    assert all(parameter.device.type == "cpu" for parameter in emptied.parameters())
    emptied.load_state_dict(saved)
    for other in (assigned, emptied):
        assert_arrived(other, saved)
        assert {name for name, _ in other.named_buffers()} == buffers
        assert torch.equal(other(images(), STAGE), network(images(), STAGE))


def test_a_file_that_lacks_a_stage_is_refused():
    network = filled(Network())
    saved = copies(network.state_dict())
    del saved["decoder.merge.weight.1"]
    with pytest.raises(RuntimeError, match=r"Missing key.*decoder\.merge\.weight\.1"):
        network.load_state_dict(saved)
