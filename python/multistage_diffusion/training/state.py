"""The tensors of a training run, into and out of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from multistage_diffusion.networks.layers import PerStage
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.checkpoint_schema import (
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

__all__ = ["TrainingState", "find_not_finite"]

FILES = ("network", "ema", "optimizer")


@dataclass
class TrainingState:
    """What a run goes on from: live objects, whose tensors a checkpoint holds.

    Attributes:
        network, ema: the network in training and the averaged one.
        optimizer: of the network's parameters, in one group.
    """

    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def tensors(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        """The tensors of each file, and the optimizer's settings as JSON."""
        optimizer, settings = checkpoints.optimizer_tensors(list(self._parameters), self.optimizer)
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
        own, found, together = self._parameters, read_kinds(file), _stages_together(self.network)
        flat, whole = _vectors(own, together, joined=False), _vectors(own, together, joined=True)
        check_group(saved, live, (list(own), list(whole)), highest_lr, path / checkpoints.METADATA)
        (group,) = saved["param_groups"]
        per_stage = flat if _are_vectors(found, flat) else own
        known = per_stage if set(group["params"]) == set(own) else whole
        check_optimizer(found, optimizer_kinds(known.items(), self.optimizer), saved.get("state"), file)
        tensors = checkpoints.read_tensors(path, "optimizer")
        check_optimizer_values(tensors, metadata["step"], file)
        if known is whole:
            tensors = _split(tensors, own, together)
        return tensors if known is own else _in_own_shapes(tensors, own)

    def load(self, tensors: dict[str, dict[str, torch.Tensor]], metadata: dict) -> None:
        """Takes on what ``read`` returned."""
        self.network.load_state_dict(tensors["network"])
        self.ema.load_state_dict(tensors["ema"])
        checkpoints.restore_optimizer(
            list(self._parameters), self.optimizer, tensors["optimizer"], metadata["optimizer"]
        )


# Earlier versions gave optimizers vectors: each stage's part of a layer's weights, and before that those of all stages
# together. A convolution's weight lay in it as [O, kh, kw, I].


def _stages_together(network: nn.Module) -> dict[str, list[str]]:
    """The parameters of each stage by the name that they had together."""
    return {
        prefix: [name for name, _ in module.named_parameters(prefix)]
        for prefix, module in network.named_modules()
        if isinstance(module, PerStage) and module.trained
    }


def _vectors(
    parameters: dict[str, torch.Tensor], together: dict[str, list[str]], *, joined: bool
) -> dict[str, torch.Tensor]:
    """What stands for the parameters of earlier versions, of their names and sizes; it takes no memory."""
    groups = {name: prefix if joined else name for prefix, names in together.items() for name in names}
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        group = groups.get(name)
        if group is None:
            found[name] = parameter
        else:
            size = parameter.numel() + (found[group].numel() if group in found else 0)
            found[group] = parameter.detach().reshape(-1)[:1].expand(size)
    return found


def _are_vectors(found: dict[str, Kind], vectors: dict[str, torch.Tensor]) -> bool:
    """Whether a state is that of these vectors, and not of parameters in their own shapes."""
    shapes = {name.rpartition(".")[0]: kind.shape for name, kind in found.items() if kind.shape}
    return all(
        len(shape) == 1 for name, shape in shapes.items() if name in vectors and vectors[name].dim() == 1
    )


def _split(
    tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor], together: dict[str, list[str]]
) -> dict[str, torch.Tensor]:
    """The state of vectors over all stages as that of one vector per stage."""
    split = {}
    for full_name, value in tensors.items():
        name, _, entry = full_name.rpartition(".")
        parts = together.get(name, [name])
        values = (
            value.split([own[part].numel() for part in parts]) if value.dim() and name in together else None
        )
        for i, part in enumerate(parts):
            split[f"{part}.{entry}"] = value if values is None else values[i]
    return split


def _in_own_shapes(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of vectors as that of parameters in PyTorch's own shapes."""
    return {name: _shaped(value, own[name.rpartition(".")[0]].shape) for name, value in tensors.items()}


def _shaped(vector: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if vector.dim() != 1 or len(shape) < 2:
        return vector
    if len(shape) == 4:
        out_channels, in_channels, height, width = shape
        return vector.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2).contiguous()
    return vector.view(shape)


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
