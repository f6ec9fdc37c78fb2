"""What puts this library's modules into a model, and takes them out again: the modules stay, their classes change."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd_kernels.nn import known
from msd_kernels.nn.convolutions import Conv2d, ReplacedConv2d, ReplacedForeignConv2d, unserved
from msd_kernels.nn.foreign import Replaced, in_front
from msd_kernels.nn.norms import (
    NORMS,
    Follower,
    FusedSequential,
    ReplacedAdaptiveNorm,
    ReplacedForeignNorm,
    ReplacedGroupNorm,
    is_pair,
)
from msd_kernels.ops.group_norm import group_norm
from msd_kernels.ops.grouped_conv2d import cpu

# Of what somebody else's module returns on an example; both round the same formula a few times.
ALIKE = 1e-4


class Report(int):
    """The number of modules that were replaced, and what was found.

    Attributes:
        kind: what was looked for, ``"norms"`` or ``"convolutions"``.
        found: how many the model has.
        fused: how many norms are computed with the SiLU behind them where their block calls both in turn.
        left: for each module that was left alone, its name and why.
    """

    kind: str
    found: int
    fused: int
    left: dict[str, str]

    def __new__(
        cls, replaced: int, kind: str = "", found: int = 0, fused: int = 0, left: dict[str, str] | None = None
    ) -> "Report":
        self = super().__new__(cls, replaced)
        self.kind, self.found, self.fused, self.left = kind, found, fused, left or {}
        return self

    def __repr__(self) -> str:
        fused = f", {self.fused} of them with their SiLU" if self.kind == "norms" else ""
        lines = [f"{int(self)} of {self.found} {self.kind} replaced{fused}"]
        return "\n".join([*lines, *(f"  left {name}: {reason}" for name, reason in self.left.items())])

    __str__ = __repr__


def replace_group_norm(model: nn.Module, *, fuse_silu: bool = True) -> Report:
    """Turns every ``torch.nn.GroupNorm`` of ``model`` into :class:`msd_kernels.nn.GroupNorm`, in place.

    The modules stay the objects that they are, with their parameters, buffers, hooks and attributes; only their class
    changes. :func:`restore` changes it back. The GroupNorms that guided diffusion, latent diffusion, EDM and
    k-diffusion have of their own are known, too; nothing is imported for it.

    With ``fuse_silu`` a SiLU is computed together with the norm before it

    - in every ``torch.nn.Sequential`` in which it directly follows the norm: as a :class:`FusedSequential` it computes
      both at once where it is called as a whole;
    - in the blocks of diffusers (``ResnetBlock2D``, the outputs of its U-Nets and autoencoders), guided diffusion,
      latent diffusion and EDM, also where the embedding scales and shifts the norm's output first. There the norm
      returns a tensor that is computed when it is used, with the SiLU if that is its use, so that results are right
      however a block calls its layers. A norm or a SiLU with hooks is called by itself, and so are both in compiled
      functions.

    Returns:
        The number of norms that were replaced, a :class:`Report` with the rest. Left alone are other subclasses of
        ``torch.nn.GroupNorm`` and of ``torch.nn.Sequential``, parametrised norms among them, modules whose ``forward``
        was set on the instance, and norms with an attribute ``activation`` or ``follower`` of somebody else's.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_model("replace_group_norm", model)
    types = _norm_types()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, tuple(types))}
    left, replaced = {}, 0
    for name, norm in norms.items():
        if type(norm) in NORMS or isinstance(norm, Replaced):
            continue
        reason = _why_left(norm, types)
        if reason is None:
            norm.__class__, norm.activation = types[type(norm)](type(norm)), None
            replaced += 1
        else:
            left[name] = reason
    fused: set[int] = set()
    if fuse_silu:
        fused, unfused = _fuse(model)
        left |= {name: reason for name, reason in unfused.items() if name not in left}
    return Report(replaced, "norms", len(norms), len(fused), left)


def _norm_types() -> dict[type, Callable[[type], type]]:
    """For every class of norms that there is: what its modules become."""
    types: dict[type, Callable[[type], type]] = {nn.GroupNorm: lambda original: ReplacedGroupNorm}
    for names, kind in (
        (known.FLOAT32_NORMS, ReplacedForeignNorm),
        (known.EDM_NORMS, ReplacedForeignNorm),
        (known.ADAPTIVE_NORMS, ReplacedAdaptiveNorm),
    ):
        for original in known.known_types(*names):
            types[original] = lambda original, kind=kind: in_front(kind, original)
    return types


