"""What a model costs, in training and in sampling, beside a unified network and one network per stage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from multistage_diffusion import networks
from multistage_diffusion.common.checks import are_shares
from multistage_diffusion.flops import TRAINING, NetworkCost, count_config, expected
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

__all__ = ["Model", "report"]


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
            found = read_metadata(path).get("config") if (path / METADATA).is_file() else saved_settings(path)
        else:
            found = _json(path)
        if found is None:
            raise ValueError(f"flops: {path} holds no run")
        if "family" in found:
            return cls._of_network(path.name, networks.in_effect(found), None)
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


def report(model: Model) -> dict:
    """What a model costs, beside a unified network and one network per stage: JSON-able values, costs in MACs.

    The unified network has one decoder, and the encoder's width. Training counts three forward passes, weighted by the
    shares of the stages; sampling the evaluations of each stage.

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
    whole, alone = (count_config(own | both) for both in (_both([width]), _both(widths)))
    cost = count_config(own)
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
        built = count_config(own | dict(model.preset.reference))
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
