"""How the networks of reference checkpoints become denoisers: what a file says of it, and what its family has.

EDM's snapshots hold the preconditioner around the network, with its constants; latent diffusion's checkpoints hold the
betas of all steps; score SDE's and U-ViT's hold neither. The constructor's arguments may name the stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multistage_diffusion.common.checks import is_number
from multistage_diffusion.noise.preconditioning import (
    PRECONDITIONINGS,
    Preconditioner,
    as_json,
    constants_of,
    denoiser_of,
    differences,
    precondition,
    require_known,
    stages_in_sigma,
)
from multistage_diffusion.noise.schedules import DiscreteSchedule, Schedule
from multistage_diffusion.noise.stages import Stages, StagesError
from multistage_diffusion.official.pickles import Record
from multistage_diffusion.presets import PRESETS, Preset

__all__ = [
    "KeptDenoiser",
    "ReferenceCheckpoint",
    "denoiser",
    "of_betas",
    "of_record",
    "published_by",
    "schedule_name",
]

# EDM's classes: which schedule they are, and the attributes that are constants.
CLASSES = {
    "EDMPrecond": ("edm", ("sigma_data", "sigma_min", "sigma_max")),
    "VPPrecond": ("vp", ("beta_d", "beta_min", "M", "epsilon_t")),
    "VEPrecond": ("ve", ("sigma_min", "sigma_max")),
    "iDDPMPrecond": ("iddpm", ("C_1", "C_2", "M")),
}
# Where they have other values than the schedules here.
CLASS_DEFAULTS = {"VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0}}
LARGEST = 1 << 63
# float32 keeps this of betas that were computed in float64.
BETAS_AGREE = 1e-6


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What a file of the reference holds.

    Attributes:
        tensors: the chosen weights under the reference's names.
        config: the constructor's arguments, where the file has them.
        weights: which weights they are: averaged, raw, or the only ones of the file.
        preconditioner: schedule and constants of the denoiser, where the file has them, as ``precondition`` takes them.
        unknown_preconditioner: what the file has instead that is not known here, in words.
    """

    tensors: dict[str, Tensor]
    config: dict[str, object] | None
    weights: str
    preconditioner: dict[str, object] | None = None
    unknown_preconditioner: str | None = None


@dataclass(frozen=True)
class KeptDenoiser:
    """What a conversion keeps besides the weights.

    Attributes:
        denoiser: D(x; sigma) around the network; None where file and options do not say enough.
        summary: what was kept, and whence it is known, or what is missing.
    """

    denoiser: Preconditioner | None
    summary: str


def of_record(record: Record) -> dict[str, object] | None:
    """Schedule and constants of a preconditioner that EDM has pickled; None for a class that is not known.

    Raises:
        ValueError: a constant is no number.
    """
    if record.class_name not in CLASSES:
        return None
    schedule, names = CLASSES[record.class_name]
    given = {**CLASS_DEFAULTS.get(record.class_name, {}), **record.entries("_init_kwargs"), **record.state}
    found = {name: given[name] for name in names if name in given}
    for name, value in found.items():
        if not is_number(value) or not -LARGEST < value <= math.inf:
            raise ValueError(f"the preconditioner's {name} is no number")
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"the preconditioner's {name} is a huge number")
    return {"schedule": schedule, **found, **_usual_prediction(schedule)}


def _usual_prediction(schedule: str) -> dict[str, str]:
    """That of the reference's networks; nothing where it is no constant of the denoiser."""
    return {"prediction": "epsilon"} if "prediction" in constants_of(schedule) else {}


def of_betas(betas: Tensor) -> dict[str, object] | None:
    """Schedule and constants that latent diffusion's ``betas`` stand for; None where they stand for none."""
    is_list = isinstance(betas, Tensor) and betas.dim() == 1 and len(betas) > 1 and betas.is_floating_point()
    if not is_list or not bool(((betas > 0) & (betas < 1)).all()):
        return None
    # The shortest decimals that are these float32 values, as people write them.
    start, end = (float(str(betas[i].float().numpy())) for i in (0, -1))
    even = torch.linspace(math.sqrt(start), math.sqrt(end), len(betas), dtype=torch.float64).square()
    if start <= end < 1 and torch.allclose(betas.double(), even, rtol=BETAS_AGREE, atol=0):
        return {"schedule": "ldm", "linear_start": start, "linear_end": end, "num_steps": len(betas)}
    return {"schedule": "ldm", "betas": tuple(betas.double().tolist())}


