"""What is kept of weights inside of ``frozen_weights()``, and what ends it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msd_kernels import StageBatch, frozen, frozen_weights, grouped_conv2d
from msd_kernels.dispatch import stage_weights
from multistage_diffusion.networks.layers import StageConv2d

COUNTS, CHANNELS = (1, 0, 2), (8, 4, 8)


@pytest.fixture
def conversions(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that were converted."""
    found = []
    original = frozen.kept

    def counted(weights, use, make):
        return original(weights, use, lambda: found.append(tuple(weights[0].shape)) or make())

    monkeypatch.setattr(stage_weights, "kept", counted)
    return found


@pytest.fixture
def layer() -> StageConv2d:
    torch.manual_seed(0)
    return StageConv2d(CHANNELS, CHANNELS, 3)


@pytest.fixture
def x(generator) -> StageBatch:
    elements = sum(n * c for n, c in zip(COUNTS, CHANNELS, strict=True)) * 16
    return StageBatch(torch.randn(elements, generator=generator), COUNTS, CHANNELS, 4, 4)


def expected(layer: StageConv2d, x: StageBatch) -> Tensor:
    """By PyTorch, from the weights as they are now."""
    ys = [
        torch.conv2d(segment, weight, bias, padding=1)
        for segment, weight, bias in zip(x.segments(), layer.weight, layer.bias, strict=True)
    ]
    return StageBatch.from_segments(ys).values.detach()


def test_a_weight_is_converted_once_inside_and_every_time_outside(layer, x, conversions):
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        assert len(conversions) == 4  # of the two stages that have samples
        conversions.clear()
        with frozen_weights():
            layer(x)
            with frozen_weights():  # shares what the outer one keeps
                y = layer(x).values
            assert torch.equal(layer(x).values, y)
        assert len(conversions) == 2
        with frozen_weights():
            layer(x)
        assert len(conversions) == 4
    torch.testing.assert_close(y, expected(layer, x), rtol=1e-5, atol=1e-5)


def in_place(layer: StageConv2d) -> None:
    with torch.no_grad():
        layer.weight[0].add_(1)


def optimized(fused: bool) -> Callable[[StageConv2d], None]:
    def change(layer: StageConv2d) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused).step()

    return change


def loaded(layer: StageConv2d) -> None:
    layer.load_state_dict({name: torch.ones_like(t) for name, t in layer.state_dict().items()})


def assigned(layer: StageConv2d) -> None:
    layer.load_state_dict({name: torch.ones_like(t) for name, t in layer.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [in_place, optimized(False), optimized(True), loaded, assigned],
    ids=["in place", "optimizer", "fused optimizer", "load_state_dict", "assign"],
)
def test_changes_that_pytorch_notices_are_noticed(change, layer, x):
    with frozen_weights():
        with torch.no_grad():
            before = layer(x).values
        change(layer)
        with torch.no_grad():
            after = layer(x).values
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, expected(layer, x), rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_one_dtype_serves_no_other(layer, x):
    with torch.no_grad(), frozen_weights():
        single, half = layer(x).values, layer(x.to(torch.bfloat16)).values
        assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(layer(x).values, single)
    torch.testing.assert_close(half.float(), single, rtol=0.02, atol=0.02)


def test_weights_of_inference_mode_are_kept_too(x, conversions):
    with torch.inference_mode(), frozen_weights():
        weights = [torch.randn(c, c, 3, 3) for c in CHANNELS]
        first = grouped_conv2d(x, weights).values
        assert torch.equal(grouped_conv2d(x, weights).values, first)
    assert len(conversions) == 2


def test_what_is_made_of_passing_weights_goes_with_them(x):
    """Weights that a parametrization or a quantised layer makes anew in every call do not pile up."""
    with torch.no_grad(), frozen_weights():
        weights = [torch.randn(c, c, 3, 3) for c in CHANNELS]
        grouped_conv2d(x, weights)
        alive = [weakref.ref(weight) for weight in weights]
        assert len(frozen._kept.get()) == 2  # of the two stages that have samples
        del weights
        assert [weight() for weight in alive] == [None] * 3
        assert frozen._kept.get() == {}


def test_another_thread_has_a_scope_of_its_own(layer, x, conversions):
    def run() -> None:
        with torch.no_grad():
            layer(x)
            layer(x)

    with frozen_weights():
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(conversions) == 2 + 4


def test_a_training_step_inside_is_right(layer, x):
    """It need not be of use, but it may not be wrong."""
    gradients = []
    for inside in (False, True):
        layer.zero_grad()
        if inside:
            with frozen_weights():
                for _ in range(2):
                    layer.zero_grad()
                    layer(x).values.square().sum().backward()
        else:
            layer(x).values.square().sum().backward()
        gradients.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    for alone, kept in zip(*gradients, strict=True):
        assert torch.equal(alone, kept)
