"""Derivatives of a plain-PyTorch function, for backwards that have no kernel of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def vjp(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Tensors,
    cotangents: Tensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Vector-Jacobian product of ``function`` at ``inputs``: one gradient per input, None where not wanted.

    ``function`` runs again, on detached inputs, with gradients enabled. A wanted input that the outputs do not
    depend on gets zeros; a cotangent of None stands for zeros.
    """
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(flag)
            for t, flag in zip(inputs, wanted, strict=True)
        ]
        outputs = function(*leaves)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    return gradients(outputs, cotangents, leaves)


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
    those gradients, None elsewhere.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(True) for t in inputs]
        outer = cotangent.detach().requires_grad_(True)
        output = function(*leaves)
        first = gradients([output], [outer], leaves, create_graph=True)
    first = [g if flag else None for g, flag in zip(first, wanted, strict=True)]
    return gradients(first, grad_gradients, [outer, *leaves])
