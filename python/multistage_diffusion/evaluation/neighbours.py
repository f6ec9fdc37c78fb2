"""What nearest neighbours in feature space say: improved precision and recall, and copies of training images.

Distances are computed in float64 from products of matrices, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Values of a block of distances, in float64: 32 MiB.
BLOCK = 1 << 22


def radii(features: Tensor, k: int = 3) -> Tensor:
    """``[N]`` squared distances of each of ``[N, D]`` features to its k-th nearest other one."""
    found = []
    for start, distances in _blocks(*_centred(features, features)):
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def precision(features: Tensor, reference: Tensor, reference_radii: Tensor) -> Tensor:
    """Which of ``[N, D]`` features lie within the radius of some of ``[M, D]`` reference features: ``[N]`` booleans.

    Their share is the improved precision of Kynkäänniemi et al. (arXiv 1904.06991): of samples that look like data. A
    distance that equals a radius to rounding counts as within.
    """
    a, b = _centred(features, reference)
    largest = max(float(t.square().sum(1).max()) for t in (a, b))
    within = reference_radii + 16 * torch.finfo(torch.float64).eps * largest  # what rounding may add
    inside = [(d <= within).any(1) for _, d in _blocks(a, b)]
    return torch.cat(inside)


def recall(features: Tensor, reference: Tensor, k: int = 3) -> Tensor:
    """Which of the reference features lie within the radius of some of the others: ``[M]`` booleans.

    Their share is the improved recall: of the data that the samples cover.
    """
    return precision(reference, features, radii(features, k))


class Nearest(NamedTuple):
    """For each query, the index of the nearest element of another set, and its squared distance."""

    index: Tensor
    distance: Tensor


def nearest(features: Tensor, reference: Tensor) -> Nearest:
    """The nearest of ``[M, D]`` reference features to each of ``[N, D]`` features."""
    minima = [d.min(1) for _, d in _blocks(*_centred(features, reference))]
    return Nearest(torch.cat([m.indices for m in minima]), torch.cat([m.values for m in minima]))


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, about the mean of ``b``, where products lose the least."""
    center = b.double().mean(0)
    return a.double() - center, b.double() - center


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first index and the squared distances ``[n, M]`` to all of ``b`` of some elements of ``a``, in turn."""
    norms = b.square().sum(1)
    start = 0
    for rows in a.split(max(1, BLOCK // len(b))):
        distances = torch.addmm(norms + rows.square().sum(1, keepdim=True), rows, b.T, alpha=-2).clamp_(min=0)
        yield start, distances
        start += len(rows)
