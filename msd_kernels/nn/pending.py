"""What a norm returns where a SiLU follows: computed when it is used, with the SiLU if that is its use.

So nobody has to know how a block calls its layers. Its norm hands out a :class:`PendingNorm`, which stands for the
norm's output: a SiLU of it, also behind a scale and a shift per channel, is one call of the op; whatever else is done
with it is done with the output itself, computed at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# compute(activation, scale, shift): the norm, and what follows it.
Compute = Callable[[str | None, Tensor | None, Tensor | None], Tensor]


class PendingNorm(Tensor):
    """The output of a norm of ``x`` that is not computed yet; it has no memory, so that nothing reads it unnoticed.

    Attributes:
        compute: computes it.
        x: the norm's input, of the same shape, dtype and device.
        version: of ``x`` when it was normalised.
        factor, shift: ``[B, C, 1, ...]`` that it was multiplied by and that were added, or None.
        value: its value, once somebody has asked for it.
        sigmoid_of: whose sigmoid it is, for the SiLU that is written x * sigmoid(x).
    """

    compute: Compute
    x: Tensor
    version: int
    factor: Tensor | None
    shift: Tensor | None
    value: Tensor | None
    sigmoid_of: PendingNorm | None

    @staticmethod
    def of(
        compute: Compute,
        x: Tensor,
        factor: Tensor | None = None,
        shift: Tensor | None = None,
        sigmoid_of: PendingNorm | None = None,
    ) -> PendingNorm:
        pending = torch.empty(x.shape, dtype=x.dtype, device="meta").as_subclass(PendingNorm)
        pending.compute, pending.x, pending.version = compute, x, x._version
        pending.factor, pending.shift, pending.value, pending.sigmoid_of = factor, shift, None, sigmoid_of
        return pending

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in SHARED:
            return function(*(a.x if isinstance(a, PendingNorm) else a for a in args), **kwargs)
        step = STEPS.get(function) if OPTIONS.issuperset(kwargs) else None
        found = NotImplemented if step is None else step(*args, **kwargs)
        return function(*_values(args), **_values(kwargs)) if found is NotImplemented else found

    def __reduce_ex__(self, protocol):
        return self.known().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.known().__deepcopy__(memo)

    def known(self) -> Tensor:
        """The value."""
        if self.value is None:
            self.value = (
                self._computed(None) if self.sigmoid_of is None else self.sigmoid_of.known().sigmoid()
            )
        return self.value

    def with_silu(self) -> Tensor:
        """Of the value, which is not computed if it was not asked for before."""
        if self.value is None and self.sigmoid_of is None:
            return self._computed("silu")
        return F.silu(self.known())

    def _computed(self, activation: str | None) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                "group_norm: the input of a norm was changed in place before its output was used; "
                "replace_group_norm(model, fuse_silu=False) computes norms at once"
            )
        scale = None if self.factor is None else (self.factor - 1).flatten(1)
        return self.compute(activation, scale, None if self.shift is None else self.shift.flatten(1))


def _values(arguments: Any) -> Any:
    """Arguments of a call with values in the place of what is pending."""
    if isinstance(arguments, PendingNorm):
        return arguments.known()
    if type(arguments) is dict:
        return {name: _values(value) for name, value in arguments.items()}
    return type(arguments)(map(_values, arguments)) if type(arguments) in (list, tuple) else arguments


def _is_per_channel(values: Any, pending: PendingNorm) -> bool:
    x = pending.x
    return (
        isinstance(values, Tensor)
        and not isinstance(values, PendingNorm)
        and values.shape == (*x.shape[:2], *(1,) * (x.dim() - 2))
        and values.dtype == x.dtype
        and values.device == x.device
        and pending.value is None
        and pending.sigmoid_of is None
    )


def _mul(a: Any, b: Any) -> Any:
    pending, other = (a, b) if isinstance(a, PendingNorm) else (b, a)
    if isinstance(other, PendingNorm):
        for first, second in ((a, b), (b, a)):
            if second.sigmoid_of is first:
                return first.with_silu()
        return NotImplemented
    if pending.factor is None and pending.shift is None and _is_per_channel(other, pending):
        return PendingNorm.of(pending.compute, pending.x, other)
    return NotImplemented


def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    pending, other = (a, b) if isinstance(a, PendingNorm) else (b, a)
    if alpha == 1 and pending.shift is None and _is_per_channel(other, pending):
        return PendingNorm.of(pending.compute, pending.x, pending.factor, other)
    return NotImplemented


def _addcmul(input: Any, a: Any, b: Any, value: float = 1) -> Any:
    if value != 1 or isinstance(input, PendingNorm):
        return NotImplemented
    product = _mul(a, b)
    return _add(product, input) if isinstance(product, PendingNorm) else NotImplemented


def _silu(input: Any, inplace: bool = False) -> Any:
    y = input.with_silu()
    if inplace:
        input.value = y
    return y


def _sigmoid(input: Any) -> Any:
    return PendingNorm.of(input.compute, input.x, sigmoid_of=input)


STEPS: dict[Any, Callable[..., Any]] = {
    Tensor.mul: _mul,
    torch.mul: _mul,
    Tensor.add: _add,
    torch.add: _add,
    torch.addcmul: _addcmul,
    F.silu: _silu,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
}
# What steps take by name.
OPTIONS = frozenset(("alpha", "inplace", "value"))
# What an output has in common with its norm's input.
SHARED = frozenset(
    (
        Tensor.shape.__get__,
        Tensor.dtype.__get__,
        Tensor.device.__get__,
        Tensor.ndim.__get__,
        Tensor.dim,
        Tensor.size,
    )
)
