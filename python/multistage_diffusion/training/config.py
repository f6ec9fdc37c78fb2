"""What decides the outcome of a training run, as one checked, JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from multistage_diffusion.common.settings import Number
from multistage_diffusion.data.augmentation import Augmentation
from multistage_diffusion.networks import in_effect
from multistage_diffusion.noise.noise_levels import (
    MixedNoise,
    RestagedNoise,
    StratifiedNoise,
    SystematicNoise,
)
from multistage_diffusion.noise.preconditioning import (
    Preconditioner,
    own_constants,
    precondition,
    stages_in_sigma,
)
from multistage_diffusion.noise.schedules import SCHEDULES, Schedule
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.training.checkpoint_schema import same
from multistage_diffusion.training.settings import FREE, SETTINGS, STAGES, TrainingSettings


def free_keys(config: dict) -> set[str]:
    """What may differ between a run of this configuration and its continuation."""
    return FREE | ({"steps"} if config.get("lr_decay", "constant") == "constant" else set())


SETTLED = ("prediction", "P_mean", "P_std")  # what is left to the schedule has a value as soon as it is known


def settled(values: dict) -> dict:
    """Settings of a run with those that are left to the schedule as the schedule has them."""
    kind = SCHEDULES[values["schedule"]]
    own = dict(zip(SETTLED, (kind.predictions[0], kind.P_mean, kind.P_std), strict=True))
    return {**values, **{name: value for name, value in own.items() if values.get(name) is None}}


def _unsettled(name: str, value: object) -> str:
    """What is wrong with a saved setting that was left to the schedule: it has a value as soon as that is known."""
    return "must be settled" if value is None and name in SETTLED else ""


def stages_of(values: dict) -> dict[str, Stages | None]:
    """The stages that a saved configuration has, as ``TrainingConfig`` takes them."""
    drawn = values.get("drawn_stages")
    return {
        "stages": Stages.from_json(values["stages"]),
        "drawn_stages": None if drawn is None else Stages.from_json(drawn),
    }


@dataclass(frozen=True)
class TrainingConfig(TrainingSettings):
    __doc__ = TrainingSettings.__doc__

    def __post_init__(self):
        for name, one in SETTINGS.items():
            value = getattr(self, name)
            if one.kind is not STAGES and (problem := one.problem(value)):
                raise ValueError(f"TrainingConfig: {name}={value!r} {problem}")
            if isinstance(value, float) and isinstance(one.kind, Number) and one.kind.is_whole:
                object.__setattr__(self, name, int(value))
        for name in ("stage_probabilities", "betas"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, values)))
        for name, value in settled(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_combinations()
        self.noise_levels()  # raises what is wrong with the distribution and the probabilities

    def _check_combinations(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"TrainingConfig: accumulate={self.accumulate} does not divide batch_size={self.batch_size}"
            )
        if self.stage_sampling != "stratified" and (self.stage_probabilities or self.importance_weights):
            raise ValueError(
                'TrainingConfig: stage_probabilities and importance_weights need stage_sampling="stratified", '
                f"got {self.stage_sampling!r}, whose stages have the shares of the schedule's distribution"
            )
        if self.prediction not in (known := SCHEDULES[self.schedule].predictions):
            raise ValueError(
                f"TrainingConfig: prediction must be one of {', '.join(known)} with schedule {self.schedule}, "
                f"got {self.prediction!r}"
            )
        if self.values == "latents" and (self.augment is not None or self.sample_every is not None):
            raise ValueError(
                "TrainingConfig: latents are no images: augment and sample_every must be None, "
                f"got augment={self.augment}, sample_every={self.sample_every}"
            )
        if self.augment and not self.network.get("augment_dim"):
            raise ValueError(
                f"TrainingConfig: augment={self.augment} needs a network that is told of it "
                "(augment_dim=9); any network takes augment=0, flips alone"
            )

    # ------------------------------------------------------------------ what it stands for

    def noise_schedule(self) -> Schedule:
        """The schedule of this name, with the run's settings of it."""
        kind = SCHEDULES[self.schedule]
        own = {field.name for field in dataclasses.fields(kind)}.intersection(kind.settings)
        return kind(**{name: getattr(self, name) for name in own})

    def denoiser(self, network: nn.Module) -> Preconditioner:
        """D(x; sigma) around the network."""
        constants = own_constants(self.schedule, vars(self))
        return precondition(network, self.stages, self.schedule, **constants)

    def augmentation(self) -> Augmentation | None:
        """What is done to the images before they are noised."""
        return None if self.augment is None else Augmentation(self.augment)

    def noise_levels(self) -> MixedNoise | StratifiedNoise | SystematicNoise | RestagedNoise:
        """What draws the noise levels of a batch."""
        if self.drawn_stages is not None:
            noise = dataclasses.replace(self, stages=self.drawn_stages, drawn_stages=None).noise_levels()
            return RestagedNoise(noise, stages_in_sigma(self.stages, self.noise_schedule()))
        schedule = self.noise_schedule()
        distribution = schedule.training_distribution(vars(self))
        stages = stages_in_sigma(self.stages, schedule)
        if self.stage_sampling == "stratified":
            return StratifiedNoise(stages, self.stage_probabilities, distribution, self.importance_weights)
        kind = SystematicNoise if self.stage_sampling == "systematic" else MixedNoise
        return kind(stages, distribution)

    def loss_scale(self, numbers: int) -> float:
        """What the loss of a sample, a sum over its ``numbers`` channels and pixels, is multiplied with.

        EDM's loss is that sum; score SDE and latent diffusion take the mean. To Adam that is the same but for ``eps``
        and clipping.
        """
        return 1.0 if SCHEDULES[self.schedule].sums_loss else 1 / numbers

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        lr = self.lr
        if self.warmup_images:
            lr *= min(1.0, (step + 1) * self.batch_size / self.warmup_images)
        if self.lr_decay == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return lr

    # ------------------------------------------------------------------ on disk

    def to_json(self) -> dict:
        values = {name: getattr(self, name) for name in SETTINGS}
        for name in ("stages", "drawn_stages"):
            values[name] = None if values[name] is None else values[name].to_json()
        return json.loads(json.dumps(values))  # tuples become lists, as they are after a round trip

    @classmethod
    def from_json(cls, values: dict) -> TrainingConfig:
        """The inverse of ``to_json``. Raises ValueError for what is no such object or has an unknown key."""
        if not isinstance(values, dict) or not all(
            isinstance(values.get(k), dict) for k in ("network", "stages")
        ):
            raise ValueError(
                f'TrainingConfig: expected an object with "network" and "stages", got {values!r}'
            )
        if unknown := sorted(set(values) - set(SETTINGS)):
            raise ValueError(
                f"TrainingConfig: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(SETTINGS))}"
            )
        cls.check_json(values)
        network = in_effect(values["network"])
        try:
            return cls(**{**values, "network": network, **stages_of(values)})
        except OverflowError as error:  # JSON has integers of any size
            raise ValueError(f"TrainingConfig: {error}, in {values!r}") from error

    @classmethod
    def read(cls, path: Path) -> TrainingConfig:
        """What a config.json says. Raises FileNotFoundError, and ValueError for what describes no configuration."""
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise ValueError("it is no file")
        try:
            return cls.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            raise
        except (OSError, RecursionError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def check_json(values: dict) -> None:
        """Raises ValueError for a value of a JSON object that its setting may not have."""
        for name, value in values.items():
            if name in SETTINGS and (problem := SETTINGS[name].problem(value) or _unsettled(name, value)):
                raise ValueError(f"TrainingConfig: {name}={value!r} {problem}")

    def differences(self, saved: dict) -> list[str]:
        """What of a saved configuration differs from this one and may not when a run is resumed.

        A key that the saved one lacks, because an earlier version wrote it, counts as its default.
        """
        free = free_keys(self.to_json())
        defaults = {
            f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING
        }
        saved = {**json.loads(json.dumps(defaults)), **saved}
        if saved["schedule"] in tuple(SCHEDULES):
            saved = settled(saved)
        if isinstance(saved.get("network"), dict):
            saved["network"] = in_effect(saved["network"])
        given = {k: v for k, v in self.to_json().items() if k not in free}
        return differing_keys({k: v for k, v in saved.items() if k not in free}, given)


def differing_keys(saved: dict, given: dict, prefix: str = "") -> list[str]:
    """One line for every key whose values differ, nested keys joined by dots."""
    lines = []
    for key in sorted(set(saved) | set(given)):
        name = f"{prefix}{key}"
        a, b = saved.get(key), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing_keys(a, b, f"{name}.")
        elif key not in saved:
            lines.append(f"{name}: not in the checkpoint, now {b!r}")
        elif key not in given:
            lines.append(f"{name}: {a!r} in the checkpoint, now missing")
        elif not same(a, b):
            lines.append(f"{name}: {a!r} in the checkpoint, now {b!r}")
    return lines
