"""What belongs to a stage, and what an optimizer does to the decoders of absent stages."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from msd_kernels.dispatch import stage_weights
from multistage_diffusion.networks import build, stage_network
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.training.parameters import FlatGradients, StageParameters, owned_parameters
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
def test_a_stage_owns_what_no_other_stage_changes(config):
    network = made(config)
    names = {parameter: name for name, parameter in network.named_parameters()}
    for stage in range(network.num_stages):
        owned = {names[parameter] for s, parameter in owned_parameters(network) if s == stage}
        assert own_names(network, stage) <= owned
        if network.num_stages > 1:
            assert owned == {name for name in owned if name.endswith(f".{stage}")}


def stepped(network, optimizer, flat, batch, seed) -> None:
    counts = backward(network, batch, seed)
    if flat is None:
        optimizer.step()
        optimizer.zero_grad()
    else:
        flat.leave_absent(counts)
        optimizer.step()
        flat.clear()


@flat_or_not
@pytest.mark.parametrize(
    "config", [c for name, c in NETWORKS.items() if "unified" not in name], ids=lambda c: c["family"]
)
def test_a_decoder_of_an_absent_stage_stays_as_it_is(config, flat):
    """In one process nothing needs to be called for that."""
    network = made(config)
    owned = [own_names(network, stage) for stage in range(3)]
    assert all(owned)
    gradients = FlatGradients(network) if flat else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    named = dict(network.named_parameters())
    batches = [[0, 1, 2], [0, 0, 1], [2, 2, 2], [1, 0, 0]]
    for step, stages in enumerate(batches):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        stepped(network, optimizer, gradients, stages, step)
        for name, value in network.state_dict().items():
            absent = any(name in owned[s] for s in range(3) if s not in stages)
            if name in named:
                assert torch.equal(value, before[name]) == absent, (step, name)
    seen = [sum(s in stages for stages in batches) for s in range(3)]
    for name, parameter in named.items():
        stage = next((s for s in range(3) if name in owned[s]), None)
        assert int(optimizer.state[parameter]["step"]) == (4 if stage is None else seen[stage]), name


@each_network
def test_flat_gradients_stay_where_they_are_and_hold_every_gradient(config):
    network, twin = made(config), made(config)
    gradients = FlatGradients(network)
    flat = gradients.values
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
        owners = {id(parameter): stage for stage, parameter in owned_parameters(network)}
        gradients.leave_absent(counts)
        for own, other in zip(network.parameters(), twin.parameters(), strict=True):
            if owners.get(id(own), 0):
                assert own.grad is None
            else:
                half = torch.zeros_like(other) if other.grad is None else 0.5 * other.grad
                assert torch.equal(own.grad, half)
        gradients.clear()
        assert not flat.any()
        assert gradients.values is flat
        assert [p.grad.data_ptr() for p in network.parameters()] == places
        assert all(place % 128 == flat.data_ptr() % 128 for place in places)


@pytest.mark.parametrize("lose", [torch.nn.Module.zero_grad, lambda network: network.to(torch.float32)])
def test_gradients_that_have_left_the_flat_ones_are_noticed(lose):
    network = TinyNetwork(dropout=0).double()
    gradients = FlatGradients(network)
    lose(network)
    with pytest.raises(RuntimeError, match="gradients have left the flat ones"):
        gradients.leave_absent((1, 0, 0))


def test_flat_gradients_notice_parameters_that_were_replaced():
    network = made(NETWORKS["edm"])
    gradients = FlatGradients(network)
    network.load_state_dict(network.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="were replaced; make FlatGradients and the optimizer anew"):
        gradients.leave_absent(backward(network, [0, 1, 2]))


def test_flat_gradients_need_one_dtype():
    network = TinyNetwork()
    network.encoder.double()
    with pytest.raises(ValueError, match=r"one dtype and device, got .*float32.*float64"):
        FlatGradients(network)


def test_a_frozen_layer_stays_frozen():
    network = made(NETWORKS["edm"])
    frozen = next(iter(network.parameters()))
    frozen.requires_grad_(False)
    gradients = FlatGradients(network)
    gradients.leave_absent(backward(network, [0, 1, 2]))
    assert frozen.grad is None
    assert sum(p.numel() for p in network.parameters() if p.grad is not None) < gradients.values.numel()


def test_a_decoder_may_be_frozen_by_its_names():
    network = made(NETWORKS["edm"])
    named = dict(network.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(not (name.startswith("dec") and name.endswith(".0")))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    backward(network, [0, 1, 2])
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in named.items() if parameter.requires_grad}
    assert len(moved) < len(named)


def test_a_network_of_ordinary_layers():
    network = TinyNetwork(dropout=0)
    gradients = FlatGradients(network)
    network(torch.ones(1, 1, 8, 8), torch.zeros(1), [0]).sum().backward()
    gradients.leave_absent((1, 0, 0))
    assert all(p.grad is not None for p in network.parameters())  # nothing says which stage a layer serves


def test_one_count_per_stage_is_needed():
    network = made(NETWORKS["edm"])
    message = r"one count per stage is needed, got 2 for 3 stage\(s\)"
    with pytest.raises(ValueError, match=f"FlatGradients: {message}"):
        FlatGradients(network).leave_absent((1, 1))
    with pytest.raises(ValueError, match=f"StageParameters: {message}"):
        StageParameters(network, torch.optim.SGD(network.parameters())).count((1, 1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_belongs_to_the_copied_network(duplicate):
    network = made(NETWORKS["edm"])
    original = FlatGradients(network)
    other, gradients = duplicate((network, original))
    assert gradients.network is other
    assert gradients.values.data_ptr() != original.values.data_ptr()
    gradients.leave_absent(backward(other, [0, 1, 2]))
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    changed = [not torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2


@pytest.mark.parametrize(
    "make", [FlatGradients, lambda n: StageParameters(n, torch.optim.SGD(n.parameters()))]
)
def test_what_holds_a_network_is_refused(make):
    network = made(NETWORKS["edm"])
    with pytest.raises(
        TypeError, match="needs the network itself, which has num_stages, got EDMPreconditioner"
    ):
        make(EDMPreconditioner(network, Stages.edm()))


class Wrapped:
    """Holds an optimizer as accelerate and Lightning do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("give", [list, torch.tensor, lambda ids: StageOrder.of(ids, 3, len(ids))])
