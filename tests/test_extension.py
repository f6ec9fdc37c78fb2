"""The compiled modules: what they refuse, although the ops have checked their arguments before."""

from __future__ import annotations

import pytest
import torch

from helpers import unavailable
from msd_kernels import group_norm
from msd_kernels.layouts import GroupNormLayout, Resample2dLayout
from msd_kernels.runtime.extension import TYPE_CODES, addresses, compiled_layout, load

pytestmark = pytest.mark.skipif(bool(unavailable("cpu")), reason="the compiled kernels are not built")

NORM = GroupNormLayout((1, 2), (4, 2), (0, 0), (2, 1), 6, True, 1e-5, True)
RESAMPLE = Resample2dLayout((0.5, 0.5), False, 2, (1, 2), (2, 1), 4, 6, 2, 3, True)
X = torch.zeros(8)


def test_a_layout_is_compiled_once_per_types():
    kind = load("cpu").module.GroupNormLayout
    parameters = [X.bfloat16(), None, None, None]
    compiled = compiled_layout(kind, NORM, X.bfloat16(), *parameters)
    assert compiled_layout(kind, NORM, X[:1].bfloat16(), *parameters) is compiled
    assert compiled_layout(kind, NORM, X, *[None] * 4) is not compiled


@pytest.mark.parametrize(
    "changed",
    [
        {"channels": (4,)},
        {"groups": (2, 1, 1)},
        {"groups": (2, 0)},
        {"groups": (3, 1)},
        {"counts": (1, -1)},
        {"channels": (0, 2)},
        {"spatial": 0},
    ],
    ids=str,
)
def test_sizes_that_no_group_norm_has_are_refused(changed):
    with pytest.raises(ValueError, match="group_norm: needs"):
        compiled_layout(load("cpu").module.GroupNormLayout, NORM._replace(**changed), X, *[None] * 4)


@pytest.mark.parametrize(
    "changed",
    [{"taps": ()}, {"taps": (0.1,) * 9}, {"stride": 3}, {"stride": 0}, {"counts": (1,)}, {"out_width": 0}],
    ids=str,
)
def test_sizes_that_no_resampling_has_are_refused(changed):
    with pytest.raises(ValueError, match="resample2d: "):
        compiled_layout(load("cpu").module.Resample2dLayout, RESAMPLE._replace(**changed), X)


def test_types_that_kernels_do_not_take_are_refused():
    kernels = load("cpu").module
    with pytest.raises(ValueError, match="the kernels take float32, bfloat16 and float16"):
        compiled_layout(kernels.Resample2dLayout, RESAMPLE, X.double())
    with pytest.raises(ValueError, match="parameters are of the type of x or float32"):
        compiled_layout(kernels.GroupNormLayout, NORM, X.half(), X.bfloat16(), None, None, None)
    with pytest.raises(ValueError, match="optimal_denoiser: no such type of data"):
        kernels.optimal_denoiser_centre(1, 1, len(TYPE_CODES), 1.0, [0, 0], [0, 0])


def test_a_wrong_number_of_tensors_is_refused():
    kernels = load("cpu").module
    compiled = compiled_layout(kernels.Resample2dLayout, RESAMPLE, X)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        kernels.resample2d(compiled, addresses(X, X), addresses(X))


def test_a_tensor_whose_memory_was_given_back_is_refused():
    """Sharded training does so; the address of nothing means that a tensor is absent."""
    x, weight, nothing = torch.randn(2, 8, 4, 4), torch.ones(8), torch.empty(0)
    assert addresses(x, None, nothing) == [x.data_ptr(), 0, 0]
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[8\] has no memory"):
        group_norm(x, 2, weight)
