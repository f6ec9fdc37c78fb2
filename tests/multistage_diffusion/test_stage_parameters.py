"""One parameter per stage: what an optimizer sees of a network whose layers pack the stages."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from multistage_diffusion.layers import StageModule
from multistage_diffusion.networks import build
from multistage_diffusion.preconditioning import EDMPreconditioner
from multistage_diffusion.stage_parameters import StageParameters
from multistage_diffusion.stages import Stages
from stand_ins import TinyNetwork, one_thread  # noqa: F401

UNET = {
    "image_size": 8,
    "encoder_widths": (8,),
    "decoder_widths": (12, 8, 4),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}
NETWORKS = {
    "edm": {"family": "edm", **UNET},
    "edm separate": {"family": "edm", **UNET, "encoder_widths": (12, 8, 4)},
    "edm unified": {"family": "edm", **UNET, "decoder_widths": (8,)},
    "ncsnpp": {"family": "ncsnpp", **UNET},
    "ldm as the reference": {
        "family": "ldm",
        **UNET,
        "encoder_widths": (32,),
        "decoder_widths": (64, 32, 32),
        "attn_resolutions": (4, 8),
        "reduced_attention": True,
    },
    "uvit": {
        "family": "uvit",
        "image_size": 8,
        "encoder_widths": (16,),
        "decoder_widths": (24, 16, 8),
        "depth": 5,
        "num_heads": 2,
    },
}
each_network = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
flat_or_not = pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])


def made(config) -> torch.nn.Module:
    torch.manual_seed(0)
    network = build(config).double()
    with (
        torch.no_grad()
    ):  # the published initialisation leaves some layers at zero, whose inputs get no gradient
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def backward(network, stages, seed=1) -> tuple[int, ...]:
    """Gradients of a batch with these stages; returns the samples of each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(stages), 3, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.rand(len(stages), generator=generator, dtype=torch.float64)
    network(x, noise, stages).square().sum().backward()
    return tuple(stages.count(s) for s in range(network.num_stages))


def own_names(network, stage) -> set[str]:
    """The weights that a batch of this stage alone changes and no other does, found by differentiating."""
    found = []
    for s in range(network.num_stages):
        network.zero_grad(set_to_none=True)
        backward(network, [s, s])
        gradients = copy.deepcopy(network)
        for own, parameter in zip(gradients.parameters(), network.parameters(), strict=True):
            own.data.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        found.append({name for name, value in gradients.state_dict().items() if value.count_nonzero()})
    network.zero_grad(set_to_none=True)
    others = set().union(*(names for s, names in enumerate(found) if s != stage))
    return found[stage] - others


@each_network
def test_the_names_are_those_of_the_state_dict(config):
    network = made(config)
    parameters = StageParameters(network)
    buffers = {name for name, _ in network.named_buffers()}
    assert len(parameters) == len(parameters.names)
    assert set(parameters.names) == network.state_dict().keys() - buffers
    for name, parameter in zip(parameters.names, parameters, strict=True):
        assert parameter.numel() == network.state_dict()[name].numel()
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in network.parameters())


@flat_or_not
@each_network
def test_with_all_stages_present_an_optimizer_does_what_it_does_to_the_network(config, flat):
    networks = made(config), made(config)
    parameters = StageParameters(networks[0], flat_gradients=flat)
    optimizers = (
        torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(networks[1].parameters(), lr=0.01, weight_decay=0.1),
    )
    stages = list(range(networks[0].num_stages)) * 2
    for step in range(3):
        for network in networks:
            backward(network, stages, seed=step)
        parameters.take_gradients([2] * networks[0].num_stages)
        for optimizer in optimizers:
            optimizer.step()
        parameters.drop_gradients()
        networks[1].zero_grad(set_to_none=True)
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@flat_or_not
@pytest.mark.parametrize(
    "config", [c for name, c in NETWORKS.items() if "unified" not in name], ids=lambda c: c["family"]
)
def test_a_decoder_of_an_absent_stage_stays_as_it_is(config, flat):
    network = made(config)
    owned = [own_names(network, stage) for stage in range(3)]
    assert all(owned)
    parameters = StageParameters(network, flat_gradients=flat)
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    batches = [[0, 1, 2], [0, 0, 1], [2, 2, 2], [1, 0, 0]]
    for step, stages in enumerate(batches):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        parameters.take_gradients(backward(network, stages, seed=step))
        optimizer.step()
        parameters.drop_gradients()
        for name, value in network.state_dict().items():
            absent = any(name in owned[s] for s in range(3) if s not in stages)
            if name in parameters.names:
                assert torch.equal(value, before[name]) == absent, (step, name)
    seen = [sum(s in stages for stages in batches) for s in range(3)]
    for name, parameter in zip(parameters.names, parameters, strict=True):
        stage = next((s for s in range(3) if name in owned[s]), None)
        assert int(optimizer.state[parameter]["step"]) == (4 if stage is None else seen[stage]), name