def denoiser(
    network: nn.Module,
    checkpoint: ReferenceCheckpoint,
    config: Mapping[str, object] | None = None,
    preset: Preset | None = None,
    asked: Mapping[str, object] | None = None,
    stages: Stages | None = None,
) -> KeptDenoiser:
    """D(x; sigma) around a converted network, and in words how it is known.

    Schedule and constants are the file's, where it has them, else ``asked``, else those of the preset or the family's
    published model. Stages are ``stages``, else those of the constructor's arguments, else the published ones.

    Args:
        network: what ``convert.network_of`` made of the checkpoint, or a multi-stage network that starts from that.
        checkpoint: what ``convert.read`` gave.
        config: the reference constructor's arguments, which may name constants and stages; default: those in the file.
        preset: the published configuration of the network, in place of ``config``.
        asked: ``{"schedule": name, **constants}``, as ``precondition`` takes them.
        stages: in sigma or in the schedule's variable.

    Raises:
        ValueError: ``asked`` contradicts the file, or constants or stages do not fit.
    """
    said, unknown = checkpoint.preconditioner, checkpoint.unknown_preconditioner
    config = {} if preset else config or checkpoint.config or {}
    if said and asked and (wrong := differences(as_json(said), as_json(asked))):
        raise ValueError(f"convert: --preconditioning contradicts the file: {'; '.join(wrong)}")
    if not said and not asked and unknown is not None:
        return KeptDenoiser(
            None,
            f"not kept: the file has {unknown}, which is not known here; give --preconditioning if you know what it "
            "computes",
        )
    published = preset or published_by(network.family)
    name = schedule_name(said, asked, published)
    constants = _of_config(name, config) | {**(said or {}), **(asked or {})}
    constants.pop("schedule", None)
    require_known("convert", name, constants)
    usual = ", but for the prediction, which is the usual one"
    known = _usual_prediction(name).keys() <= constants.keys()
    source = (
        f"as the file says{'' if known else usual}"
        if said
        else "as asked"
        if asked
        else "the family's default"
    )
    schedule = _schedule(name, constants)
    cut, cut_by = _stages(network, config, schedule, published, stages)
    if cut is None:
        return KeptDenoiser(
            None, f"not kept: nothing says where its {network.num_stages} stages are cut; give --stages"
        )
    made = precondition(network, cut, name, **constants)
    return KeptDenoiser(made, f"{_shown(made)}, {source}; {made.stages!r}, {cut_by}")


def published_by(family: str) -> Preset:
    """The family's published model, the first of several."""
    return next(preset for preset in PRESETS.values() if preset.network["family"] == family)


def schedule_name(
    said: Mapping[str, object] | None, asked: Mapping[str, object] | None, published: Preset
) -> str:
    """The schedule of a converted network: the file's, else the caller's, else the published one."""
    return (said or asked or {"schedule": published.schedule})["schedule"]


def _schedule(name: str, constants: Mapping[str, object]) -> Schedule:
    """The schedule with its constants; EDM's are the preconditioner's."""
    try:
        return denoiser_of(name).schedule_with(PRECONDITIONINGS[name], constants)
    except TypeError as error:
        raise ValueError(f"convert: a constant of {name} is of another type: {error}") from error


def _of_config(name: str, config: Mapping[str, object]) -> dict[str, object]:
    """Constants among the constructor's arguments, as score SDE has them."""
    names = {"vp": ("beta_min", "beta_max"), "ve": ("sigma_min", "sigma_max")}.get(name, ())
    low, high = (config.get(key) for key in names) if names else (None, None)
    if not all(isinstance(value, int | float) for value in (low, high)):
        return {}
    return {"beta_min": low, "beta_d": high - low} if name == "vp" else {"sigma_min": low, "sigma_max": high}


def _stages(
    network: nn.Module,
    config: Mapping[str, object],
    schedule: Schedule,
    published: Preset,
    given: Stages | None,
) -> tuple[Stages | None, str]:
    """The stages in sigma and who says so; None where nobody does."""
    count = network.num_stages
    if given is not None:
        if len(given) != count:
            raise ValueError(
                f"convert: --stages names {len(given)} stages, the network has {count}: {given!r}"
            )
        return stages_in_sigma(given, schedule), "as asked"
    if count == 1:
        return Stages.single(), "the only stage"
    interval = config.get("stage_interval")
    if (
        interval is not None and len(interval) != 1
    ):  # one: of a unified network that a multi-stage one starts from
        found = _of_interval(interval, network.family, schedule)
        return found, "as its arguments say" if found is not None else ""
    if count == len(published.stages()) and _same_levels(schedule, published):
        return stages_in_sigma(published.stages(), schedule), "the published ones"
    return None, ""


def _same_levels(schedule: Schedule, published: Preset) -> bool:
    """Whether the published cuts are the same noise levels in this schedule as in the published one."""
    usual, cuts = PRECONDITIONINGS[published.schedule](), published.boundaries[1:-1]
    alike = (schedule.name, schedule.domain) == (usual.name, usual.domain)
    return alike and torch.equal(schedule.sigma(cuts), usual.sigma(cuts))


def _of_interval(interval: object, family: str, schedule: Schedule) -> Stages | None:
    """The stages in sigma of the reference's argument; None where it is in another variable than the schedule.

    EDM names sigma, score SDE and U-ViT times, latent diffusion the first step of every following stage, and the number
    of steps.
    """
    variable = PRECONDITIONINGS[published_by(family).schedule].variable
    if variable != schedule.variable:
        return None
    try:
        if isinstance(interval, str):
            interval = json.loads(interval.replace("inf", "Infinity"))
        if isinstance(schedule, DiscreteSchedule):
            cuts = [float(schedule.sigma(int(first) - 1)) for first in interval[:-1]]
            return Stages.from_boundaries([0.0, *cuts, math.inf])
        return stages_in_sigma(Stages(interval, variable), schedule)
    except (StagesError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"convert: stage_interval does not cut the noise levels into stages ({error}); give --stages"
        ) from error


def _shown(made: Preconditioner) -> str:
    constants = {name: value for name, value in made.constants().items() if value is not None}
    schedule, betas = constants.pop("schedule"), constants.pop("betas", None)
    if betas is not None:
        constants = {"betas": f"{len(betas)} of its own", "prediction": constants["prediction"]}
    return f"{schedule} ({', '.join(f'{name}={value}' for name, value in constants.items())})"
