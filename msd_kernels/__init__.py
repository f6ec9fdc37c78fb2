"""Kernels for diffusion U-Nets whose decoders belong to stages: every sample through its own stage's weights.

The packed mixed-stage batch is :class:`StageBatch`; the ops take it or dense tensors. :func:`explain` says which
backend serves a call. Nothing in this package knows diffusion; ``multistage_diffusion`` does.
"""

from msd_kernels import nn
from msd_kernels.batch_invariance import batch_invariant
from msd_kernels.dispatch.backends import BackendError, Explanation, FallbackWarning
from msd_kernels.frozen import frozen_weights
from msd_kernels.ops import explain
from msd_kernels.ops.attention import attention
from msd_kernels.ops.group_norm import group_norm
from msd_kernels.ops.grouped_conv2d import grouped_conv2d
from msd_kernels.ops.grouped_linear import grouped_linear
from msd_kernels.ops.optimal_denoiser import optimal_denoiser
from msd_kernels.ops.resample2d import resample2d
from msd_kernels.stage_batch import StageBatch

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "FallbackWarning",
    "StageBatch",
    "attention",
    "batch_invariant",
    "explain",
    "frozen_weights",
    "group_norm",
    "grouped_conv2d",
    "grouped_linear",
    "nn",
    "optimal_denoiser",
    "resample2d",
]