def test_the_gradients_are_the_networks_own():
    network = made(NETWORKS["edm"])
    parameters = StageParameters(network)
    counts = backward(network, [0, 1, 2])
    parameters.take_gradients(counts)
    memory = {p.grad.untyped_storage().data_ptr() for p in network.parameters()}
    assert all(p.grad.untyped_storage().data_ptr() in memory for p in parameters)
    parameters.drop_gradients()
    assert all(p.grad is None for p in [*parameters, *network.parameters()])


@each_network
def test_flat_gradients_stay_where_they_are_and_hold_every_gradient(config):
    network, twin = made(config), made(config)
    parameters = StageParameters(network, flat_gradients=True)
    flat = parameters.flat_gradients
    places = [p.grad.data_ptr() for p in network.parameters()]
    for seed in range(2):
        backward(network, [0] * 3, seed)
        counts = backward(network, [0] * 3, seed + 10)  # adds to it, as a second micro-batch does
        twin.zero_grad(set_to_none=True)
        backward(twin, [0] * 3, seed)
        backward(twin, [0] * 3, seed + 10)
        for own, other in zip(network.parameters(), twin.parameters(), strict=True):
            expected = torch.zeros_like(other) if other.grad is None else other.grad
            assert torch.equal(own.grad, expected)
        flat.mul_(0.5)  # what is done to it reaches the optimizer
        parameters.take_gradients(counts)
        for own, other in zip(network.parameters(), twin.parameters(), strict=True):
            assert torch.equal(
                own.grad, 0.5 * (torch.zeros_like(other) if other.grad is None else other.grad)
            )
        parameters.drop_gradients()
        assert not flat.any()
        assert parameters.flat_gradients is flat
        assert [p.grad.data_ptr() for p in network.parameters()] == places
        assert all(place % 128 == flat.data_ptr() % 128 for place in places)


@pytest.mark.parametrize("lose", [torch.nn.Module.zero_grad, lambda network: network.to(torch.float32)])
def test_gradients_that_have_left_the_flat_ones_are_noticed(lose):
    network = TinyNetwork(dropout=0).double()
    parameters = StageParameters(network, flat_gradients=True)
    lose(network)
    with pytest.raises(RuntimeError, match="gradients have left flat_gradients"):
        parameters.take_gradients((1, 0, 0))


def test_flat_gradients_need_one_dtype():
    network = TinyNetwork()
    network.encoder.double()
    with pytest.raises(ValueError, match=r"one dtype and device, got .*float32.*float64"):
        StageParameters(network, flat_gradients=True)


def test_a_frozen_layer_stays_frozen():
    network = made(NETWORKS["edm"])
    frozen = next(iter(network.parameters()))
    frozen.requires_grad_(False)
    parameters = StageParameters(network)
    parameters.take_gradients(backward(network, [0, 1, 2]))
    assert next(iter(parameters)).grad is None
    parameters.drop_gradients()
    frozen.requires_grad_(True)
    parameters.take_gradients(backward(network, [0, 1, 2]))
    assert next(iter(parameters)).grad is not None


def test_a_decoder_may_be_frozen_by_its_names():
    network = made(NETWORKS["edm"])
    parameters = StageParameters(network)
    for name, parameter in zip(parameters.names, parameters, strict=True):
        parameter.requires_grad_(not (name.startswith("dec") and name.endswith(".0")))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    parameters.take_gradients(backward(network, [0, 1, 2]))
    torch.optim.SGD(parameters, lr=0.1).step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {
        name for name, parameter in zip(parameters.names, parameters, strict=True) if parameter.requires_grad
    }
    assert len(moved) < len(parameters)


