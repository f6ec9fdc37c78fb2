"""The tensors of a training run, into and out of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoints
from .checkpoint_schema import (
    FIELDS,
    Kind,
    check_fields,
    check_group,
    check_optimizer,
    check_optimizer_values,
    kinds,
    not_finite,
    optimizer_kinds,
    read_kinds,
)
from .stage_parameters import StageParameters

__all__ = ["TrainingState", "find_not_finite"]

FILES = ("network", "ema", "optimizer")


@dataclass
class TrainingState:
    """What a run goes on from: live objects, whose tensors a checkpoint holds.

    Attributes:
        network, ema: the network in training and the averaged one.
        parameters, optimizer: the optimizer, of one group, and what it was given.
    """

    network: nn.Module
    ema: nn.Module
    parameters: StageParameters
    optimizer: torch.optim.Optimizer

    def tensors(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        """The tensors of each file, and the optimizer's settings as JSON."""
        optimizer, settings = checkpoints.optimizer_tensors(self.parameters.names, self.optimizer)
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer,
        }, settings

    def check(self, path: Path, metadata: dict) -> None:
        """Raises CheckpointError for what no checkpoint.json of a run says; names the field."""
        files = [f"{name}.safetensors" for name in FILES]
        check_fields(metadata, FIELDS, files, path / checkpoints.METADATA, others=False)

    def read(self, path: Path, metadata: dict, highest_lr: float) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint, after they have been compared with the live ones; changes nothing.

        Args:
            metadata: its checkpoint.json, checked.
            highest_lr: of the run.

        Raises:
            CheckpointError: names a tensor or setting that does not fit.
        """
        own, average = kinds(self.network.state_dict()), kinds(self.ema.state_dict())
        return {
            "network": checkpoints.read_tensors(path, "network", own),
            "ema": checkpoints.read_tensors(path, "ema", _as_was_averaged(path, average, own)),
            "optimizer": self._read_optimizer(path, metadata, highest_lr),
        }

    def _read_optimizer(self, path: Path, metadata: dict, highest_lr: float) -> dict[str, torch.Tensor]:
        saved, file = metadata["optimizer"], path / "optimizer.safetensors"
        (live,) = self.optimizer.param_groups
        whole = dict(self.network.named_parameters())  # what optimizers of earlier versions were given
        names = (self.parameters.names, list(whole))
        check_group(saved, live, names, highest_lr, path / checkpoints.METADATA)
        (group,) = saved["param_groups"]
        parts = dict(zip(self.parameters.names, self.parameters, strict=True))
        known = parts if set(group["params"]) == set(parts) else whole
        check_optimizer(
            read_kinds(file), optimizer_kinds(known.items(), self.optimizer), saved.get("state"), file
        )
        tensors = checkpoints.read_tensors(path, "optimizer")
        check_optimizer_values(tensors, metadata["step"], file)
        return self.parameters.split_state(tensors)

    def load(self, tensors: dict[str, dict[str, torch.Tensor]], metadata: dict) -> None:
        """Takes on what ``read`` returned."""
        self.network.load_state_dict(tensors["network"])
        self.ema.load_state_dict(tensors["ema"])
        checkpoints.restore_optimizer(
            self.parameters.names, self.optimizer, tensors["optimizer"], metadata["optimizer"]
        )


def find_not_finite(tensors: dict[str, dict[str, torch.Tensor]]) -> tuple[str, str] | None:
    """How many of the tensors of a file hold NaN or Inf, such as "1 of 8 weights", and the first one's name."""
    for file, what in (
        ("network", "weights"),
        ("ema", "averaged weights"),
        ("optimizer", "tensors of the optimizer"),
    ):
        if bad := not_finite(tensors[file]):
            return f"{len(bad)} of {len(tensors[file])} {what}", bad[0]
    return None


def _as_was_averaged(path: Path, average: dict[str, Kind], own: dict[str, Kind]) -> dict[str, Kind]:
    """What is expected of averaged weights: those of 16-bit weights were kept in 16 bits by earlier versions."""
    found = read_kinds(path / "ema.safetensors")
    earlier = {name: own[name] for name in average if found.get(name) == own[name]}
    return {**average, **earlier}
