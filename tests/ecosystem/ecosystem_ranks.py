"""What processes that share a network do with it, over Gloo: scenarios by name, all of them in one start.

A scenario returns, in every process, what a test looks at: a number, or a text that says what is wrong.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import group_norm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import msd_kernels
from ecosystem_networks import NETWORKS, STAGE_LAYERS, Network, copies, difference, filled, loss_of, whole
from multistage_diffusion.networks.blocks import DecoderLevel, EncoderLevel, ResidualBlock
from multistage_diffusion.training.parameters import StageParameters

# By step and rank. Stage 1 is absent on one rank, then on both, where its decoder stays as it is.
BATCHES = [
    [[0, 0, 1, 2], [0, 1, 1, 2]],
    [[0, 2, 0, 2], [0, 0, 1, 2]],
    [[0, 0, 0, 0], [2, 0, 0, 2]],
]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
EXPECTED: dict[str, dict[str, Tensor]] = {}  # weights after the training of one process alone, by network

Wrap = Callable[[nn.Module], nn.Module]


def shard(parts: tuple[type[nn.Module], ...], network: nn.Module, **options) -> nn.Module:
    """FSDP2, as its users write it: each of these parts, and the network as the root."""
    for module in list(network.modules()):
        if module is not network and isinstance(module, parts):
            fully_shard(module, **options)
    return fully_shard(network, **options)


LAYERS = (nn.Conv2d, *STAGE_LAYERS)
SHARDED: dict[str, dict[str, Wrap]] = {
    "readme": {
        "root": partial(shard, ()),
        "level": lambda network: (fully_shard(network.decoder), fully_shard(network))[1],
        "layer": partial(shard, LAYERS),
    },
    "edm": {
        "root": partial(shard, ()),
        "level": partial(shard, (EncoderLevel, DecoderLevel)),
        "block": partial(shard, (ResidualBlock,)),
        "layer": partial(shard, LAYERS),
    },
}
sharded = SHARDED["readme"]["layer"]


def optimizer_of(network: nn.Module) -> SGD:
    """Momentum and weight decay go on moving what has a gradient of 0."""
    return SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


def alone(network: nn.Module) -> dict[str, Tensor]:
    """The weights after one process has trained on the batches of all ranks."""
    optimizer = optimizer_of(network)
    for step, batches in enumerate(BATCHES):
        optimizer.zero_grad()
        for rank, stage in enumerate(batches):
            (loss_of(network, stage, seed=10 * step + rank) / len(batches)).backward()
        optimizer.step()
    return copies(network.state_dict())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backward=Tensor.backward) -> None:
    for step, batches in enumerate(BATCHES):
        optimizer.zero_grad()
        backward(loss_of(model, batches[dist.get_rank()], seed=10 * step + dist.get_rank()))
        optimizer.step()


def farthest(network: nn.Module, expected: dict[str, Tensor]) -> float:
    """The largest difference of any number."""
    tensors = copies(network.state_dict())
    assert tensors.keys() == expected.keys()
    return float(
        torch.stack([(tensors[name] - tensor).abs().max() for name, tensor in expected.items()]).max()
    )


def trained(make: str, wrap: Wrap, attached: bool = True) -> float:
    """How far from one process alone several are after these steps."""
    network = filled(NETWORKS[make]())
    model = wrap(network)
    optimizer = optimizer_of(network)
    if attached:
        StageParameters(network, optimizer)
    train(model, optimizer)
    return farthest(network, EXPECTED[make])


def state_dict_on_one_rank(folder: Path) -> float | bool:
    """Seconds until ``state_dict()`` of rank 0 returns; the others wait for that, and take no part in it."""
    network, returned = sharded(filled(Network())), folder / "returned"
    if dist.get_rank() == 0:
        start = time.monotonic()
        network.state_dict()
        seconds = time.monotonic() - start
        returned.touch()
        return seconds
    until = time.monotonic() + 20
    while not returned.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return returned.exists()


def sharded_state_dict() -> str | None:
    """Loading the state of one sharded network into another, by PyTorch's own methods."""
    network = sharded(filled(Network()))
    expected = copies(network.state_dict())
    for assign in (False, True):
        other = sharded(filled(Network(), seed=1))
        other.load_state_dict(network.state_dict(), assign=assign)
        if wrong := difference(other.state_dict(), expected) or difference(
            dict(other.named_parameters()), expected
        ):
            return f"assign={assign}: {wrong}"
    return None


