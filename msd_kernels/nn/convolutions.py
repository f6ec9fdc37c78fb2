"""Convolutions through this library: a module that drops in for PyTorch's."""

import torch
from torch import Tensor, nn

from msd_kernels.dispatch import tracing
from msd_kernels.dispatch.backends import Explanation
from msd_kernels.nn.foreign import Replaced
from msd_kernels.ops.grouped_conv2d import dense

# What the kernels serve, by the attributes of torch.nn.Conv2d.
SERVED = {
    "kernel_size": ((3, 3),),
    "stride": ((1, 1),),
    "padding": ((1, 1), "same"),
    "dilation": ((1, 1),),
    "groups": (1,),
    "padding_mode": ("zeros",),
}


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` whose 3×3 convolutions run in this library's kernels on processors, where they are faster.

    Arguments, ``state_dict``, shapes, dtypes and memory formats are those of ``torch.nn.Conv2d``. Kernels of 3×3 with
    stride 1 and padding 1 are computed by Winograd's F(4×4, 3×3), as :func:`msd_kernels.grouped_conv2d` does, for a
    layer and a processor where that was measured to be faster; NCHW inputs, which have to be transposed, need more
    channels. Everything else is PyTorch's own convolution. :meth:`explain` tells which one serves an input.
    ``torch.jit`` and ``torch.fx`` record PyTorch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles this branch alone
            return self._conv_forward(input, self.weight, self.bias)
        else:
            return _convolved(self, input)

    def explain(self, input: Tensor) -> Explanation:
        """Which backend of ``grouped_conv2d`` serves ``self(input)``, and why the others do not."""
        reason = unserved(self)
        if reason is not None:
            return Explanation("grouped_conv2d", "library", "torch.nn.functional.conv2d", {"cpu": reason})
        return dense.explain(input[None] if input.dim() == 3 else input, self.weight, self.bias)


class ReplacedConv2d(Conv2d):
    """A ``torch.nn.Conv2d`` that ``replace_conv2d`` has turned into ours, and ``restore`` turns back."""


class ReplacedForeignConv2d(Replaced):
    """In front of EDM's ``Conv2d`` where it does not resample."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return dense.conv2d(x, weight, bias)


def unserved(conv: nn.Conv2d) -> str | None:
    """Why no input of a convolution is served by the kernels, or None."""
    for name, served in SERVED.items():
        value = getattr(conv, name)
        if value not in served:
            return f"{name} must be {served[0]}, got {value!r}"
    return None


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if unserved(conv) is not None or isinstance(x, tracing.Proxy):
        return conv._conv_forward(x, conv.weight, conv.bias)
    if x.dim() == 3:
        return dense.conv2d(x[None], conv.weight, conv.bias)[0]
    return dense.conv2d(x, conv.weight, conv.bias)
