"""GroupNorm through this library: a module that drops in for PyTorch's, and what the norms of models become."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from msd_kernels import _private
from msd_kernels.dispatch import autocast
from msd_kernels.nn.foreign import Replaced
from msd_kernels.nn.pending import PendingNorm
from msd_kernels.ops.group_norm import ACTIVATIONS, group_norm

# Where PyTorch keeps the hooks that run around a module's forward: of one module, and of all modules. Should a version
# keep them elsewhere, a module counts as one that has hooks.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` through :func:`msd_kernels.group_norm`, with an optional activation behind it.

    Arguments and ``state_dict`` are those of ``torch.nn.GroupNorm``; ``activation`` may be ``"silu"``. ``forward`` also
    takes the per-sample ``scale`` and ``shift`` of the op. ``torch.jit.script`` compiles the same in plain PyTorch.

    Raises:
        ValueError: another activation; as ``torch.nn.GroupNorm``.
    """

    activation: str | None

    def __init__(
        self, num_groups: int, num_channels: int, *args, activation: str | None = None, **kwargs
    ) -> None:
        super().__init__(num_groups, num_channels, *args, **kwargs)
        if activation not in ACTIVATIONS:
            raise ValueError(f"GroupNorm: activation must be None or 'silu', got {activation!r}")
        self.activation = activation

    def forward(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles this branch alone
            y = F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
            if scale is not None:
                y = y * (1 + _per_channel(scale, y))
            if shift is not None:
                y = y + _per_channel(shift, y)
            return y if self.activation is None else F.silu(y)
        else:
            return _called(self, input, scale, shift)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """``[B, C]`` so that it broadcasts against ``[B, C, *spatial]``."""
    return values.reshape(list(values.shape) + [1] * (like.dim() - 2))


def _called(norm: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """The output, or in a known block what stands for it until its use is known."""
    follower = vars(norm).get("follower")
    if follower is None or scale is not None or shift is not None or not follower.waits(norm, x):
        return _op(norm, x, norm.activation, scale, shift)
    return PendingNorm.of(partial(_op, norm, x), x)


def _op(
    norm: nn.Module,
    x: Tensor,
    activation: str | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if isinstance(norm, Replaced) and weight.dtype not in (x.dtype, torch.float32):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)  # as these do
    return group_norm(
        x,
        norm.num_groups,
        weight,
        bias,
        norm.eps,
        scale=scale,
        shift=shift,
        activation=activation,
    )


class ReplacedGroupNorm(GroupNorm):
    """A ``torch.nn.GroupNorm`` that ``replace_group_norm`` has turned into ours, and ``restore`` turns back.

    In a known block it has a :class:`Follower`.
    """


class ReplacedForeignNorm(Replaced):
    """In front of a class of somebody else's that normalises as ``torch.nn.GroupNorm`` does."""

    activation: str | None

    def forward(self, input: Tensor) -> Tensor:
        return _called(self, input)


class ReplacedAdaptiveNorm(Replaced):
    """In front of k-diffusion's ``AdaGN``, whose scale and shift come out of a mapped condition."""

    activation: str | None

    def forward(self, input: Tensor, cond: dict[str, Tensor]) -> Tensor:
        scale, shift = self.mapper(cond[self.cond_key]).chunk(2, dim=-1)
        return group_norm(input, self.num_groups, eps=self.eps, scale=scale, shift=shift)


NORMS = (GroupNorm, ReplacedGroupNorm)


@dataclass
class Follower:
    """The SiLU behind a norm of a known block: a module that the block holds, or a function (no name)."""

    block: nn.Module
    name: str | None

    def activation(self) -> Any:
        """The module, or whatever is in its place by now."""
        return None if self.name is None else getattr(self.block, self.name, None)

    def waits(self, norm: nn.Module, x: Tensor) -> bool:
        """Whether the norm may leave its output to be computed with the SiLU: nothing watches a call between them."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() < 3:
            return False
        if _private.is_tracing() or _private.dispatch_modes() or _private.in_transform():
            return False
        if x.is_cuda and autocast.lower_precision_dtype("cuda") is not None:  # where norms change the dtype
            return False
        activation = self.activation()
        if self.name is not None and not isinstance(activation, nn.Module):
            return False
        return norm.activation is None and fuses(norm, *([] if activation is None else [activation]))


class FusedSequential(nn.Sequential):
    """A ``torch.nn.Sequential`` that, called as a whole, computes a :class:`GroupNorm` and the SiLU behind it in one.

    Its modules are the plain ones, whoever indexes, slices or iterates: what they compute one by one does not change.
    A pair of which a module has forward or backward hooks is computed one by one, too, so that they see what they
    always do.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
        else:
            input = _run(list(self), input)
        return input


def _run(modules: list[nn.Module], x: Tensor) -> Tensor:
    position = 0
    while position < len(modules):
        module, following = modules[position], modules[position + 1 : position + 2]
        if following and is_pair(module, following[0]) and fuses(module, following[0]):
            x = _op(module, x, "silu")
            position += 2
        else:
            x = module(x)
            position += 1
    return x


def is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether the two are a norm of ours and the SiLU behind it."""
    ours = type(norm) in NORMS or isinstance(norm, ReplacedForeignNorm)
    return ours and norm.activation is None and type(activation) is nn.SiLU


def fuses(*modules: nn.Module) -> bool:
    """Whether nothing can tell that the modules are not called: no hooks, no forward of an instance's own."""
    watched = any(getattr(hooks_of_all, name, True) for name in GLOBAL_HOOKS)
    return not watched and not any(map(is_changed, modules))


def is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward, or a forward of its own."""
    return "forward" in vars(module) or any(getattr(module, name, True) for name in HOOKS)
