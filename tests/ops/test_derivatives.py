"""Derivatives of every order: those of plain PyTorch formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msd_kernels import attention, group_norm, optimal_denoiser
from msd_kernels.dispatch.operator import Operator
from op_calls import CALLS, Call


def denoiser_call(side: int) -> Call:
    data = torch.linspace(-2, 2, 5 * side, dtype=torch.float64).sin().reshape(5, side)

    def function(x, sigma):
        posterior = optimal_denoiser(x, 1 + sigma.square(), data, statistics=True)
        return torch.cat([posterior.denoised.flatten(), posterior.log_partition])

    return Call([(2, side), (2,)], function)


EVERY_CALL = {case: build for case, (_, build) in CALLS.items()} | {"optimal_denoiser": denoiser_call}
every_call = pytest.mark.parametrize("build", EVERY_CALL.values(), ids=EVERY_CALL)


@pytest.fixture
def plain(monkeypatch):
    """Makes the ops plain PyTorch formulas, which autograd differentiates by itself."""
    return lambda: monkeypatch.setattr(Operator, "__call__", Operator._plain)


def directions_for(leaves: list[Tensor], orders: int) -> list[list[Tensor]]:
    """One random direction over all leaves per order, the same in every call."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in leaves] for _ in range(orders)]


def directional_derivatives(call: Call, leaves: list[Tensor], orders: int) -> list[Tensor]:
    """Of the sum of sines, each order in a direction of its own."""
    total = call.function(*leaves).sin().sum()
    found = [total]
    for direction in directions_for(leaves, orders):
        gradients = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        total = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
        found.append(total)
    return [t.detach() for t in found]


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
@every_call
def test_derivatives_of_four_orders_are_those_of_the_formulas(build, generator, plain):
    call = build(2)
    leaves = call.leaves(generator, torch.float64)
    found = directional_derivatives(call, leaves, 4)
    plain()
    expected = directional_derivatives(call, leaves, 4)
    assert expected[4].abs() > 1e-6, "a fourth derivative of zero would test nothing"
    # Rounding of 2**-53 in sums of some hundred terms that cancel.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
@every_call
def test_derivatives_of_one_input_after_the_other_are_those_of_the_formulas(build, generator, plain):
    """Each order asks for another input, and one input requires no gradient at all."""
    call = build(2)
    leaves = call.leaves(generator, torch.float64)
    if len(leaves) > 2:
        leaves[1].requires_grad_(False)
    wanted = [t for t in leaves if t.requires_grad]

    def mixed() -> list[Tensor]:
        total = call.function(*leaves).sin().sum()
        found = []
        for order in range(3):
            leaf = wanted[order % len(wanted)]
            (gradient,) = torch.autograd.grad(total, leaf, create_graph=True, materialize_grads=True)
            found.append(gradient.detach())
            total = (gradient * torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view_as(leaf)).sum()
        return found

    found = mixed()
    plain()
    torch.testing.assert_close(found, mixed(), rtol=1e-9, atol=1e-9)


@every_call
def test_derivatives_of_the_third_order_are_differences_of_the_second(build, generator):
    call = build(2)
    leaves = call.leaves(generator, torch.float64)
    _, _, last = directions_for(leaves, 3)

    def derivative(order: int, step: float = 0.0) -> Tensor:
        moved = [(t.detach() + step * v).requires_grad_() for t, v in zip(leaves, last, strict=True)]
        return directional_derivatives(call, moved, order)[-1]

    step = 1e-4
    difference = (derivative(2, step) - derivative(2, -step)) / (2 * step)
    # The truncation error is step² times the fifth derivative.
    torch.testing.assert_close(derivative(3), difference, rtol=1e-4, atol=1e-4)


def test_derivatives_see_how_inputs_depend_on_each_other(generator):
    """A gradient with respect to one input must not run on through another one."""
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def ours(x):
        weight = x.mean(dim=(0, 2))
        return group_norm(x, 2, weight, weight * 2, scale=x.mean(2), activation="silu")

    def formulas(x):
        weight = x.mean(dim=(0, 2))
        y = torch.nn.functional.group_norm(x, 2, weight, weight * 2) * (1 + x.mean(2)[..., None])
        return torch.nn.functional.silu(y)

    a, b = (directional_derivatives(Call([x.shape], f), [x], 4) for f in (ours, formulas))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_derivatives_without_a_further_graph_keep_none(generator):
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(group_norm(x, 2).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, retain_graph=True)
    assert not second.requires_grad
    (again,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    assert again.requires_grad
    assert torch.equal(second, again.detach())


@pytest.mark.filterwarnings("ignore::msd_kernels.FallbackWarning")
def test_derivatives_of_torch_func_nest(generator, plain):
    x = torch.randn(1, 1, 3, 2, generator=generator, dtype=torch.float64)

    def energy(t):
        return attention(t, t * 2, t + 1).pow(3).sum()

    def squared_gradient(function):
        return lambda t: torch.func.grad(function)(t).square().sum()

    third = torch.func.grad(squared_gradient(squared_gradient(energy)))(x)
    plain()
    leaf = x.clone().requires_grad_()
    total = energy(leaf)
    for _ in range(2):
        total = torch.autograd.grad(total, leaf, create_graph=True)[0].square().sum()
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(third, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", ["group_norm", "attention"])
def test_derivatives_of_what_an_op_returns_for_its_backward_are_refused(op, generator):
    """The statistics of the registered op serve its backward; ignoring their cotangents would be wrong."""
    x = torch.randn(2 * 4 * 3, generator=generator, dtype=torch.float64, requires_grad=True)
    if op == "group_norm":
        layout = ([2], [4], [0], [2], 3, False, 1e-5, False, 0.0)
        y, *statistics = torch.ops.msd_kernels.group_norm(x, None, None, None, None, [], [], *layout)
    else:
        y, *statistics = torch.ops.msd_kernels.attention(x, x, x, [2], [2], [2], 3, 3, "nhtd", None)
    assert y.requires_grad
    assert not any(t.requires_grad for t in statistics)
