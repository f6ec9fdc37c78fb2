"""How similar the optimal denoisers of different noise levels are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from msd_kernels import optimal_denoiser
from multistage_diffusion.common.checks import integer, one_of

THRESHOLD = 2 / 256

# A pass over the data serves at most this many noisy samples of so many bytes in all, of which about five copies are
# in use at a time; and it takes this much of the data at a time.
_MAX_QUERIES = 2048
_QUERY_BYTES = 128 << 20
_CHUNK_BYTES = 64 << 20
# At this noise level, relative to the range of the data, the optimal denoiser is the mean of the data.
_MEAN_SIGMA = 1e8
# Images whose values differ by less than this from the mean of the data, relative to its range, are that mean.
_NO_SPREAD = 1e-12


@dataclass(frozen=True)
class Similarity:
    """The similarity of all pairs of noise levels.

    Attributes:
        sigmas: ``[L]`` ascending noise levels.
        matrix: ``[L, L]``, symmetric, 1 on the diagonal.
        standard_error: ``[L, L]`` of each entry, from the spread over the samples; NaN for a single sample.
        restored: ``[L]`` share of the data's variance that the optimal denoiser restores, from 1 at low to 0
            at high noise: |D* - mean|² / |y - mean|². None where not known.
        scores: ``[S, L, L]`` of each sample, whose mean is ``matrix``. None where not known.
    """

    sigmas: Tensor
    matrix: Tensor
    standard_error: Tensor
    restored: Tensor | None = None
    scores: Tensor | None = None


def similarity_matrix(
    data: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    num_samples: int = 20,
    form: str = "x0",
    measure: str = "pixels",
    threshold: float = THRESHOLD,
    data_range: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Similarity:
    """Compares the optimal denoisers of noise levels on the same images with the same noise.

    Each sample is an image y of the data and noise eps, the same at all levels; x_a = y + sigma_a eps. Two
    levels agree, in the words of arXiv 2312.09181, by the share of values that differ by less
    than a threshold::

        S_ab = mean over samples and values of [ |f_a - f_b| < threshold ]

    where f_a = D*(x_a; sigma_a) for ``form="x0"``, or eps*_a = (x_a - D*(x_a; sigma_a)) / sigma_a for
    ``"eps"``. ``measure="smooth"`` has no threshold: S_ab is the mean of 1 / (1 + d²), with d the root mean
    square of f_a - f_b relative to the standard deviation of the data (x0), or to 1, that of the noise (eps).

    Args:
        data: ``[N, ...]``, uint8 or floating point, at least two different images; may be memory-mapped. All
            of it on every rank of ``group``: each rank works on its own part.
        sigmas: ``[L]`` ascending noise levels, in the units of ``data_range``.
        num_samples: images drawn, without repeats where N allows.
        threshold: as a share of the data range for x0, 2/256 in the paper (0.0078 for data in [0, 1], 0.0156
            in [-1, 1]); for eps in units of its standard deviation.
        data_range: what the values 0 and 255 of uint8 data stand for, and the range of floating-point data.
            The same sigma is half as much noise in [-1, 1], the convention of EDM and of this library, as in
            [0, 1].
        seed: of images and noise, drawn on the CPU: the result does not depend on devices and ranks.
        device: where the denoisers are computed.
        group: a process group to share the work with.
        progress: called as ``progress(done, total)`` after each chunk of the data.

    Memory: about 1 GiB besides the data, or what a single sample takes if that is more: 40 bytes for each of its
    values at each level.

    Raises:
        TypeError: a number of samples that is no integer.
        ValueError: sigmas that do not ascend, fewer than two images, images that are all the same or hold
            values that are not finite, an unknown form or measure, a threshold or a data range that is none, or
            samples that are all the mean of the data.
    """
    sigmas = checked_sigmas("similarity_matrix", sigmas)
    num_samples = integer("similarity_matrix", "num_samples", num_samples, 1)
    _check_options(form, measure, threshold)
    low, high = _checked_range(data_range)
    _check_data(data)
    images, noise = _draw(data, num_samples, (low, high), seed)
    passes = torch.arange(num_samples).split(_samples_per_pass(len(sigmas), images.shape[1]))
    shard = _shard(data, group)
    num_chunks = len(shard.split(_chunk_rows(shard)))
    width = high - low
    scores, restored, spread = [], [], []
    for number, samples in enumerate(passes):

        def tick(chunk: int, start: int = number * num_chunks) -> None:
            if progress is not None:
                progress(start + chunk, len(passes) * num_chunks)

        y, eps = images[samples], noise[samples]
        x = y + sigmas[:, None, None] * eps  # [L, S, D]
        D, mean = _denoise(x, sigmas, width, shard, (low, high), device, group, tick)
        f = D if form == "x0" else (x - D) / sigmas[:, None, None]
        restored.append((D - mean).square().sum(2))
        spread.append((y - mean).square().sum(1))
        scores.append(_compare(f, measure, threshold * width if form == "x0" else threshold))
    variance = torch.cat(spread).mean()
    if not variance > images.shape[1] * (_NO_SPREAD * width) ** 2:
        raise ValueError(
            f"similarity_matrix: the {num_samples} images drawn with seed={seed} are all the mean of the data, which "
            "every denoiser restores; draw more, or with another seed"
        )
    scores = torch.cat(scores)
    if measure == "smooth":
        scale = variance / images.shape[1] if form == "x0" else 1.0
        scores = 1 / (1 + scores / scale)
    restored = torch.cat(restored, dim=1).mean(1) / variance
    return Similarity(sigmas, scores.mean(0), standard_error(scores), restored, scores)


def checked_sigmas(user: str, sigmas: Sequence[float] | Tensor) -> Tensor:
    """Noise levels to compare, float64 ``[L]`` on the CPU; raises ValueError, in the name of ``user``, for what is
    none."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    rule = f"{user}: sigmas must be at least two, positive, finite and ascending"
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"{rule}, got shape {list(sigmas.shape)}")
    possible = sigmas.isfinite() & (sigmas > 0)
    if not bool(possible.all()):
        raise ValueError(f"{rule}, got {float(sigmas[~possible][0])}")
    rising = sigmas.diff() > 0
    if not bool(rising.all()):
        first = int((~rising).nonzero()[0])
        raise ValueError(
            f"{rule}, got {float(sigmas[first])} and then {float(sigmas[first + 1])} at {first} and {first + 1}"
        )
    return sigmas


