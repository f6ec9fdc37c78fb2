"""``torch.distributed.checkpoint`` without processes that share anything: as scripts for one GPU write it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from ecosystem_networks import NETWORKS, assert_arrived, copies, difference, filled, loss_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def stepped(network: torch.nn.Module, stage: list[int]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    loss_of(network, stage).backward()
    optimizer.step()
    return optimizer


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value for name, entries in state["state"].items() for key, value in entries.items()
    }


@each_network
def test_weights_are_saved_and_loaded(make, tmp_path):
    network, other = filled(make()), filled(make(), seed=1)
    dcp.save({"model": network.state_dict()}, checkpoint_id=tmp_path)
    tensors = {"model": other.state_dict()}
    dcp.load(tensors, checkpoint_id=tmp_path)
    other.load_state_dict(tensors["model"])
    assert_arrived(other, copies(network.state_dict()))


@each_network
def test_model_state_dicts_are_got_and_set(make):
    network, other = filled(make()), filled(make(), seed=1)
    tensors = get_model_state_dict(network)
    assert difference(tensors, network.state_dict()) is None
    set_model_state_dict(other, tensors, options=StateDictOptions(full_state_dict=True))
    assert_arrived(other, copies(network.state_dict()))


@each_network
def test_an_optimizers_state_is_saved_and_loaded_by_the_names_of_the_parameters(make, tmp_path):
    network = filled(make())
    optimizer = stepped(network, [0, 1, 2])
    weights, state = get_state_dict(network, optimizer)
    assert state["state"].keys() == dict(network.named_parameters()).keys()
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    expected = copies(flat(state))
    other = filled(make(), seed=1)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2)
    weights, state = get_state_dict(other, fresh)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)
    assert_arrived(other, copies(network.state_dict()))
    assert difference(flat(get_state_dict(other, fresh)[1]), expected) is None


def test_a_stage_that_was_never_trained_has_no_state_to_load(tmp_path):
    """As a frozen layer of any network: the loader is told that the file is partial."""
    network, other = filled(NETWORKS["readme"]()), filled(NETWORKS["readme"](), seed=1)
    optimizer = stepped(network, [0, 2])
    weights, state = get_state_dict(network, optimizer)
    assert not [name for name in state["state"] if name.endswith(".1")]
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    expected = copies(flat(state))
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2)
    weights, state = get_state_dict(other, fresh)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, planner=planner)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state)
    assert_arrived(other, copies(network.state_dict()))
    arrived = flat(get_state_dict(other, fresh)[1])
    assert difference({name: arrived[name] for name in expected}, expected) is None
    untrained = {name: tensor for name, tensor in arrived.items() if name not in expected}
    assert all(".1." in name for name in untrained)
    assert all(not tensor.count_nonzero() for name, tensor in untrained.items() if "exp_avg" in name)
