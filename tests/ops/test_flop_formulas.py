"""What PyTorch's FlopCounterMode counts of the ops, against what it counts of the same in plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import forks
from helpers import stage_batch
from msd_kernels import StageBatch, attention, grouped_conv2d, grouped_linear, optimal_denoiser
from op_calls import CALLS, forward_and_backward

COUNTS = (2, 0, 1)


def flops(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[int, int]:
    """Of the forward pass, and of the gradients of those leaves that want one."""
    with FlopCounterMode(display=False) as forward:
        y = function()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), wanted, allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()


def wanted_of(count: int) -> pytest.MarkDecorator:
    """Every choice of gradients but none."""
    return pytest.mark.parametrize(
        "wanted", [w for w in product((False, True), repeat=count) if any(w)], ids=str
    )


def segments(generator, counts, channels, side, wanted) -> list[Tensor]:
    batch = stage_batch(generator, counts, channels, side, side)
    return [segment.clone().requires_grad_(wanted) for segment in batch.segments()]


def resampled(x: Tensor, resample: str | None) -> Tensor:
    if resample == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if resample == "down" else x


@wanted_of(3)
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_flops_of_convolutions_are_those_of_their_stages(kernel, resample, wanted, generator):
    channels, skip_channels, outs = (4, 3, 2), (2, 2, 3), (5, 1, 3)
    xs = segments(generator, COUNTS, channels, 4, wanted[0])
    skips = segments(generator, COUNTS, skip_channels, 4, wanted[1])
    weights = [
        torch.randn(o, c + d, kernel, kernel, generator=generator, requires_grad=wanted[2])
        for o, c, d in zip(outs, channels, skip_channels, strict=True)
    ]
    biases = [torch.zeros(o, requires_grad=True) for o in outs]

    def ours():
        skip = StageBatch.from_segments(skips)
        return grouped_conv2d(
            StageBatch.from_segments(xs), weights, biases, skip=skip, resample=resample, scale=0.5
        ).values

    def plain():
        """A convolution of either source."""
        ys = []
        for x, skip, weight, bias in zip(xs, skips, weights, biases, strict=True):
            halves = weight.split([x.shape[1], skip.shape[1]], dim=1)
            pairs = zip((x, skip), halves, (bias, None), strict=True)
            ys.append(sum(F.conv2d(resampled(t, resample), w, b, padding=kernel // 2) for t, w, b in pairs))
        return torch.cat([y.flatten() for y in ys])

    leaves = [*xs, *skips, *weights]
    assert flops(ours, leaves) == flops(plain, leaves)


def test_flops_of_a_convolution_of_one_source_are_those_of_its_stages(generator):
    xs = segments(generator, COUNTS, (4, 3, 2), 4, True)
    weights = [torch.randn(5, c, 3, 3, generator=generator, requires_grad=True) for c in (4, 3, 2)]

    def plain():
        return torch.cat([F.conv2d(x, w, padding=1).flatten() for x, w in zip(xs, weights, strict=True)])

    def ours():
        return grouped_conv2d(StageBatch.from_segments(xs), weights).values

    leaves = [*xs, *weights]
    forward, backward = flops(ours, leaves)
    assert (forward, backward) == flops(plain, leaves)
    assert backward == 2 * forward == 2 * 2 * 16 * 9 * 5 * (2 * 4 + 1 * 2)


@wanted_of(2)
def test_flops_of_linear_layers_are_those_of_their_stages(wanted, generator):
    ins, outs = (4, 3, 2), (5, 1, 3)
    xs = segments(generator, COUNTS, ins, 2, wanted[0])
    weights = [
        torch.randn(o, i, generator=generator, requires_grad=wanted[1])
        for o, i in zip(outs, ins, strict=True)
    ]
    biases = [torch.zeros(o, requires_grad=True) for o in outs]

    def plain():
        rows = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in xs]
        return torch.cat([F.linear(*layer).flatten() for layer in zip(rows, weights, biases, strict=True)])

    def ours():
        return grouped_linear(StageBatch.from_segments(xs), weights, biases).values

    leaves = [*xs, *weights]
    assert flops(ours, leaves) == flops(plain, leaves)


@wanted_of(3)
def test_flops_of_attention_are_those_of_its_products(wanted, generator):
    """Backward takes the scores again, as PyTorch's own formula says of its kernels."""
    tokens, context, head_dim = 6, 5, 4
    leaves = [
        torch.randn(2, 3, length, head_dim, generator=generator).requires_grad_(flag)
        for length, flag in zip((tokens, context, context), wanted, strict=True)
    ]

    def plain():
        q, k, v = (t.flatten(0, 1) for t in leaves)
        return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)

    scores = 2 * 2 * 3 * tokens * context * head_dim
    forward, backward = flops(plain, leaves)
    assert flops(lambda: attention(*leaves), leaves) == (forward, backward + scores)