def test_attached_to_an_optimizer_it_takes_away_the_gradients_of_absent_stages(give):
    """Gradients of zero, which there are in several processes, stand for those."""
    network = made(NETWORKS["edm"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    owned = own_names(network, 1)
    StageParameters(network, Wrapped(optimizer))
    named = dict(network.named_parameters())
    x, noise = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double()
    for ids in ([0, 2], [2, 2]):  # two micro-batches
        network(x, noise, stage=give(ids)).square().sum().backward()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer.step()
    unchanged = {name for name, parameter in named.items() if torch.equal(parameter, before[name])}
    assert owned <= unchanged
    assert all(name.endswith(".1") for name in unchanged)
    with torch.no_grad():
        network(x, noise, [0, 1])
    with pytest.raises(RuntimeError, match=r"no samples were counted since the step before; call count"):
        optimizer.step()


@pytest.fixture
def several_processes(monkeypatch) -> None:
    """As if others trained the network, too."""
    for module in (stage_weights, stage_network):
        monkeypatch.setattr(module, "several_processes", lambda: True)


def test_among_several_processes_absent_stages_have_gradients_of_zero(several_processes):
    network = made(NETWORKS["edm"])
    FlatGradients(network)
    network.zero_grad()
    backward(network, [0, 2])
    absent = [parameter for stage, parameter in owned_parameters(network) if stage == 1]
    assert absent
    for parameter in absent:
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()


def test_among_several_processes_a_network_warns_that_nothing_leaves_absent_stages_alone(
    several_processes, recwarn
):
    network = made(NETWORKS["edm"])
    with pytest.warns(
        UserWarning, match=r"EDMUNet: several processes .*StageParameters\(network, optimizer\)"
    ):
        backward(network, [0, 2])
    recwarn.clear()
    backward(network, [0, 2])  # once
    for attach in (FlatGradients, lambda n: StageParameters(n, torch.optim.SGD(n.parameters()))):
        other = made(NETWORKS["edm"])
        attach(other)
        backward(other, [0, 2])
    with torch.no_grad():
        made(NETWORKS["edm"])(torch.zeros(1, 3, 8, 8).double(), torch.zeros(1).double(), [0])
    assert not [warning for warning in recwarn if "several processes" in str(warning.message)]
