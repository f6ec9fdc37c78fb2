"""NaN, infinity and numbers whose squares overflow in the Triton kernels, run by the interpreter on CPU tensors."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import require_interpreter

require_interpreter()

from special_value_checks import check  # noqa: E402

from msd_kernels.dispatch.backends import use  # noqa: E402


@pytest.mark.parametrize(
    ("case", "special"),
    [
        ("group_norm of stages", (math.nan,)),
        ("group_norm without parameters", (-(2.0**83),)),
        ("attention of dense tensors", (-(2.0**83),)),
        ("resample2d of a dense tensor", (math.inf,)),
    ],
)
def test_special_values(case, special):
    with use("triton"):
        check(case, torch.float32, special)