def memory_of_a_rank() -> list[int]:
    """Numbers that this rank holds, in parameters and in the state dict, of how many."""
    network = sharded(filled(Network()))
    held = [
        sum(t.to_local().numel() for t in d) for d in (network.parameters(), network.state_dict().values())
    ]
    return [*held, sum(parameter.numel() for parameter in network.parameters())]


def broadcast_full_state() -> str | None:
    """``set_model_state_dict`` from what rank 0 alone has."""
    expected = copies(filled(Network(), seed=2).state_dict())
    network = sharded(filled(Network()))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given = copies(expected) if dist.get_rank() == 0 else {}
    set_model_state_dict(network, given, options=options)
    return difference(network.state_dict(), expected)


def meta_device() -> str | None:
    """Sharded before it has memory, filled from a full state."""
    expected = copies(filled(Network(), seed=2).state_dict())
    with torch.device("meta"):
        network = Network()
    sharded(network).to_empty(device="cpu")
    set_model_state_dict(network, copies(expected), options=StateDictOptions(full_state_dict=True))
    return difference(network.state_dict(), expected)


def mixed_precision() -> list:
    """Types of gradients and parameters, and the largest error of a gradient, relative to the largest gradient."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    networks = filled(Network()), shard(LAYERS, filled(Network()), mp_policy=policy)
    stage = [0, 1, 1, 2]
    for network in networks:
        loss_of(network, stage).backward()
    exact, rounded = ([whole(p.grad).flatten() for p in network.parameters()] for network in networks)
    error = (torch.cat(rounded) - torch.cat(exact)).abs().max() / torch.cat(exact).abs().max()
    kinds = {str(t.dtype) for p in networks[1].parameters() for t in (p, p.grad)}
    return [sorted(kinds), float(error)]


def clipped_norm() -> float:
    """The relative difference of a clipped norm from that of one process."""
    norms = []
    for network in (filled(Network()), sharded(filled(Network()))):
        loss_of(network, [0, 1, 1, 2]).backward()
        norms.append(float(whole(nn.utils.clip_grad_norm_(network.parameters(), 1e-3))))
    return abs(norms[1] / norms[0] - 1)


def dtensors_of_a_batch() -> list[str]:
    """Placements of a group norm whose batch is sharded: PyTorch's own, and this library's."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(torch.randn(4, 8, 4, 4), mesh, [Shard(0)])
    weight, bias = (distribute_tensor(torch.ones(8), mesh, [Replicate()]) for _ in range(2))
    theirs = group_norm(x, 2, weight, bias)
    ours = msd_kernels.group_norm(x, 2, weight, bias)
    assert isinstance(ours, DTensor)
    torch.testing.assert_close(whole(ours), whole(theirs), rtol=1e-5, atol=1e-5)
    return [str(y.placements) for y in (theirs, ours)]


def fsdp1() -> str | None:
    """The wrapper that FSDP2 follows: a full state has everything, under the network's names."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    network = filled(Network())
    expected = copies(network.state_dict())
    model = FullyShardedDataParallel(network, use_orig_params=True, device_id=torch.device("cpu"))
    loss_of(model, [0, 1, 1, 2]).backward()
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return difference(model.state_dict(), expected)


def compiled() -> float:
    """How far a compiled sharded network's gradients are from those of an eager whole one."""
    stage = [0, 1, 1, 2]
    network, expected = sharded(filled(Network())), filled(Network())
    loss_of(torch.compile(network, backend="aot_eager"), stage).backward()
    loss_of(expected, stage).backward()
    pairs = zip(network.parameters(), expected.parameters(), strict=True)
    return float(torch.stack([(whole(a.grad) - b.grad).abs().max() for a, b in pairs]).max())