def standard_error(scores: Tensor) -> Tensor:
    """That of the mean over the first dimension; NaN where it is 1."""
    if len(scores) == 1:
        return torch.full_like(scores[0], torch.nan)
    return scores.std(0) / len(scores) ** 0.5


def _check_options(form: str, measure: str, threshold: float) -> None:
    one_of("similarity_matrix", "form", form, ("x0", "eps"))
    one_of("similarity_matrix", "measure", measure, ("pixels", "smooth"))
    if not 0 < threshold < math.inf:
        raise ValueError(f"similarity_matrix: threshold={threshold} must be positive and finite")


def _checked_range(data_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(float, data_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"similarity_matrix: data_range must be two finite numbers (low, high) with low < high, got {data_range!r}"
        )
    return low, high


def _check_data(data: Tensor) -> None:
    if data.dim() < 2 or data.shape[0] < 2:
        raise ValueError(
            f"similarity_matrix: data must hold at least two images, got shape {list(data.shape)}"
        )
    chunks = data.split(_chunk_rows(data))
    for number, chunk in enumerate(chunks if data.is_floating_point() else ()):
        bad = (~chunk.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            image = number * len(chunks[0]) + int(bad[0])
            raise ValueError(f"similarity_matrix: image {image} holds a value that is NaN or infinite")
    if not any(bool((chunk != data[:1]).any()) for chunk in chunks):
        raise ValueError(
            "similarity_matrix: all images are the same, and so is the denoiser at all noise levels"
        )


def _samples_per_pass(levels: int, dim: int) -> int:
    """Images whose noisy samples at all levels a pass over the data serves."""
    return max(1, min(_MAX_QUERIES // levels, _QUERY_BYTES // (8 * levels * dim)))


def _draw(
    data: Tensor, num_samples: int, data_range: tuple[float, float], seed: int
) -> tuple[Tensor, Tensor]:
    """Images and noise ``[S, D]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.shape[0], generator=generator)
    images = (
        data[order.repeat(-(-num_samples // len(order)))[:num_samples]].flatten(1).to("cpu", torch.float64)
    )
    if data.dtype == torch.uint8:
        low, high = data_range
        images = low + (high - low) / 255 * images
    return images, torch.randn(images.shape, dtype=torch.float64, generator=generator)


def _shard(data: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of the data."""
    if group is None:
        return data
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if data.shape[0] < ranks:
        raise ValueError(
            f"similarity_matrix: {data.shape[0]} images cannot be shared among {ranks} processes"
        )
    return data[data.shape[0] * rank // ranks : data.shape[0] * (rank + 1) // ranks]


def _chunk_rows(data: Tensor) -> int:
    return max(1, _CHUNK_BYTES // max(1, data[0].numel() * data.element_size()))


def _denoise(x, sigmas, width, data, data_range, device, group, tick) -> tuple[Tensor, Tensor]:
    """D* of ``x [L, S, D]``, and the mean of the data ``[D]``, in one pass."""
    levels, samples, dim = x.shape
    queries = torch.cat([x.reshape(-1, dim), x[0, :1]]).to(device)
    noise_levels = torch.cat(
        [sigmas.repeat_interleave(samples), sigmas.new_tensor([_MEAN_SIGMA * width])]
    ).to(device)

    def chunks() -> Iterator[Tensor]:
        for number, chunk in enumerate(data.split(_chunk_rows(data)), start=1):
            yield chunk.flatten(1)
            tick(number)

    D = optimal_denoiser(queries, noise_levels, chunks(), data_range=data_range, group=group).cpu()
    return D[:-1].view(levels, samples, dim), D[-1]


def _compare(f: Tensor, measure: str, threshold: float) -> Tensor:
    """For each sample of ``f [L, S, D]`` all pairs of levels, ``[S, L, L]``: the share of values that differ
    by less than the threshold, or the mean square of the differences."""
    levels, samples, _ = f.shape
    result = f.new_empty(samples, levels, levels)
    for level in range(levels):
        difference = f[level:] - f[level]
        values = difference.abs_() < threshold if measure == "pixels" else difference.square_()
        row = values.mean(2, dtype=f.dtype).T
        result[:, level, level:] = result[:, level:, level] = row
    return result
