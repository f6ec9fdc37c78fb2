"""Counts multiply-accumulates by running a network on the meta device: no weights, no arithmetic.

A network is run on a batch of all stages under PyTorch's counter, which shows the ops of ``msd_kernels`` and
PyTorch's own convolutions and matrix products to the rules of this module. One multiply-accumulate (MAC) is two FLOPs.
Normalisations, activations and FIR filters are not counted, as is usual.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msd_kernels.dispatch.flops import FORMULAS
from multistage_diffusion import networks
from multistage_diffusion.common.checks import are_shares
from multistage_diffusion.networks import in_effect
from multistage_diffusion.networks.layers import OnStages, StageModule, shared_layers
from multistage_diffusion.networks.stage_network import StageNetwork, Takes
from multistage_diffusion.noise.noise_levels import MixedNoise, stage_counts
from multistage_diffusion.noise.preconditioning import PRECONDITIONINGS, denoiser_of, stages_in_sigma
from multistage_diffusion.noise.schedules import SCHEDULES, Schedule
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.official.denoisers import published_by
from multistage_diffusion.official.network_files import read_descriptions
from multistage_diffusion.presets import Preset
from multistage_diffusion.sampling.table import find_sampler
from multistage_diffusion.training.checkpoints import METADATA, read_metadata
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.configure import saved_settings

__all__ = ["Model", "NetworkCost", "conditioning", "count", "expected", "report"]

TRAINING = 3  # a training step costs three forward passes: forward, and both gradients of every product


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        macs: per stage, multiply-accumulates of one forward pass of one sample.
        attention_macs: the part of them that is attention's products of queries, keys and values.
        shared_macs: the part of them in the layers that all stages share; 0 if there are none.
        parameters: per stage, parameters of its own layers.
        shared_parameters: parameters of the layers that all stages share.
    """

    macs: tuple[int, ...]
    attention_macs: tuple[int, ...]
    shared_macs: int
    parameters: tuple[int, ...]
    shared_parameters: int

    @property
    def total_parameters(self) -> int:
        return self.shared_parameters + sum(self.parameters)


def count(network: nn.Module) -> NetworkCost:
    """Counts a network of this library, or one with its interface and layers.

    Raises:
        ValueError: the network is not on the meta device, where tensors have shapes, but no memory::

            with torch.device("meta"):
                network = networks.build(config)
    """
    devices = {parameter.device.type for parameter in network.parameters()}
    if devices != {"meta"}:
        raise ValueError(
            f"flops.count: the network must be on the meta device, got {', '.join(sorted(devices))}; "
            'build it under torch.device("meta"), or move it with network.to("meta")'
        )
    stages = list(range(network.num_stages))
    # As many samples of each stage as of no other tell whose an op is. What other networks do, with ops that know no
    # stages, shows in batches of one stage alone.
    mixed = [stage for stage in stages for _ in range(stage + 1)]
    batches = [mixed] if isinstance(network, StageNetwork) else [[stage] for stage in stages]
    counter = _Counter(network.num_stages)
    for batch in batches:
        _forward(network, batch, counter)
    everyones = set(shared_layers(network))
    own, shared = [0] * network.num_stages, 0
    for layer in network.modules():
        if isinstance(layer, StageModule):
            for stage, tensor in layer.stage_parameters():
                if layer in everyones:
                    shared += tensor.numel()
                else:
                    own[stage] += tensor.numel()
    return NetworkCost(
        macs=tuple(counter.macs),
        attention_macs=tuple(counter.attention_macs),
        shared_macs=counter.shared_macs[0],
        parameters=tuple(own),
        shared_parameters=shared,
    )


def expected(costs: Sequence[float], shares: Sequence[float]) -> float:
    """The mean cost where a sample belongs to stage k with probability ``shares[k]``.

    Raises:
        ValueError: as many shares as stages are missing, or they do not sum up to 1.
    """
    if len(costs) != len(shares) or not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"flops.expected: shares must be one per stage ({len(costs)}) and sum up to 1, got {tuple(shares)}"
        )
    return math.fsum(c * s for c, s in zip(costs, shares, strict=True))


