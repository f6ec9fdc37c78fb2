"""Checkpoints of runs, for other programs: see :mod:`multistage_diffusion.training.checkpoints`."""

from multistage_diffusion.training.checkpoints import (
    CheckpointError,
    CheckpointSaveError,
    CheckpointWarning,
    LoadedModel,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_model,
    read_metadata,
    read_tensors,
    save_checkpoint,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "CheckpointSaveError",
    "CheckpointWarning",
    "LoadedModel",
    "find_checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_model",
    "read_metadata",
    "read_tensors",
    "save_checkpoint",
    "write_tensors",
]
