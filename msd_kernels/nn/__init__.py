"""Modules that drop in for those of ``torch.nn``, and what puts them into a model and takes them out again."""

from msd_kernels.nn.convolutions import Conv2d, ReplacedConv2d
from msd_kernels.nn.norms import FusedSequential, GroupNorm, ReplacedGroupNorm
from msd_kernels.nn.replacement import Report, replace_conv2d, replace_group_norm, restore

__all__ = [
    "Conv2d",
    "FusedSequential",
    "GroupNorm",
    "ReplacedConv2d",
    "ReplacedGroupNorm",
    "Report",
    "replace_conv2d",
    "replace_group_norm",
    "restore",
]