def count_config(config: Mapping[str, object]) -> NetworkCost:
    """Counts the network that ``networks.build`` makes of a configuration."""
    with torch.device("meta"):
        network = networks.build(config)
    return count(network)


# ------------------------------------------------------------------ a model: a network, how it is trained and sampled


@dataclass(frozen=True)
class Model:
    """A network, and how it is trained and sampled.

    Attributes:
        name: what it is called.
        network: its configuration, as ``networks.build`` takes it.
        stages: in sigma or in the schedule's variable.
        schedule: of its noise levels.
        shares: of the stages in training; default: of the schedule's own distribution.
        sampler, steps: the sampler and its steps; default: the schedule's, with its usual ones.
        preset: the published configuration, where it is one.
    """

    name: str
    network: Mapping[str, object]
    stages: Stages
    schedule: Schedule
    shares: tuple[float, ...] | None = None
    sampler: str | None = None
    steps: int | None = None
    preset: Preset | None = None

    @classmethod
    def of_preset(cls, preset: Preset) -> Model:
        """A published configuration, or the demo's."""
        own, schedule = preset.config(), SCHEDULES[preset.schedule]()
        sampling = preset.sampler, preset.sampler_steps
        return cls(preset.name, own, preset.stages(), schedule, preset.stage_shares(), *sampling, preset)

    @classmethod
    def of_file(cls, path: str | Path) -> Model:
        """What is in a run or checkpoint folder, in a file of ``msd convert``, or in JSON of a configuration.

        A network whose stages and schedule nothing says has those of its family's published model, if as many.

        Raises:
            ValueError: the file says nothing of a network, or not where its stages are cut.
            OSError: the file cannot be read.
        """
        path = Path(path)
        if path.suffix == ".safetensors" and not (path.parent / METADATA).is_file():
            return cls._of_network(path.name, *read_descriptions(path))
        path = path.parent if path.suffix == ".safetensors" else path
        if path.is_dir():
            found = read_metadata(path)["config"] if (path / METADATA).is_file() else saved_settings(path)
        else:
            found = _json(path)
        if found is None:
            raise ValueError(f"flops: {path} holds no run")
        if "family" in found:
            return cls._of_network(path.name, in_effect(found), None)
        config = TrainingConfig.from_json(found.get("config", found))
        return cls(
            path.name, config.network, config.stages, config.noise_schedule(), config.noise_levels().shares()
        )

    @classmethod
    def _of_network(cls, name: str, network: dict, said: Mapping[str, object] | None) -> Model:
        """A network, and what is said of its denoiser."""
        with torch.device("meta"):
            network = networks.build(network).config  # with every default
        if said is not None:
            constants = {name: value for name, value in said.items() if name not in ("schedule", "stages")}
            schedule = denoiser_of(said["schedule"]).schedule_with(
                PRECONDITIONINGS[said["schedule"]], constants
            )
            return cls(name, network, Stages.from_json(said["stages"]), schedule)
        published, stages = published_by(network["family"]), len(network["decoder_widths"])
        schedule = SCHEDULES[published.schedule]()
        if stages == 1:
            return cls(name, network, Stages.single(), schedule)
        if stages != len(published.stages()):
            raise ValueError(
                f"flops: {name} does not say where its {stages} stages are cut; give a run's config.json"
            )
        return cls(name, network, published.stages(), schedule, published.stage_shares())

    def changed(self, **changes: object) -> Model:
        """With other settings, those that are None apart."""
        return dataclasses.replace(
            self, **{name: value for name, value in changes.items() if value is not None}
        )

    def distribution(self) -> tuple[float, ...]:
        """The shares of the stages in training."""
        if self.shares is not None:
            return self.shares
        own = {"P_mean": self.schedule.P_mean, "P_std": self.schedule.P_std, "time_sampling": "logit-normal"}
        drawn = MixedNoise(
            stages_in_sigma(self.stages, self.schedule), self.schedule.training_distribution(own)
        )
        return drawn.shares()

    def sampling(self) -> tuple[str, int, tuple[int, ...]]:
        """The sampler, its steps, and its network evaluations of each stage."""
        sampler = find_sampler(self.sampler or self.schedule.sampler)
        steps = self.steps or sampler.steps
        levels = torch.tensor(sampler.config(self.schedule, steps).evaluated_levels(), dtype=torch.float64)
        stage = stages_in_sigma(self.stages, self.schedule).assign(levels)
        return sampler.name, steps, stage_counts(stage, len(self.stages))


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"flops: {path} is no JSON of a configuration: {error}") from error
    if not isinstance(found, dict) or not {"family", "network", "config"} & found.keys():
        raise ValueError(f"flops: {path} is no configuration of a network or of a run")
    return found