def sdpa_flops(shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, int]:
    """PyTorch's own formula, over the shapes of each stage's queries and keys."""
    forward = sum(sdpa_flop_count(q, k, k) for q, k in shapes)
    return forward, sum(sdpa_backward_flop_count(q, q, k, k) for q, k in shapes)


def test_flops_of_attention_of_stages_are_those_of_sdpa(generator):
    channels, heads = (6, 4, 5), (2, 1, 1)
    q = stage_batch(generator, COUNTS, channels, 3, 3, requires_grad=True)
    k, v = (stage_batch(generator, COUNTS, channels, 2, 1, requires_grad=True) for _ in range(2))
    shapes = [((n, h, 9, c // h), (n, h, 2, c // h)) for n, c, h in zip(COUNTS, channels, heads, strict=True)]
    found = flops(lambda: attention(q, k, v, num_heads=heads).values, [t.values for t in (q, k, v)])
    assert found == sdpa_flops(shapes)


@pytest.mark.parametrize("layout", ["interleaved", "per_head", "blocked"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_flops_of_packed_attention_are_those_of_sdpa(layout, memory_format, generator):
    x = torch.randn(2, 24, 3, 4, generator=generator).to(memory_format=memory_format).requires_grad_()
    shape = (2, 2, 12, 4)
    assert flops(lambda: attention(x, num_heads=2, layout=layout), [x]) == sdpa_flops([(shape, shape)])


def test_flops_of_the_optimal_denoiser_are_those_of_its_products(generator):
    x, data = (
        torch.randn(3, 2, 4, generator=generator, requires_grad=True),
        torch.randn(7, 2, 4, generator=generator),
    )
    product_of_all = 2 * 3 * 7 * 8
    found = flops(lambda: optimal_denoiser(x, 0.5, data), [x])
    assert found == (2 * product_of_all, 3 * product_of_all)


@pytest.mark.parametrize("case", [case for case in CALLS if case.startswith(("group_norm", "resample2d"))])
def test_flops_of_norms_and_filters_are_none(case, generator):
    call = CALLS[case][1](4)
    leaves = call.leaves(generator)
    with FlopCounterMode(display=False) as counter:
        forward_and_backward(call, leaves)
    assert counter.get_total_flops() == 0


COUNT = """
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(2, 3)
with FlopCounterMode(display=False) as counter:
    msd_kernels.grouped_linear(x, [torch.randn(4, 3)])
print(counter.get_total_flops())
"""


def test_flops_are_registered_when_the_counter_is_imported_later():
    """In a user's own process: the counter's module imports Triton, and this library neither."""
    code = (
        "import sys, torch, msd_kernels\n"
        "print(*(name in sys.modules for name in ('triton', 'torch.utils.flop_counter')))\n"
        f"{COUNT}"
        "print(torch.utils.flop_counter.__loader__.__class__.__name__)\n"
        "print(any('msd_kernels' in type(finder).__module__ for finder in sys.meta_path))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False", "False", str(2 * 2 * 3 * 4), "SourceFileLoader", "False"]
    assert done.stderr == ""


def test_flops_are_registered_when_the_counter_was_imported_before():
    done = forks.run(f"import torch.utils.flop_counter, msd_kernels\n{COUNT}")
    assert (done.stdout.strip(), done.returncode) == (str(2 * 2 * 3 * 4), 0), done.stderr


def test_flops_that_cannot_be_registered_do_not_break_the_counter():
    code = (
        "import torch.utils.flop_counter, warnings\n"
        "def refuse(op): raise TypeError('other arguments')\n"
        "torch.utils.flop_counter.register_flop_formula = refuse\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import msd_kernels\n"
        f"{COUNT}"
        "print(caught[0].message)\n"
    )
    done = forks.run(code)
    assert done.stdout == (
        "0\nmsd_kernels: this PyTorch's FlopCounterMode counts none of its ops: other arguments\n"
    ), done.stderr
