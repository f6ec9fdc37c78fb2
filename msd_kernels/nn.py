"""Modules that drop in for those of ``torch.nn``, and what puts them into a model and takes them out again."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from msd_kernels.ops.group_norm import ACTIVATIONS, group_norm

__all__ = ["FusedSequential", "GroupNorm", "replace_group_norm", "restore"]

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
            return _op(self, input, self.activation, scale, shift)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """``[B, C]`` so that it broadcasts against ``[B, C, *spatial]``."""
    return values.reshape(list(values.shape) + [1] * (like.dim() - 2))


def _op(
    norm: GroupNorm,
    x: Tensor,
    activation: str | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    return group_norm(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        norm.eps,
        scale=scale,
        shift=shift,
        activation=activation,
    )


class ReplacedGroupNorm(GroupNorm):
    """A ``torch.nn.GroupNorm`` that :func:`replace_group_norm` has turned into ours, and :func:`restore` turns back."""


NORMS = (GroupNorm, ReplacedGroupNorm)


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
        if following and _is_pair(module, following[0]) and _fuses(module, following[0]):
            x = _op(module, x, "silu")
            position += 2
        else:
            x = module(x)
            position += 1
    return x


def _is_pair(norm: nn.Module, activation: nn.Module) -> bool:
    return type(norm) in NORMS and norm.activation is None and type(activation) is nn.SiLU


def _fuses(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether nothing can tell that the two are not called: no hooks, no forward of an instance's own."""
    watched = any(getattr(hooks_of_all, name, True) for name in GLOBAL_HOOKS)
    return not (watched or _is_changed(norm) or _is_changed(activation))


def _is_changed(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(getattr(module, name, True) for name in HOOKS)


def replace_group_norm(model: nn.Module, *, fuse_silu: bool = True) -> int:
    """Turns every ``torch.nn.GroupNorm`` of ``model`` into :class:`GroupNorm`, in place.

    The modules stay the objects that they are, with their parameters, buffers, hooks and attributes; only their class
    changes. :func:`restore` changes it back.

    With ``fuse_silu``, so does that of every ``torch.nn.Sequential`` in which a ``torch.nn.SiLU`` directly follows a
    norm: as a :class:`FusedSequential` it computes both at once where it is called as a whole, and only there.
    Elsewhere the order of calls cannot be known from the modules, and nothing is fused.

    Returns:
        The number of norms that were replaced. Left alone are subclasses of ``torch.nn.GroupNorm`` and of
        ``torch.nn.Sequential``, parametrised norms among them, modules whose ``forward`` was set on the instance, and
        norms with an attribute ``activation`` of somebody else's.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_model("replace_group_norm", model)
    norms = [m for m in model.modules() if _is_plain(m, nn.GroupNorm) and not hasattr(m, "activation")]
    for norm in norms:
        norm.__class__, norm.activation = ReplacedGroupNorm, None
    if fuse_silu:
        for sequence in model.modules():
            if _is_plain(sequence, nn.Sequential) and any(_is_pair(*pair) for pair in pairwise(sequence)):
                sequence.__class__ = FusedSequential
    return len(norms)


def restore(model: nn.Module) -> int:
    """Undoes :func:`replace_group_norm`, in place: the modules are what they were, and keep what they hold by now.

    Returns:
        The number of norms that are plain ones again. Modules that were built as :class:`GroupNorm` stay so.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a replaced norm has got another class since, as by a parametrisation, or an activation; that must
            go first, and nothing is changed.
    """
    _check_model("restore", model)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, ReplacedGroupNorm)}
    for name, norm in norms.items():
        if type(norm) is not ReplacedGroupNorm or norm.activation is not None:
            raise ValueError(
                f"restore: the norm {name!r} was changed after it was replaced: it is a {type(norm).__name__} with "
                f"activation={norm.activation!r}, and must be a ReplacedGroupNorm with activation=None; a "
                "parametrisation, for one, must be removed first"
            )
    for norm in norms.values():
        norm.__class__ = nn.GroupNorm
        del norm.activation
    for sequence in model.modules():
        if type(sequence) is FusedSequential:
            sequence.__class__ = nn.Sequential
    return len(norms)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and "forward" not in vars(module)


def _check_model(user: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{user}: model must be a torch.nn.Module, got {type(model).__name__}")