def save_sharded(folder: Path) -> str | None:
    """Trains, saves weights and optimizer from all ranks, and what they are, whole, from the first."""
    network = sharded(filled(Network()))
    optimizer = optimizer_of(network)
    StageParameters(network, optimizer)
    train(network, optimizer)
    weights, state = get_state_dict(network, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    dcp.save({"model": network.state_dict()}, checkpoint_id=folder / "plain")
    expected, moments = copies(network.state_dict()), copies(momentum(state))
    full = get_model_state_dict(network, options=FULL)
    if dist.get_rank() == 0:
        save_file(expected, folder / "expected.safetensors")
        save_file(moments, folder / "moments.safetensors")
        return difference(full, expected)
    return None


def load_sharded(folder: Path) -> str | None:
    """What another number of ranks reads of that."""
    expected = load_file(folder / "expected.safetensors")
    network = filled(Network(), seed=3)
    if dist.get_world_size() > 1:
        sharded(network)
    optimizer = optimizer_of(network)
    StageParameters(network, optimizer)
    weights, state = get_state_dict(network, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    set_state_dict(network, optimizer, model_state_dict=weights, optim_state_dict=state)
    _, state = get_state_dict(network, optimizer)
    moments = load_file(folder / "moments.safetensors")
    if wrong := difference(network.state_dict(), expected) or difference(momentum(state), moments):
        return wrong
    return load_plain(folder, expected)


def load_plain(folder: Path, expected: dict[str, Tensor]) -> str | None:
    """By ``state_dict`` and ``load_state_dict`` alone, without the optimizer."""
    network = filled(Network(), seed=4)
    if dist.get_world_size() > 1:
        sharded(network)
    tensors = {"model": network.state_dict()}
    dcp.load(tensors, checkpoint_id=folder / "plain")
    network.load_state_dict(tensors["model"])
    return difference(network.state_dict(), expected)


def momentum(state: dict) -> dict[str, Tensor]:
    """An optimizer's moments, of every parameter."""
    return {name: entries["momentum_buffer"] for name, entries in state["state"].items()}


def accelerated() -> float:
    """How far a network and an optimizer that accelerate has prepared are from one process alone."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size()
    network = filled(Network())
    model, optimizer = accelerator.prepare(network, optimizer_of(network))
    StageParameters(network, optimizer)
    train(model, optimizer, accelerator.backward)
    return farthest(network, EXPECTED["readme"])


def training(make: str) -> dict[str, Callable[[], object]]:
    """All ways of sharing a network."""
    ways = {"ddp": DistributedDataParallel, **SHARDED[make]}
    return {f"{make} {way}": partial(trained, make, wrap) for way, wrap in ways.items()}


def not_attached() -> float:
    """How far an optimizer comes that is not told of absent stages."""
    return trained("readme", DistributedDataParallel, attached=False)


def outcome(scenario: Callable[[], object]) -> object:
    try:
        return scenario()
    except Exception:
        return traceback.format_exc()


def main(folder: str, *names: str) -> None:
    """Runs these scenarios and prints their outcomes as JSON; a network's name stands for all of its training."""
    torch.set_num_threads(1)
    # Before the processes meet: alone, a stage without samples has no gradient.
    EXPECTED.update({make: alone(filled(build())) for make, build in NETWORKS.items() if make in names})
    dist.init_process_group("gloo")
    scenarios: dict[str, Callable[[], object]] = {}
    for name in names:
        function = globals().get(name)
        if name in NETWORKS:
            scenarios |= training(name)
        elif "folder" in signature(function).parameters:
            scenarios[name] = partial(function, Path(folder))
        else:
            scenarios[name] = function
    print(json.dumps({name: outcome(scenario) for name, scenario in scenarios.items()}))
    dist.destroy_process_group()