def report(model: Model, counted: Callable[[Mapping[str, object]], NetworkCost] = count_config) -> dict:
    """What a model costs, beside a unified network and one network per stage: JSON-able values, costs in MACs.

    The unified network has one decoder, and the encoder's width. Training counts three forward passes, weighted by the
    shares of the stages; sampling the evaluations of each stage.

    Args:
        counted: counts a configuration.

    Raises:
        ValueError: as many shares or widths as stages are missing, or shares that are none.
    """
    own, stages, shares = dict(model.network), model.stages, model.distribution()
    widths = list(own["decoder_widths"])
    if len(widths) != len(stages):
        raise ValueError(f"--decoder-widths: one width per stage ({len(stages)}) is needed, got {widths}")
    if len(shares) != len(stages) or not are_shares(shares):
        given = ",".join(f"{share:g}" for share in shares)
        raise ValueError(
            f"--shares {given}: one share per stage ({len(stages)}) is needed, none negative, with the sum 1"
        )
    width = max(own["encoder_widths"])
    whole, alone = (counted(own | both) for both in (_both([width]), _both(widths)))
    cost = counted(own)
    sampler, steps, evaluations = model.sampling()
    with_attention = model.preset is None or model.preset.published_attention
    found = {
        "name": model.name,
        "title": "" if model.preset is None else model.preset.title,
        "stages": [
            {
                "stage": k,
                "noise_levels": f"{stages.variable} in {stages.describe(k)}",
                "decoder_width": widths[k],
                "parameters": cost.parameters[k],
                **_costs(cost, k, with_attention),
            }
            for k in range(len(stages))
        ],
        "shared": {"parameters": cost.shared_parameters, "macs": cost.shared_macs},
        "total_parameters": cost.total_parameters,
        "unified": {"width": width, "parameters": whole.total_parameters, **_costs(whole, 0, with_attention)},
        "separate": {"parameters": alone.total_parameters, "macs": list(alone.macs)},
        "published_macs_count_attention": with_attention,
        "training": {
            "shares": list(shares),
            "macs_per_image": TRAINING * expected(cost.macs, shares),
            "unified_macs_per_image": TRAINING * whole.macs[0],
        },
        "sampling": {
            "sampler": sampler,
            "steps": steps,
            "evaluations": list(evaluations),
            "macs_per_image": sum(n * macs for n, macs in zip(evaluations, cost.macs, strict=True)),
            "unified_macs_per_image": sum(evaluations) * whole.macs[0],
        },
    }
    if model.preset is not None and model.preset.reference:
        built = counted(own | dict(model.preset.reference))
        found["reference_checkpoints"] = {
            "parameters": list(built.parameters),
            "total_parameters": built.total_parameters,
            "macs": list(built.macs),
        }
    return found


def _both(widths: list[int]) -> dict[str, list[int]]:
    return {"encoder_widths": widths, "decoder_widths": widths}


def _costs(cost: NetworkCost, stage: int, with_attention: bool) -> dict[str, int]:
    macs, attention = cost.macs[stage], cost.attention_macs[stage]
    published = macs if with_attention else macs - attention
    return {"macs": macs, "attention_macs": attention, "published_macs": published}


# ------------------------------------------------------------------ counting


def conditioning(network: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    """Labels and context of the shapes that a network needs, filled with zeros, on the network's device."""
    device = next(network.parameters()).device
    takes = Takes.of(network)
    shapes = {
        "class_labels": (batch, takes.class_labels),
        "context": (batch, 1, takes.context),
        "augment_labels": (batch, takes.augment_labels),
    }
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items() if shape[-1]}


