"""The contract of each op: docstring, checks, dispatcher registration, fake, backward, choice of backend."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from msd_kernels import batch_invariance
from msd_kernels.dispatch import autocast
from msd_kernels.dispatch.backends import Explanation
from msd_kernels.runtime import processor

NAMES = ("attention", "group_norm", "grouped_conv2d", "grouped_linear", "optimal_denoiser", "resample2d")
SLOW_IN_16_BITS = ("attention", "grouped_conv2d", "grouped_linear")  # on many processors


def explain(op: str, *args, **kwargs) -> Explanation:
    """Names the backend that would serve ``op(*args, **kwargs)`` and the reason why each other one would not.

    The arguments are checked as in the call itself, and nothing is computed::

        print(msd_kernels.explain("group_norm", x, 16, weight, bias, activation="silu"))

    Raises:
        ValueError: ``op`` is not an op of this library; and whatever the op's own checks raise.
    """
    if op not in NAMES:
        raise ValueError(f"explain: unknown op {op!r}; there are {', '.join(NAMES)}")
    module = import_module(f"msd_kernels.ops.{op}")
    explanation = module.explain(*args, **kwargs)
    notes = [explanation.why]
    if batch_invariance.active() and hasattr(getattr(module, op), "by_sample"):
        notes.append("called sample by sample inside of batch_invariant()")
    if explanation.backend == "library" and op in SLOW_IN_16_BITS:
        x = [*args, *kwargs.values()][0]
        device = x.device.type
        dtype = autocast.lower_precision_dtype(device) or x.dtype
        if device == "cpu":
            notes += filter(None, [processor.why_float32(dtype, op)])
    return replace(explanation, why="; ".join(notes))