def _why_left(norm: nn.Module, types: dict[type, Any]) -> str | None:
    """Why a norm stays what it is, or None."""
    if type(norm) not in types:
        return f"a subclass, {type(norm).__name__}"
    if "forward" in vars(norm):
        return "has a forward of its own"
    taken = [name for name in ("activation", "follower") if hasattr(norm, name)]
    if taken:
        return f"has an attribute {taken[0]!r} of somebody else's"
    if type(norm) is not nn.GroupNorm and not _acts_as_ours(norm):
        return f"does not compute what {type(norm).__name__} is known to"
    return None


def _acts_as_ours(norm: nn.Module) -> bool:
    """Whether somebody else's norm returns on an example what ours will: a fork may go by the same name."""
    mapper = getattr(norm, "mapper", None)
    if mapper is None:
        channels, weight = len(norm.weight), norm.weight

        def ours(x: Tensor) -> Tensor:
            return group_norm(x, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)

        return _alike(norm, ours, channels, weight)
    condition = torch.ones(2, mapper.in_features, device=mapper.weight.device, dtype=mapper.weight.dtype)

    def adaptive(x: Tensor) -> Tensor:
        scale, shift = mapper(condition).float().chunk(2, dim=-1)
        return group_norm(x, norm.num_groups, eps=norm.eps, scale=scale, shift=shift)

    return _alike(norm, adaptive, mapper.out_features // 2, mapper.weight, {norm.cond_key: condition})


@torch.no_grad()
def _alike(
    module: nn.Module, ours: Callable[[Tensor], Tensor], channels: int, weight: Tensor, *arguments: Any
) -> bool:
    """Whether a module, unseen by its hooks, returns what ours does for an example of float32."""
    if weight.is_meta:
        return False
    x = torch.linspace(-1, 300, 2 * channels * 6, device=weight.device).sin().view(2, channels, 2, 3) + 1
    try:
        expected, found = type(module).forward(module, x, *arguments), ours(x)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    return bool((expected - found).abs().max() <= ALIKE * (1 + expected.abs().max()))


def _fuse(model: nn.Module) -> tuple[set[int], dict[str, str]]:
    """Returns the norms whose SiLU is computed with them, by identity, and the norms of known blocks without one."""
    fused: set[int] = set()
    for sequence in model.modules():
        if type(sequence) is FusedSequential or _is_plain(sequence, nn.Sequential):
            pairs = [norm for norm, activation in pairwise(sequence) if is_pair(norm, activation)]
            if pairs:
                sequence.__class__ = FusedSequential
                fused |= set(map(id, pairs))
    followers, left = {}, {}
    holders = _holders(model)
    for name, block, facts, exact in known.blocks_of(model):
        for path, activation in facts.followed:
            norm, where = _at(block, path), f"{name}.{path}".lstrip(".")
            if not isinstance(norm, (ReplacedGroupNorm, ReplacedForeignNorm)):
                continue
            reason = _why_unfused(block, facts, exact, activation, holders[id(norm)])
            if reason is None:
                followers[id(norm)] = (norm, block, activation)
            elif id(norm) not in fused:
                left[where] = f"is called by itself: {reason}"
    for norm, block, activation in followers.values():
        parent, _, last = (activation or "").rpartition(".")
        norm.follower = Follower(_at(block, parent), last or None)
    return fused | set(followers), left


def _holders(model: nn.Module) -> dict[int, int]:
    """How many modules hold each module."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for child in module.children():
            counts[id(child)] = counts.get(id(child), 0) + 1
    return counts


def _why_unfused(
    block: nn.Module, facts: known.Block, exact: bool, activation: str | None, holders: int
) -> str | None:
    if not exact:
        return f"its block {type(block).__name__} is a subclass of {facts.name}"
    if "forward" in vars(block):
        return "its block has a forward of its own"
    if holders > 1:
        return "several modules share it"
    if activation is not None and type(_at(block, activation)) is not nn.SiLU:
        return f"{activation} is a {type(_at(block, activation)).__name__}, no SiLU"
    return None


def _at(module: nn.Module, path: str) -> Any:
    """What a module has at a path of attributes, or None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def replace_conv2d(model: nn.Module) -> Report:
    """Turns the convolutions of ``model`` that this library may serve into :class:`msd_kernels.nn.Conv2d`, in place.

    These are the ``torch.nn.Conv2d``, and EDM's, of 3×3 with stride 1 and padding 1, between 16 channels and more.
    Which kernel runs is decided in each call, see :class:`msd_kernels.nn.Conv2d`: on a GPU, and where PyTorch's own is
    faster, nothing changes. The modules stay the objects that they are; only their class changes, and :func:`restore`
    changes it back.

    Returns:
        The number of convolutions that were replaced, a :class:`Report` with the rest.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_model("replace_conv2d", model)
    foreign = tuple(known.known_types(*known.EDM_CONVOLUTIONS))
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, *foreign))}
    left, replaced = {}, 0
    for name, conv in convolutions.items():
        if type(conv) in (Conv2d, ReplacedConv2d) or isinstance(conv, Replaced):
            continue
        reason = _why_left_convolution(conv, foreign)
        if reason is None:
            ours = type(conv) is nn.Conv2d
            conv.__class__ = ReplacedConv2d if ours else in_front(ReplacedForeignConv2d, type(conv))
            replaced += 1
        else:
            left[name] = reason
    return Report(replaced, "convolutions", len(convolutions), left=left)


def _why_left_convolution(conv: nn.Module, foreign: tuple[type, ...]) -> str | None:
    """Why a convolution stays what it is, or None."""
    if type(conv) not in (nn.Conv2d, *foreign):
        return f"a subclass, {type(conv).__name__}"
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        return "has a forward of its own"
    channels = min(conv.in_channels, conv.out_channels)
    if channels < cpu.LEAST_CHANNELS:
        return f"{channels} channels are too few for the transforms to pay"
    return unserved(conv) if type(conv) is nn.Conv2d else _why_left_foreign(conv)


def _why_left_foreign(conv: nn.Module) -> str | None:
    weight = getattr(conv, "weight", None)
    if weight is None or weight.shape[2:] != (3, 3) or conv.up or conv.down:
        return "resamples, or has no kernel of 3×3"
    if not _alike(
        conv, lambda x: F.conv2d(x, weight.float(), conv.bias, padding=1), conv.in_channels, weight
    ):
        return f"does not compute what {type(conv).__name__} is known to"
    return None


def restore(model: nn.Module) -> int:
    """Undoes :func:`replace_group_norm` and :func:`replace_conv2d`, in place.

    The modules are what they were, and keep what they hold by now.

    Returns:
        The number of norms and convolutions that are plain ones again. Modules that were built as
        :class:`msd_kernels.nn.GroupNorm` and :class:`msd_kernels.nn.Conv2d` stay so.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a replaced module has got another class since, as by a parametrisation, or a norm an activation;
            that must go first, and nothing is changed.
    """
    _check_model("restore", model)
    originals = {m: _original(name, m) for name, m in model.named_modules() if _is_replaced(m)}
    for module, original in originals.items():
        module.__class__ = original
        for name in ("activation", "follower"):
            vars(module).pop(name, None)
    for sequence in model.modules():
        if type(sequence) is FusedSequential:
            sequence.__class__ = nn.Sequential
    return len(originals)


def _is_replaced(module: nn.Module) -> bool:
    return isinstance(module, (ReplacedGroupNorm, Replaced, ReplacedConv2d))


def _original(name: str, module: nn.Module) -> type[nn.Module]:
    """The class that a replaced module had."""
    activation = getattr(module, "activation", None)
    if isinstance(module, Replaced):
        original, expected = module.original, in_front(type(module).__mro__[1], module.original)
    else:
        norm = isinstance(module, ReplacedGroupNorm)
        original, expected = (nn.GroupNorm, ReplacedGroupNorm) if norm else (nn.Conv2d, ReplacedConv2d)
    if type(module) is not expected or activation is not None:
        kind = "convolution" if isinstance(module, nn.Conv2d) else "norm"
        raise ValueError(
            f"restore: the {kind} {name!r} was changed after it was replaced: it is a {type(module).__name__} with "
            f"activation={activation!r}, and must be a {expected.__name__} with activation=None; a "
            "parametrisation, for one, must be removed first"
        )
    return original


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and "forward" not in vars(module)


def _check_model(user: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{user}: model must be a torch.nn.Module, got {type(model).__name__}")
