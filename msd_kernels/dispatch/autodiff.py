"""Derivatives of a plain-PyTorch function, for backwards that have no kernel of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def present(gradients: Tensors) -> list[Tensor]:
    """What a registered backward returns: only what was asked for."""
    return [gradient for gradient in gradients if gradient is not None]


def gradients(
    outputs: Tensors, cotangents: Tensors, leaves: Tensors, *, create_graph: bool = False
) -> list[Tensor | None]:
    """``torch.autograd.grad`` that takes absent outputs, cotangents and inputs."""
    pairs = [
        (o, g)
        for o, g in zip(outputs, cotangents, strict=True)
        if g is not None and o is not None and o.requires_grad
    ]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not wanted:
        return [None] * len(leaves)
    if not pairs:
        found = iter(torch.zeros_like(leaf) for leaf in wanted)
    else:
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                materialize_grads=True,
            )
        )
    return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def second_vjp(
    function: Callable[..., Tensor],
    cotangent: Tensor,
    inputs: Tensors,
    wanted: Sequence[bool],
    grad_gradients: Tensors,
) -> list[Tensor | None]:
    """Derivative of an op's backward: gradients for ``(cotangent, *inputs)``.

    ``wanted`` says which inputs the backward computed gradients for, ``grad_gradients`` holds the cotangents of
    those gradients, or None. Where gradients are enabled, which ``create_graph=True`` does while a backward
    runs, the result is itself a differentiable function of all these tensors, and so are its derivatives.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outer, *leaves = (_independent(t, create_graph) for t in (cotangent, *inputs))
        output = function(*leaves)
        first = gradients([output], [outer], leaves, create_graph=True)
    first = [g for g, flag in zip(first, wanted, strict=True) if flag]
    return gradients(first, grad_gradients, [outer, *leaves], create_graph=create_graph)


def _independent(t: Tensor | None, keep_graph: bool) -> Tensor | None:
    """``t`` as a variable that does not depend on the other inputs: a gradient with respect to it stops there.

    With ``keep_graph`` later derivatives go on to what ``t`` was computed from.
    """
    if t is None:
        return None
    if keep_graph and t.requires_grad:
        return t.view_as(t)
    return t.detach().requires_grad_(True)
