"""What PyTorch's own tools do with parameters by their names, shapes and modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ecosystem_networks import (
    NETWORKS,
    STAGE,
    STAGE_LAYERS,
    Network,
    assert_arrived,
    copies,
    difference,
    filled,
    images,
    loss_of,
)

each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


@each_network
def test_names_are_the_keys_of_the_state_dict_and_every_tensor_is_its_own(make):
    network = make()
    parameters, tensors = dict(network.named_parameters()), network.state_dict()
    buffers = dict(network.named_buffers())
    assert [name for name in tensors if name not in buffers] == list(parameters)
    for name, parameter in parameters.items():
        assert parameter.stride() == torch.empty(parameter.shape).stride(), name
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
    assert len(storages) == len(parameters)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters.values())


def test_a_layers_weight_is_called_and_indexed_by_stage():
    decoder = Network().decoder
    shapes = [(24, 16, 3, 3), (16, 16, 3, 3), (8, 16, 3, 3)]
    assert [tuple(weight.shape) for weight in decoder.up.weight()] == shapes
    assert all(decoder.up.weight[stage] is weight for stage, weight in enumerate(decoder.up.weight()))
    assert all(isinstance(weight, nn.Parameter) for weight in decoder.up.weight())


@each_network
def test_functional_call_takes_parameters_and_state_dict(make):
    network, other = filled(make()), filled(make(), seed=1)
    expected = other(images(), STAGE)
    assert torch.equal(functional_call(network, dict(other.named_parameters()), (images(), STAGE)), expected)
    assert torch.equal(functional_call(network, other.state_dict(), (images(), STAGE)), expected)


def test_functional_call_changes_one_stage_alone():
    network = filled(Network())
    before = network(images(), STAGE)
    name = "decoder.mix.weight.0"
    zeros = {name: torch.zeros_like(network.get_parameter(name))}
    after = functional_call(network, zeros, (images(), STAGE))
    changed = (before != after).flatten(1).any(1).tolist()
    assert changed == [stage == 0 for stage in STAGE]


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
def test_gradients_by_torch_func_are_those_of_autograd():
    network = filled(Network())
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(values):
        return functional_call(network, values, (images(), STAGE)).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    loss_of(network).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_stage_without_samples_has_no_gradient():
    network = filled(Network())
    loss_of(network, [0, 2, 2]).backward()
    absent = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert absent == [name for name, _ in network.named_parameters() if name.endswith(".1")]
    assert all(p.grad.count_nonzero() for p in network.parameters() if p.grad is not None)


@each_network
def test_autocast_leaves_gradients_in_float32(make):
    network = filled(make())
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(network)
    loss.backward()
    assert {parameter.grad.dtype for parameter in network.parameters()} == {torch.float32}


@each_network
def test_freezing_by_name_trains_the_rest_alone(make):
    network = filled(make())
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith(".1"))
    loss_of(network).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@each_network
def test_weight_decay_by_ndim_spares_norms_and_biases(make):
    network = filled(make())
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, *STAGE_LAYERS))]
    weights = {
        f"{name}.{key}"
        for name, layer in layers
        for key, _ in layer.named_parameters()
        if key.startswith("weight") and "norm" not in name
    }
    matrices = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    assert {name for name, parameter in network.named_parameters() if parameter.ndim >= 2} == weights
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    before = copies(network.state_dict())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        kept = 0.75 if name in weights else 1.0
        assert torch.equal(parameter, before[name] * kept), name


@each_network
def test_muon_trains_the_matrices_of_each_stage(make):
    """``torch.optim.Muon`` takes matrices alone, as of any network; the rest goes to AdamW."""
    network = filled(make())
    matrices = {name: p for name, p in network.named_parameters() if p.ndim == 2}
    rest = [p for p in network.parameters() if p.ndim != 2]
    linear = [name for name, m in network.named_modules() if type(m).__name__ == "StageLinear"]
    assert {f"{name}.weight.0" for name in linear} <= matrices.keys()
    loss_of(network).backward()
    alone = [nn.Parameter(p.detach().clone()) for p in matrices.values()]
    for own, parameter in zip(alone, matrices.values(), strict=True):
        own.grad = parameter.grad.clone()
    before = copies(network.state_dict())
    torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1).step()
    torch.optim.AdamW(rest, lr=0.02).step()
    torch.optim.Muon(alone, lr=0.02, weight_decay=0.1).step()
    for own, (name, parameter) in zip(alone, matrices.items(), strict=True):
        assert torch.equal(own, parameter), name
    for name, parameter in network.named_parameters():
        assert not torch.equal(parameter, before[name]), name


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_stage_is_used_trained_and_left():
    network, expected = filled(Network()), filled(Network())
    with torch.no_grad():
        expected.decoder.mix.weight[1].mul_(2)
    holder = network.decoder.mix.weight
    names = [name for name, _ in holder.named_parameters()]
    parametrize.register_parametrization(holder, "1", Doubled())
    assert torch.equal(network(images(), STAGE), expected(images(), STAGE))
    loss_of(network).backward()
    loss_of(expected).backward()
    gradient = holder.parametrizations["1"].original.grad
    torch.testing.assert_close(gradient, 2 * expected.decoder.mix.weight[1].grad)
    parametrize.remove_parametrizations(holder, "1")
    assert torch.equal(network(images(), STAGE), expected(images(), STAGE))
    assert sorted(name for name, _ in holder.named_parameters()) == names


def test_weight_norm_keeps_the_function_and_trains_both_parts():
    network = filled(Network())
    before = network(images(), STAGE)
    for stage in range(network.num_stages):
        parametrizations.weight_norm(network.decoder.merge.weight, str(stage))
    torch.testing.assert_close(network(images(), STAGE), before, rtol=1e-4, atol=1e-4)
    loss_of(network).backward()
    parts = [p for name, p in network.named_parameters() if "original" in name]
    assert len(parts) == 2 * network.num_stages
    assert all(part.grad is not None and part.grad.count_nonzero() for part in parts)


def test_pruned_weights_are_used():
    network, expected = filled(Network()), filled(Network())
    prune.l1_unstructured(network.decoder.mix.weight, "2", amount=0.5)
    weight = expected.decoder.mix.weight[2]
    with torch.no_grad():
        weight[weight.abs() < weight.abs().median()] = 0
    kept = network.decoder.mix.weight[2].count_nonzero()
    assert kept == weight.numel() // 2
    with torch.no_grad():
        weight.copy_(network.decoder.mix.weight[2])
    assert torch.equal(network(images(), STAGE), expected(images(), STAGE))


@each_network
def test_averaged_model_is_the_average_of_every_tensor(make):
    network = filled(make())
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(network)
    expected = copies(dict(network.named_parameters()))
    for seed in (1, 2):
        filled(network, seed)
        averaged.update_parameters(network)
        for name, parameter in network.named_parameters():
            expected[name].lerp_(parameter.detach(), 1 - 0.9)
    assert difference(dict(averaged.module.named_parameters()), expected) is None
    other = AveragedModel(filled(make(), seed=3))
    other.load_state_dict(averaged.state_dict())
    assert_arrived(other.module, copies(averaged.module.state_dict()))
    assert torch.equal(other(images(), STAGE), averaged(images(), STAGE))