def test_a_network_of_ordinary_layers():
    network = TinyNetwork(dropout=0)
    parameters = StageParameters(network)
    assert parameters.names == [name for name, _ in network.named_parameters()]
    network(torch.ones(1, 1, 8, 8), torch.zeros(1), [0]).sum().backward()
    parameters.take_gradients((1, 0, 0))
    for own, parameter in zip(parameters, network.parameters(), strict=True):
        assert own.grad is parameter.grad is not None  # nothing says which stage an ordinary layer serves


def test_one_count_per_stage_is_needed():
    parameters = StageParameters(made(NETWORKS["edm"]))
    with pytest.raises(ValueError, match=r"one count per stage is needed, got 2 for 3 stage\(s\)"):
        parameters.take_gradients((1, 1))


def test_parameters_that_have_moved_are_noticed():
    network = made(NETWORKS["edm"])
    parameters = StageParameters(network)
    counts = backward(network, [0, 1, 2])
    parameters.take_gradients(counts)
    network.float().double()  # other memory, as network.cpu().cuda() would be
    with pytest.raises(
        RuntimeError,
        match=r"parameters of the network have moved in memory or were replaced, first .*make StageParam",
    ):
        parameters.take_gradients(counts)


@flat_or_not
def test_parameters_that_were_replaced_are_noticed(flat):
    network = made(NETWORKS["edm"])
    parameters = StageParameters(network, flat)
    network.load_state_dict(network.state_dict(), assign=True)
    counts = backward(network, [0, 1, 2])
    with pytest.raises(RuntimeError, match="were replaced"):
        parameters.take_gradients(counts)


def test_gradients_of_the_step_before_are_noticed():
    network = made(NETWORKS["edm"])
    parameters = StageParameters(network)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):  # more gradients before the step
        parameters.take_gradients(backward(network, [0, 2]))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="gradients of the step before; drop them with drop_gradients"):
        parameters.take_gradients(backward(network, [0, 1]))
    parameters.drop_gradients()
    parameters.take_gradients(backward(network, [0, 1]))


def test_parameters_that_are_spread_over_processes_are_refused():
    class Spread(torch.Tensor):
        """Stands for PyTorch's DTensor."""

    network = made(NETWORKS["edm"])
    layer = next(module for module in network.modules() if isinstance(module, StageModule))
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Spread))
    with pytest.raises(TypeError, match=r"weight is a .*, whose stages do not lie in memory"):
        StageParameters(network)


@flat_or_not
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_belongs_to_the_copied_network(duplicate, flat):
    network = made(NETWORKS["edm"])
    original = StageParameters(network, flat_gradients=flat)
    other, parameters = duplicate((network, original))
    assert parameters.network is other
    assert (parameters.flat_gradients is not None) == flat
    assert not flat or parameters.flat_gradients.data_ptr() != original.flat_gradients.data_ptr()
    parameters.take_gradients(backward(other, [0, 1, 2]))
    torch.optim.SGD(parameters, lr=0.1).step()
    changed = [not torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2


def test_what_holds_a_network_is_refused():
    network = made(NETWORKS["edm"])
    with pytest.raises(
        TypeError, match="needs the network itself, which has num_stages, got EDMPreconditioner"
    ):
        StageParameters(EDMPreconditioner(network, Stages.edm()))


def test_state_over_the_networks_own_parameters_is_split():
    network = made(NETWORKS["edm"])
    parameters = StageParameters(network)
    name = next(name for name in parameters.names if name.endswith(".2")).rpartition(".")[0]
    whole = torch.arange(float(network.get_parameter(name).numel()))
    split = parameters.split_state({f"{name}.exp_avg": whole, f"{name}.step": torch.tensor(3.0)})
    parts = [n for n in parameters.names if n.rpartition(".")[0] == name]
    assert len(parts) == 3
    assert torch.equal(torch.cat([split[f"{part}.exp_avg"] for part in parts]), whole)
    assert all(split[f"{part}.step"] == 3 for part in parts)
    assert parameters.split_state(split) == split
