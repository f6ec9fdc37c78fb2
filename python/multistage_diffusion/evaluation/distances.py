"""Distances of two sets of features: between the Gaussians fitted to them, and with a kernel."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multistage_diffusion.common.atomic_files import replacing

# Values of a block of a kernel matrix, in float64: 32 MiB.
BLOCK = 1 << 22


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, in float64.

    Attributes:
        mean: ``[D]``.
        covariance: ``[D, D]``, divided by N - 1.
        count: N, or None for a file that does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @staticmethod
    def of(features: Tensor) -> Statistics:
        """Of ``[N, D]`` features, N at least 2.

        Raises:
            ValueError: their squares overflow float64.
        """
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        covariance = centred.T @ centred / (len(features) - 1)
        if not math.isfinite(float(mean.square().sum() + covariance.abs().sum())):
            raise ValueError("Statistics: the features are too large, their squares overflow float64")
        return Statistics(mean, covariance, len(features))

    def save(self, path: str | PathLike) -> None:
        """Writes an ``.npz`` file as pytorch-fid does, with ``mu`` and ``sigma``, and N as ``count``."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(path: str | PathLike) -> Statistics:
        """Reads what :meth:`save` or pytorch-fid wrote.

        Raises:
            ValueError: the file cannot be read, holds something else, or values that are no mean and covariance.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (
                    torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in ("mu", "sigma")
                )
                count = int(file["count"]) if "count" in file.files else None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            AttributeError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(
                f"Statistics: {path} must be an .npz file with mu [D] and sigma [D, D], as of pytorch-fid: {error}"
            ) from error
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"Statistics: {path} must hold mu [D] and sigma [D, D], got {list(mean.shape)} and "
                f"{list(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"Statistics: {path} holds values that are NaN or infinite")
        return Statistics(mean, covariance, count)

    @cached_property
    def root(self) -> Tensor:
        """``[D, R]`` with ``root @ root.T`` the covariance of rank R; eigenvalues lost in rounding are left out."""
        values, vectors = torch.linalg.eigh(self.covariance)
        rounding = torch.finfo(values.dtype).eps * len(values) * values[-1].abs()
        kept = values > rounding
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians (FID, Heusel et al., arXiv 1706.08500).

        |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)

    The trace of the last term is the sum of the singular values of ``root_aᵀ root_b``, so singular covariances (fewer
    images than features, features that never vary) are no trouble.

    Returns:
        The distance in squared units of the features, never negative.

    Raises:
        ValueError: other numbers of features.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"frechet_distance: {len(a.mean)} and {len(b.mean)} features cannot be compared")
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(squared))


class KernelDistance(NamedTuple):
    """KID and its standard error."""

    value: float
    error: float


def kernel_distance(a: Tensor, b: Tensor) -> KernelDistance:
    """The unbiased squared maximum mean discrepancy with the kernel ``(x·y / D + 1)³`` (KID, Bińkowski et al., arXiv
    1801.01401), of all pairs.

    Its standard error is that of a two-sample U-statistic, to first order: with ``u_i`` the mean kernel of the i-th
    element of ``a`` with the others of ``a`` less that with ``b``, its share is ``4 var(u) / N``, and so for ``b``.

    Args:
        a, b: ``[N, D]`` and ``[M, D]`` features, N and M at least 2.

    Returns:
        The value, which may be negative, and its standard error.
    """
    a, b = a.double(), b.double()
    within_a, within_b, (across_a, across_b) = _row_means(a), _row_means(b), _cross_means(a, b)
    value = within_a.mean() + within_b.mean() - 2 * across_a.mean()
    parts = ((within_a - across_a), (within_b - across_b))
    variance = sum(4 * part.var() / len(part) for part in parts)
    return KernelDistance(float(value), float(variance) ** 0.5)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _row_means(a: Tensor) -> Tensor:
    """``[N]``: of the kernel of each element with all others."""
    own = (a.square().sum(1) / a.shape[1] + 1) ** 3
    rows = max(1, BLOCK // len(a))
    sums = torch.cat([_kernel(block, a).sum(1) for block in a.split(rows)])
    return (sums - own) / (len(a) - 1)


def _cross_means(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``[N]`` and ``[M]``: of the kernel of each element of one set with all of the other."""
    of_a, of_b = [], torch.zeros(len(b), dtype=b.dtype)
    for block in a.split(max(1, BLOCK // len(b))):
        kernel = _kernel(block, b)
        of_a.append(kernel.mean(1))
        of_b += kernel.sum(0)
    return torch.cat(of_a), of_b / len(a)
