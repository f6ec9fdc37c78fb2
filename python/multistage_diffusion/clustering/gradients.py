"""Similarity of noise levels by the gradients of a trained model: the alternative that needs no optimal
denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from multistage_diffusion.clustering.similarity import Similarity, checked_sigmas, standard_error
from multistage_diffusion.common.checks import integer


def gradient_similarity(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    parameters: Iterable[Tensor],
    images: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    repeats: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Similarity:
    """The cosine between the loss gradients of noise levels, for the same images with the same noise.

    With x_a = y + sigma_a eps and g_a the gradient of the mean of |denoiser(x_a, sigma_a) - y|²::

        S_ab = g_a·g_b / (|g_a| |g_b|)

    averaged over repeats with new noise, whose spread gives the standard errors. A weight of the loss that
    depends on sigma only drops out. (arXiv 2312.09181, appendix: clustering by gradients.)

    Args:
        denoiser: D(x, sigma) with ``x [B, ...]`` and ``sigma [B]``, such as an ``EDMPreconditioner`` of a
            unified model.
        parameters: what the gradients are taken of. ``L`` gradients are held in memory at a time.
        images: ``[B, ...]`` clean images in the denoiser's range, on its device.
        sigmas: ``[L]`` ascending noise levels, at least two.
        repeats: how often new noise is drawn; a single time tells no standard errors (NaN).
        seed: of the noise, drawn on the CPU.
        progress: called as ``progress(done, total)`` after each gradient.

    Raises:
        TypeError: images that are not floating point, or a repeat count that is no integer.
        ValueError: no parameters that require a gradient, sigmas that do not ascend, a repeat count below 1, or
            gradients that are zero.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("gradient_similarity: needs parameters that require a gradient, got none")
    if not images.is_floating_point():
        raise TypeError(f"gradient_similarity: images must be floating point, got {images.dtype}")
    repeats = integer("gradient_similarity", "repeats", repeats, 1)
    sigmas = checked_sigmas("gradient_similarity", sigmas)
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for repeat in range(repeats):
        noise = torch.randn(images.shape, generator=generator).to(images)
        gradients = []
        for level, sigma in enumerate(sigmas.tolist()):
            gradients.append(_loss_gradient(denoiser, parameters, images, noise, sigma))
            if progress is not None:
                progress(repeat * len(sigmas) + level + 1, repeats * len(sigmas))
        directions = torch.stack(gradients)
        norms = directions.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            raise ValueError("gradient_similarity: a gradient is zero or NaN, so that it has no direction")
        directions /= norms
        cosines.append((directions @ directions.T).double().cpu())
    scores = torch.stack(cosines)
    return Similarity(sigmas, scores.mean(0), standard_error(scores), scores=scores)


def _loss_gradient(denoiser, parameters: list[Tensor], images: Tensor, noise: Tensor, sigma: float) -> Tensor:
    levels = torch.full((len(images),), sigma, dtype=torch.float64)
    D = denoiser(images + sigma * noise, levels)
    gradients = torch.autograd.grad((D - images).square().mean(), parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])
