"""A folder of samples, one PNG each, which a run that was stopped or killed goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from multistage_diffusion.common.atomic_files import make_folder, replacing

__all__ = ["SampleFolder"]

DESCRIPTION, LABELS = "samples.json", "dataset.json"
UNFINISHED = ".unfinished-"


def found_in(path: Path, resume: bool) -> dict | None:
    """The description of the samples in a folder that are to be gone on with; None for a new or empty folder.

    Raises:
        ValueError: the folder cannot be used, or holds nothing to go on with.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path}: is a file, and a folder is asked for")
    try:
        found = json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError):
        found = None
    if resume and not isinstance(found, dict):
        raise ValueError(f"--resume: {path} holds no samples to go on with")
    if not resume and path.is_dir() and any(path.iterdir()):
        way = "name" if found is None else "add --resume to go on with its samples, or name"
        raise ValueError(f"--out {path}: is not empty; {way} another folder")
    return found


class SampleFolder:
    """Where images go, named by their seeds; ``samples.json`` says what they are samples of.

    Args:
        path: a folder that is not there yet or empty, or with ``resume`` one that this class has begun.
        description: of the samples, in JSON's types; what goes on must have the same.
        resume: go on with what is there.

    Raises:
        ValueError: the folder holds something else, or samples of another description; or nothing to go on with.
    """

    def __init__(self, path: Path, description: dict, *, resume: bool = False) -> None:
        self.path = path
        found = found_in(path, resume)
        if found is not None:
            self._require_same(found, description)
        make_folder(path)
        with replacing(path / DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(description, indent=2) + "\n")

    def remove_unfinished(self) -> None:
        """Removes what a killed run was writing."""
        for leftover in self.path.glob(f"{UNFINISHED}*"):
            leftover.unlink()

    def has(self, seeds: Sequence[int]) -> bool:
        """Whether the images of all seeds are there."""
        return all(self._file(seed).is_file() for seed in seeds)

    def write(self, images: Tensor, seeds: Sequence[int]) -> None:
        """Writes images ``[N, H, W, C]`` of eight bits; each is there as a whole or not at all."""
        for image, seed in zip(images.numpy(), seeds, strict=True):
            temporary = self.path / f"{UNFINISHED}{os.getpid()}-{seed}"
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="png")
            os.replace(temporary, self._file(seed))

    def write_labels(self, seeds: Sequence[int], labels: Sequence[int]) -> None:
        """Writes the class of each image, as in the archives of EDM's data sets."""
        entries = [[self._file(seed).name, label] for seed, label in zip(seeds, labels, strict=True)]
        with replacing(self.path / LABELS) as temporary:
            temporary.write_text(json.dumps({"labels": entries}) + "\n")

    def _file(self, seed: int) -> Path:
        return self.path / f"{seed:08}.png"

    def _require_same(self, found: dict, description: dict) -> None:
        wanted = json.loads(json.dumps(description))
        for name in {**wanted, **found}:
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"--resume: the samples in {self.path} have {name} {found.get(name)!r}, got {wanted.get(name)!r}"
                )
