"""What decides the outcome of a training run, as one checked, JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

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

ALLOWED = {
    "schedule": tuple(SCHEDULES),
    "time_sampling": ("logit-normal", "uniform"),
    "values": ("images", "latents"),
    "precision": ("fp32", "bf16"),
    "stage_sampling": ("mixed", "stratified", "systematic"),
    "lr_decay": ("constant", "cosine"),
}
# What may differ between a run and its continuation: none of it changes what the steps compute, up to rounding and the
# draws of dropout. The images are known by their fingerprint, wherever they lie.
FREE = {
    "data",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "sample_every",
    "sample_count",
    "accumulate",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _are_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


def free_keys(config: dict) -> set[str]:
    """What may differ between a run of this configuration and its continuation."""
    return FREE | ({"steps"} if config.get("lr_decay", "constant") == "constant" else set())


SETTLED = ("prediction", "P_mean", "P_std")  # what is left to the schedule has a value as soon as it is known


def settled(values: dict) -> dict:
    """Settings of a run with those that are left to the schedule as the schedule has them."""
    kind = SCHEDULES[values["schedule"]]
    own = dict(zip(SETTLED, (kind.predictions[0], kind.P_mean, kind.P_std), strict=True))
    return {**values, **{name: value for name, value in own.items() if values.get(name) is None}}


def stages_of(values: dict) -> dict[str, Stages | None]:
    """The stages that a saved configuration has, as ``TrainingConfig`` takes them."""
    drawn = values.get("drawn_stages")
    return {
        "stages": Stages.from_json(values["stages"]),
        "drawn_stages": None if drawn is None else Stages.from_json(drawn),
    }


# What JSON may say of an attribute of each type.
JSON_TYPES = {
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "dict": (lambda value: isinstance(value, dict), "an object"),
    "Stages": (lambda value: isinstance(value, dict), "an object"),
    "tuple[float, float]": (_are_numbers, "a list of numbers"),
    "tuple[float, ...]": (_are_numbers, "a list of numbers"),
}


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome of a run. Defaults are EDM's for CIFAR-10 (arXiv 2206.00364).

    Attributes:
        network: what ``multistage_diffusion.networks.build`` takes.
        stages: the stages of the noise levels, in sigma or in the schedule's variable.
        schedule: "edm"; or "vp", "ve", "ldm", "flow": what the network is told of a noise level, and which of them it
            is trained on; see ``preconditioning.precondition``.
        prediction: what a network of another schedule than "edm" predicts: "epsilon", "x0" or "v"; ``None``: the usual
            one, "v" of schedule "flow", else "epsilon".
        data: "digits", or a folder, archive or array file of images.
        values: "images", or "latents" for arrays of any range that an autoencoder made.
        image_size: pixels per side the images are brought to; ``None``: as they are.
        augment: probability of each kind of ``Augmentation``, which a network with ``augment_dim`` is told; 0: flips
            alone, allowed for any network; ``None``: images as they are.
        sigma_data: standard deviation of the data in [-1, 1]; of schedule "edm".
        P_mean, P_std: ln sigma ~ N(P_mean, P_std²); of schedule "edm", and of "flow" before the shift; ``None``:
            -1.2 and 1.2, or 0 and 1 of "flow". The others draw their variable evenly.
        shift: of schedule "flow": multiplies sigma, see ``FlowMatching``.
        time_sampling: of schedule "flow": "logit-normal" times, or "uniform" ones.
        stage_sampling: "mixed" (each noise level on its own, as the schedule's distribution has it), "systematic"
            (evenly spaced quantiles of that distribution: same expected loss, less variance, few mixes of stages) or
            "stratified" (stages in given proportions); see ``noise_levels``.
        stage_probabilities: of stratified sampling; ``None``: uniform.
        drawn_stages: those that ``stage_sampling`` and ``stage_probabilities`` mean, where they are not the network's:
            so a unified network is trained on the noise levels of a multi-stage one.
        importance_weights: of stratified sampling: keep the expected loss of "mixed".
        steps: optimizer steps.
        batch_size: images per step.
        accumulate: micro-batches a batch is split into; changes memory, and the result only by rounding and the draws
            of dropout.
        precision: "fp32", or "bf16" for autocast to bfloat16.
        lr, betas, eps: of Adam.
        weight_decay: per step, as a share of the learning rate (AdamW, arXiv 1711.05101).
        warmup_images: the learning rate grows linearly over that many images.
        lr_decay: "constant", or "cosine" to 0 at the last step.
        gradient_clip: largest norm of the whole gradient; ``None``: no clipping.
        ema_halflife_images, ema_rampup_ratio: see ``EMA``.
        seed: of everything random.
        checkpoint_every, log_every, sample_every: in steps; ``sample_every=None``: no grids.
        keep_checkpoints: the newest that many stay; ``None``: all.
        sample_count: images of a grid.

    Raises:
        ValueError: a value that is not allowed, or two that do not go together.
    """

    network: dict
    stages: Stages = field(default_factory=Stages.edm)
    schedule: str = "edm"
    prediction: str | None = None
    data: str = "digits"
    values: str = "images"
    image_size: int | None = None
    augment: float | None = None
    sigma_data: float = 0.5
    P_mean: float | None = None
    P_std: float | None = None
    shift: float = 1.0
    time_sampling: str = "logit-normal"
    stage_sampling: str = "mixed"
    stage_probabilities: tuple[float, ...] | None = None
    drawn_stages: Stages | None = None
    importance_weights: bool = False
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "fp32"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0
    lr_decay: str = "constant"
    gradient_clip: float | None = None
    ema_halflife_images: float = 500_000
    ema_rampup_ratio: float | None = 0.05
    seed: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int | None = 2
    log_every: int = 50
    sample_every: int | None = None
    sample_count: int = 16

    def __post_init__(self):
        if self.stage_probabilities is not None:
            object.__setattr__(self, "stage_probabilities", tuple(map(float, self.stage_probabilities)))
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        if not isinstance(self.network, dict):
            raise ValueError(f"TrainingConfig: network must be a dictionary, got {self.network!r}")
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TrainingConfig: {name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        for name, value in settled(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_numbers()
        self._check_combinations()
        self.noise_levels()  # raises what is wrong with the distribution and the probabilities

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "sample_count"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(
                    f"TrainingConfig: {name}={getattr(self, name)!r} must be a whole number >= 1"
                )
        for name in ("keep_checkpoints", "sample_every", "image_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"TrainingConfig: {name}={value!r} must be None or a whole number >= 1")
        for name in ("lr", "eps", "sigma_data", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainingConfig: {name}={getattr(self, name)} must be positive and finite")
        for name in ("warmup_images", "ema_halflife_images", "seed", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainingConfig: {name}={getattr(self, name)} must be at least 0")
        for name in ("warmup_images", "seed", "weight_decay"):
            if not getattr(self, name) < math.inf:
                raise ValueError(f"TrainingConfig: {name}={getattr(self, name)} must be finite")
        for name in ("gradient_clip", "ema_rampup_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainingConfig: {name}={value} must be None or positive")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"TrainingConfig: betas={self.betas} must be two numbers in [0, 1)")
        if self.augment is not None and not 0 <= self.augment <= 1:
            raise ValueError(f"TrainingConfig: augment={self.augment} must be None or lie in 0..1")

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
                f"TrainingConfig: prediction={self.prediction!r}; allowed with schedule {self.schedule}: "
                f"{', '.join(known)}"
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
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
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
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"TrainingConfig: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        cls.check_types(values)
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

    @classmethod
    def check_types(cls, values: dict) -> None:
        """Raises ValueError for a value of a JSON object that is of another type than the attribute of its name."""
        for attribute in dataclasses.fields(cls):
            kind, _, optional = attribute.type.partition(" | ")
            allowed, description = JSON_TYPES[kind]
            value = values.get(attribute.name)
            absent = optional and value is None and attribute.name not in SETTLED
            if attribute.name in values and not allowed(value) and not absent:
                raise ValueError(f"TrainingConfig: {attribute.name}={value!r} must be {description}")

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
