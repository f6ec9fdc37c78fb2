"""NaN, infinity and numbers whose squares overflow in the CUDA kernels, run on CPU tensors by the emulator."""

from __future__ import annotations

import math

import pytest
import torch
from special_value_checks import CASES, check

import cuda_emulator
from cuda_emulator import Device
from msd_kernels.dispatch.backends import use


@pytest.mark.parametrize(
    ("case", "special"),
    [
        ("group_norm of stages", (math.nan,)),
        ("group_norm without parameters", (math.inf, 2.0**126, -(2.0**83), 2.0**50)),
        ("group_norm in NHWC", (-(2.0**83),)),
        ("group_norm in NCHW", (-(2.0**83),)),
        ("resample2d of a dense tensor", (math.inf,)),
    ],
)
def test_special_values(case, special, emulated_cuda):
    emulated_cuda.use(Device())
    with cuda_emulator.served_by(emulated_cuda, CASES[case][0]), use("cuda"):
        check(case, torch.float32, special)