def _forward(network: nn.Module, stages: Sequence[int], counter: _Counter) -> None:
    """Counts the forward pass of samples of these stages."""
    batch, size = len(stages), network.image_size
    x = torch.zeros(batch, network.in_channels, size, size, device="meta")
    noise = torch.zeros(batch, device="meta")
    inside = [part for part in network.modules() if isinstance(part, OnStages)]
    hooks = [part.register_forward_pre_hook(lambda part, *_: counter.enter(part.stages)) for part in inside]
    hooks += [part.register_forward_hook(lambda *_: counter.enter(None)) for part in inside]
    try:
        with torch.no_grad(), counter.counting(stages):
            network(x, noise, stages, **conditioning(network, batch))
    finally:
        for hook in hooks:
            hook.remove()


class _Counter:
    """Adds up the MACs of the ops that pass by: those of one sample of each stage.

    Ops for all samples at once are shared. Inside of an ``OnStages`` all are of its stages.
    """

    def __init__(self, num_stages: int) -> None:
        self.macs, self.attention_macs, self.shared_macs = ([0] * num_stages for _ in range(3))
        self.enter(None)

    def enter(self, stages: Sequence[int] | None) -> None:
        """What follows is of these stages; None: of the whole network."""
        self.stages = tuple(range(len(self.macs))) if stages is None else stages

    def counting(self, samples: Sequence[int]) -> FlopCounterMode:
        """A counter for a batch of samples of these stages."""
        rules = {op: partial(self._add, op, rule, samples) for op, rule in RULES.items()}
        return FlopCounterMode(display=False, custom_mapping=rules)

    def _add(self, op, rule: Callable, samples: Sequence[int], *args, out_shape, **kwargs) -> int:
        """Adds one call's, with shapes in the place of its tensors; returns its FLOPs."""
        counts, macs = rule(args, out_shape)
        number = {stage: samples.count(stage) for stage in samples}
        whole = len(set(counts)) == 1 and len(self.stages) == len(self.macs) > 1
        if alone := [stage for stage, n in number.items() if [n] == list(counts)]:
            shares, whole = [(alone[0], sum(macs) / number[alone[0]])], False
        elif whole:
            shares = [(stage, sum(macs) / len(samples)) for stage in number]
        else:  # a call may serve several layers, stage after stage in each
            shares = [
                (s, m / number[s]) for s, m in zip(cycle(self.stages), macs, strict=False) if s in number
            ]
        for stage, share in ((stage, round(share)) for stage, share in shares):
            self.macs[stage] += share
            self.attention_macs[stage] += share if op is torch.ops.msd_kernels.attention else 0
            self.shared_macs[stage] += share if whole else 0
        return 2 * sum(macs)


def _of_stages(op, args, out) -> tuple[Sequence[int], list[int]]:
    """Samples and MACs of a call of one of ``msd_kernels``, for each of its stages, by its own formula."""
    formula = FORMULAS[op]
    layout, *options = formula.settings(args)
    counts, found = layout[0], []
    for stage, count in enumerate(counts):
        alone = tuple(count if other == stage else 0 for other in range(len(counts)))
        found.append(formula.count(layout._replace(**{layout._fields[0]: alone}), *options) // 2)
    return counts, found


def _convolution(args, out) -> tuple[Sequence[int], list[int]]:
    """PyTorch's own ops see all samples alike, as one stage."""
    return out[:1], [math.prod(out) * math.prod(args[1][1:])]


def _product(args, out) -> tuple[Sequence[int], list[int]]:
    """``mm``, ``bmm`` and ``addmm``; the last argument is ``[..., inner, columns]``."""
    return out[:1], [math.prod(out) * args[-1][-2]]


OWN = tuple(getattr(torch.ops.msd_kernels, op) for op in ("grouped_conv2d", "grouped_linear", "attention"))
RULES: Mapping = {op: partial(_of_stages, op) for op in OWN} | {
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.mm: _product,
    torch.ops.aten.bmm: _product,
    torch.ops.aten.addmm: _product,
}
