"""Modules that drop in for those of ``torch.nn``."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import Tensor, nn

from msd_kernels.ops.group_norm import ACTIVATIONS, group_norm

__all__ = ["GroupNorm", "replace_group_norm"]

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` through :func:`msd_kernels.group_norm`, with an optional activation behind it.

    Arguments and ``state_dict`` are those of ``torch.nn.GroupNorm``; ``activation`` may be ``"silu"``. ``forward`` also
    takes the per-sample ``scale`` and ``shift`` of the op.

    Raises:
        ValueError: another activation; as ``torch.nn.GroupNorm``.
    """

    def __init__(
        self, num_groups: int, num_channels: int, *args, activation: str | None = None, **kwargs
    ) -> None:
        super().__init__(num_groups, num_channels, *args, **kwargs)
        if activation not in ACTIVATIONS:
            raise ValueError(f"GroupNorm: activation must be None or 'silu', got {activation!r}")
        self.activation = activation

    def forward(self, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def replace_group_norm(model: nn.Module, *, fuse_silu: bool = True) -> int:
    """Swaps every ``torch.nn.GroupNorm`` inside ``model`` for :class:`GroupNorm`, in place, keeping its parameters.

    With ``fuse_silu``, a ``torch.nn.SiLU`` that directly follows a norm in a ``torch.nn.Sequential`` is computed by
    the norm, and an ``Identity`` takes its place. Elsewhere the order of calls cannot be known from the modules, and
    activations stay; so do those behind a norm that the model holds in more than one place. A norm or an activation
    that has hooks stays as it is, too: a swap would lose them, and hooks of a norm expect no activation's output.

    Returns:
        The number of norms replaced. Subclasses of ``torch.nn.GroupNorm`` are left alone, and so is a norm that is
        ``model`` itself.
    """
    replaced = 0
    swapped: dict[nn.Module, GroupNorm] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.GroupNorm or _has_hooks(child):
                continue
            if child not in swapped:
                swapped[child] = _like(child)
                replaced += 1
            setattr(parent, name, swapped[child])
    if fuse_silu:
        places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        for sequence in model.modules():
            if isinstance(sequence, nn.Sequential):
                _fuse_silu(sequence, places)
    return replaced


def _like(norm: nn.GroupNorm) -> GroupNorm:
    """A norm that shares the parameters of the one it stands for."""
    twin = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False, device="meta")
    twin.affine = norm.affine
    twin.weight, twin.bias = norm.weight, norm.bias
    return twin.train(norm.training)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def _fuse_silu(sequence: nn.Sequential, places: Counter[nn.Module]) -> None:
    names = list(sequence._modules)
    for name, following in pairwise(names):
        norm, activation = sequence._modules[name], sequence._modules[following]
        if (
            type(norm) is GroupNorm
            and places[norm] == 1
            and norm.activation is None
            and type(activation) is nn.SiLU
            and not (_has_hooks(norm) or _has_hooks(activation))
        ):
            norm.activation = "silu"
            sequence._modules[following] = nn.Identity()
