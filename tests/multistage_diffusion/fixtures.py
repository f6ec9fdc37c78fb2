"""Access to the reference networks' recorded inputs, weights, outputs and gradients in tests/data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).resolve().parent.parent / "data"


@cache
def arrays(family: str) -> dict[str, np.ndarray]:
    """Everything in one fixture file."""
    with np.load(DATA / f"{family}.npz") as file:
        return dict(file)


def group(family: str, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, the prefix cut off."""
    found = {key[len(prefix) :]: value for key, value in arrays(family).items() if key.startswith(prefix)}
    return {
        key: torch.from_numpy(np.array(value)) for key, value in found.items() if value.dtype.kind in "fiu"
    }


def config(family: str, prefix: str = "") -> dict[str, object]:
    """The reference constructor's arguments."""
    return json.loads(str(arrays(family)[f"{prefix}cfg"]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the norm itself where ``expected`` vanishes."""
    difference = (actual.detach().double() - expected.double()).norm()
    norm = expected.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)
