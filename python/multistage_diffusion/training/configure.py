"""The configuration of a run: a preset's, or an earlier run's, for the data at hand and with what is asked for."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from multistage_diffusion.data.augmentation import LABELS
from multistage_diffusion.data.images import LOADERS, ImageData
from multistage_diffusion.networks import FAMILIES, build, in_effect
from multistage_diffusion.noise.parsing import parse_stages
from multistage_diffusion.noise.schedules import SCHEDULES
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.presets import DEFAULT_PRESET, TRAINABLE, Preset
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.config import TrainingConfig, free_keys, stages_of

__all__ = ["FolderWarning", "configure", "run_settings", "saved_settings"]


class FolderWarning(UserWarning):
    """A file of a run folder that training does not need is lost or damaged; training goes on without it."""


def configure(data: ImageData, source: str, **options) -> TrainingConfig:
    """The configuration of a run on these data, see :func:`run_settings`."""
    return TrainingConfig(**run_settings(data, source, **options))


def run_settings(
    data: ImageData,
    source: str,
    *,
    preset: str | None = None,
    variant: str | None = None,
    saved: dict | None = None,
    network: Mapping[str, object] | None = None,
    class_conditional: bool = False,
    stages: Stages | str | None = None,
    kimg: float | None = None,
    **settings: object,
) -> dict[str, object]:
    """What ``TrainingConfig`` takes, for these data.

    Args:
        data: the images.
        source: where they come from, as ``load_images`` takes it.
        preset: the name of one of ``presets.TRAINABLE``; default: the settings of ``saved``, else that of the name
            of the data, such as ``"digits"``, else ``DEFAULT_PRESET``.
        variant: of the preset: ``"multistage"`` (default), ``"unified"`` or ``"separate"``.
        saved: the configuration of a run that goes on, as ``TrainingConfig.to_json`` has it.
        network: arguments of the network that replace the preset's.
        class_conditional: give the network the labels of the images.
        stages: the stages, or what ``parse_stages`` takes.
        kimg: the steps as thousands of images.
        **settings: other settings of ``TrainingConfig``.

    Raises:
        ValueError: a network without classes or images without labels, where they are asked for; a variant without
            preset; what ``parse_stages`` or the network does not take.
    """
    network = dict(network or {})
    if saved is not None and preset is None:
        if variant is not None:
            raise ValueError("variant: is that of a preset; give a preset, too")
        values = {**saved, **stages_of(saved)}
        network = in_effect(saved["network"]) | network
    else:
        own = source if source in LOADERS.keys() & TRAINABLE.keys() else DEFAULT_PRESET
        chosen = TRAINABLE[preset or own]
        values, network = _from_preset(chosen, variant or "multistage", data, network, stages, settings)
    if class_conditional:
        network["label_dim"] = _classes(source, data, network["family"])
    values |= settings
    values |= {"network": _complete(network), "data": _from_anywhere(source)}
    if stages is not None:
        schedule = values.get("schedule", "edm")
        values["stages"] = parse_stages(stages, schedule) if isinstance(stages, str) else stages
    if kimg is not None:
        values["steps"] = max(1, math.ceil(1000 * kimg / values["batch_size"]))
    return values


def saved_settings(directory: str | Path) -> dict | None:
    """What config.json of a run says, or its newest checkpoint where that file is lost or damaged; None if there is no
    run. What may not change between a run and its continuation is the checkpoint's."""
    path = Path(directory) / "config.json"
    newest = checkpoints.latest_config(path.parent / "checkpoints")
    if newest is not None:
        TrainingConfig.from_json(newest)  # raises what is wrong with it
    try:
        config = TrainingConfig.read(path)
    except FileNotFoundError:
        return newest
    except ValueError as error:
        instead = (
            "that of the newest checkpoint is taken"
            if newest
            else "there is no checkpoint to take another from"
        )
        warnings.warn(f"the configuration {path} is damaged: {error}; {instead}", FolderWarning, stacklevel=2)
        return newest
    saved = config.to_json()
    if newest and (differences := config.differences(newest)):
        text = (
            f"{path} is of another run than the checkpoints: {'; '.join(differences)}; "
            "the run goes on as the newest checkpoint says"
        )
        warnings.warn(text, FolderWarning, stacklevel=2)
        return {**newest, **{name: saved[name] for name in free_keys(newest)}}
    return saved


def _from_preset(
    preset: Preset,
    variant: str,
    data: ImageData,
    changes: Mapping[str, object],
    stages: object,
    settings: Mapping[str, object],
) -> tuple[dict, dict]:
    """Settings of the run and of the network, as a preset has them for these data."""
    values = preset.training_settings(variant)
    if stages is not None or settings.get("stage_sampling") in ("mixed", "systematic"):
        values.pop("stage_probabilities", None)  # those of the preset's own stages and sampling
        if values.pop("drawn_stages", None) is not None:
            values.pop("stage_sampling", None)
    if settings.get("schedule", preset.schedule) != preset.schedule:
        for name in ("prediction", *SCHEDULES[preset.schedule].settings):
            values.pop(name, None)
    if settings.get("values") == "latents":
        values.pop("augment", None)  # meant for images
    channels = {"in_channels": data.channels, "out_channels": data.channels}
    taken = inspect.signature(FAMILIES[preset.network["family"]]).parameters
    network = preset.config(variant, image_size=data.image_size, **changes)
    network |= {name: value for name, value in channels.items() if name in taken}
    if "augment_dim" in taken:
        augment = settings.get("augment", values.get("augment"))
        network["augment_dim"] = 0 if augment is None else len(LABELS)
    return values, network


def _classes(source: str, data: ImageData, family: str) -> int:
    able = [name for name, kind in FAMILIES.items() if "label_dim" in inspect.signature(kind).parameters]
    if family not in able:
        raise ValueError(f"class-conditional: {family} takes no classes; {', '.join(able)} do")
    if data.labels is None:
        raise ValueError(f"class-conditional: the images of {source} have no labels")
    return int(data.labels.max()) + 1


def _complete(network: dict) -> dict:
    """The network's configuration with every default filled in, so that a run does not depend on defaults."""
    with torch.device("meta"):
        return build(network).config


def _from_anywhere(source: str) -> str:
    """The data as any working directory names it, for a run that is resumed from another one."""
    return source if source in LOADERS else os.path.abspath(source)
