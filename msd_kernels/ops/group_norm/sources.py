"""Two sources as one, for what knows one alone: copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msd_kernels.layouts import GroupNormLayout


def joined(x: Tensor, skip: Tensor | None, layout: GroupNormLayout) -> tuple[Tensor, GroupNormLayout]:
    """A buffer that holds, of every pixel, the channels of ``x``, then those of ``skip``, and its layout."""
    if skip is None:
        return x, layout
    sources = layout.planes(x, layout.channels), layout.planes(skip, layout.skip_channels)
    parts = [torch.cat(pair, dim=1).transpose(1, 2).reshape(-1) for pair in zip(*sources, strict=True)]
    return torch.cat(parts), layout.joined


def parted(
    gradient: Tensor | None, layout: GroupNormLayout, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and of ``skip``, where they are wanted, out of such a buffer's."""
    if gradient is None or not layout.has_skip:
        return gradient, None
    planes = [plane.split(list(widths), dim=1) for plane, *widths in _widths(gradient, layout)]
    own, skip = (
        torch.cat([parts[i].transpose(1, 2).reshape(-1) for parts in planes]) if wanted[i] else None
        for i in (0, 1)
    )
    return own, skip


def _widths(gradient: Tensor, layout: GroupNormLayout):
    return zip(layout.planes(gradient), layout.channels, layout.skip_channels, strict=True)
