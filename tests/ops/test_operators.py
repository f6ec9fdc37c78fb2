"""Calls that go around the dispatcher, and those that somebody there must see."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import stage_batch
from msd_kernels import StageBatch, group_norm, grouped_conv2d
from msd_kernels.dispatch.layout_cache import LayoutCache
from msd_kernels.dispatch.operator import _observed


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    pass


def test_operators_plain_calls_go_around_the_dispatcher(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator)
    assert not _observed((x, None, torch.nn.Parameter(x)))
    with torch.inference_mode():
        assert not _observed((x,))


def test_operators_modes_see_forward_and_backward(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator, requires_grad=True)
    with Recorder() as recorder:
        group_norm(x, 2).sum().backward()
    ours = [name for name in recorder.names if name.startswith("msd_kernels::")]
    assert ours == ["msd_kernels::group_norm", "msd_kernels::group_norm_backward"]


def test_operators_the_profiler_sees_their_names(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        group_norm(x, 2).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"msd_kernels::group_norm", "msd_kernels::group_norm_backward"} <= names


def test_operators_read_lazily_negated_views_right(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    assert torch.equal(group_norm(lazy, 2), group_norm(-x, 2))


def test_operators_on_the_meta_device_only_allocate():
    y = group_norm(torch.empty(2, 4, 3, 3, device="meta"), 2)
    assert y.is_meta
    assert y.shape == (2, 4, 3, 3)


def test_operators_subclasses_go_through_the_dispatcher(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator)
    tagged = x.as_subclass(Tagged)
    assert _observed((tagged,))
    assert torch.equal(group_norm(tagged, 2), group_norm(x, 2))


def test_operators_repeated_calls_give_the_same_with_and_without_the_dispatcher(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator, requires_grad=True)
    dy = torch.randn(2, 4, 3, 3, generator=generator)
    y = group_norm(x, 2, activation="silu")
    (dx,) = torch.autograd.grad(y, x, dy)
    with Recorder():
        seen = group_norm(x, 2, activation="silu")
        (dx_seen,) = torch.autograd.grad(seen, x, dy)
    assert torch.equal(y, seen)
    assert torch.equal(dx, dx_seen)


def test_checked_calls_are_checked_once_per_layout(generator):
    seen = []

    def check(x, setting):
        seen.append((x.shape, setting))
        return (x.shape[0],)

    remembered = LayoutCache()
    x = torch.randn(2, 4, generator=generator)
    for tensor, setting in [(x, 1), (x + 1, 1), (x, 2), (x[:1], 1), (x.double(), 1), (x.t(), 1), (x, 1)]:
        found = remembered.find("op", partial(check, tensor, setting), (tensor,), (setting,))
        assert found == (tensor.shape[0],)
    assert seen == [((2, 4), 1), ((2, 4), 2), ((1, 4), 1), ((2, 4), 1), ((4, 2), 1)]


def test_checked_calls_are_not_remembered_where_they_fail_or_cannot_be_hashed(generator):
    x = torch.randn(2, 4, 3, 3, generator=generator)
    for _ in range(2):
        with pytest.raises(ValueError, match="num_groups=3 does not divide channels=4"):
            group_norm(x, 3)
        assert group_norm(x, [2]).shape == x.shape
        with pytest.raises(ValueError, match="num_groups must be one integer or one per stage"):
            group_norm(x, [2, 2])


def test_calls_with_errors_leave_others_alone(generator):
    """Each valid call comes before and after one that differs from it in a single thing and is wrong."""
    x = stage_batch(generator, (2, 1), (8, 4), 2, 2)
    weights = [torch.randn(o, c, 3, 3, generator=generator) for o, c in ((4, 8), (8, 4))]
    bias = [torch.zeros(4), torch.zeros(8)]
    good = grouped_conv2d(x, weights, bias).values
    one = weights[:1]
    wrong = [
        (TypeError, "bias of stage 0 must be torch.float32", {"bias": [b.double() for b in bias]}),
        (ValueError, "bias of stage 0", {"bias": bias[::-1]}),
        (ValueError, "residual must have", {"residual": x}),
        (ValueError, "resample must be", {"resample": "sideways"}),
        (TypeError, "sample_bias must be a StageBatch", {"sample_bias": x.values}),
        (ValueError, r"weight must hold one .* \(2\), got 1", {"bias": [torch.zeros(4)], "weight": one}),
    ]
    for kind, message, change in wrong:
        with pytest.raises(kind, match=message) as caught:
            grouped_conv2d(x, **{"weight": weights, "bias": bias} | change)
        assert caught.value.__context__ is None
        assert torch.equal(grouped_conv2d(x, weights, bias).values, good)


@pytest.mark.parametrize("pack", [lambda x: x, StageBatch.from_dense], ids=["dense", "stages"])
def test_groups_are_integers(pack, generator):
    x = pack(torch.randn(2, 8, 3, 3, generator=generator))
    for groups in (2, np.int64(2), [np.int64(2)] if isinstance(x, StageBatch) else 2):
        group_norm(x, groups)
    with pytest.raises(TypeError, match=r"num_groups must be one integer or one per stage, got 2\.0"):
        group_norm(x, 2.0)
    group_norm(x, 2)
