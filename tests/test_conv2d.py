"""msd_kernels.nn.Conv2d and replace_conv2d against PyTorch's own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import msd_kernels
from helpers import pickled, saved
from msd_kernels.dispatch.backends import use
from msd_kernels.nn import Conv2d, replace_conv2d, replace_group_norm, restore
from msd_kernels.ops.grouped_conv2d import cpu, dense
from msd_kernels.runtime.extension import load

needs_kernels = pytest.mark.skipif(load("cpu").module is None, reason=load("cpu").reason)

ORDERS = (torch.contiguous_format, torch.channels_last)
# Relative to the norm of a float64 result: Winograd's in float32 with some to spare (1e-6 at more channels), one
# rounding of 16 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[str]]:
    """What the compiled kernels were called for."""
    called = []

    def counted(name: str) -> Callable:
        own = getattr(cpu, name)

        def call(*args):
            called.append(name)
            return own(*args)

        return call

    for name in ("grouped_conv2d", "grouped_conv2d_backward"):
        monkeypatch.setattr(cpu, name, counted(name))
    return called


def layers(channels: int, outs: int, dtype: torch.dtype, order: torch.memory_format, **settings) -> list:
    """Ours, PyTorch's, and PyTorch's in float64, with the same weights."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(channels, outs, 3, padding=1, **settings).to(dtype).to(memory_format=order)
    ours = copy.deepcopy(theirs)
    assert replace_conv2d(ours) == 1
    return [ours, theirs, copy.deepcopy(theirs).double()]


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters, of a cotangent that lies as NCHW."""
    x = x.detach().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@needs_kernels
@pytest.mark.parametrize("order", ORDERS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("weight_order", ORDERS, ids=["OIHW", "OHWI"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 32, 9, 13, 48), (1, 19, 8, 7, 33)], ids=str)
def test_conv2d_is_torchs_with_all_gradients(shape, dtype, weight_order, order, calls):
    batch, channels, height, width, outs = shape
    x = torch.randn(batch, channels, height, width).to(dtype).contiguous(memory_format=order)
    ours, theirs, exact = layers(channels, outs, dtype, weight_order)
    with use("cpu"):
        found = results(ours, x)
    assert calls == ["grouped_conv2d", "grouped_conv2d_backward"]
    original = results(theirs, x)
    for a, b, wide in zip(found, original, results(exact, x.double()), strict=True):
        assert (a.double() - wide).norm() <= TOLERANCE[dtype] * wide.norm()
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    assert found[0].stride() == original[0].stride()
    assert found[1].stride() == x.stride()
    assert found[2].stride() == theirs.weight.stride()


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["input", "weight"])
def test_conv2d_computes_single_gradients(wanted, bias):
    ours, theirs, _ = layers(32, 32, torch.float32, torch.channels_last, bias=bias)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    found = []
    for layer in (ours, theirs):
        inputs = [t.detach().requires_grad_(flag) for t, flag in zip((x, layer.weight), wanted, strict=True)]
        with use("cpu"):
            y = torch.func.functional_call(layer, {"weight": inputs[1]}, inputs[0])
        leaf = inputs[0] if wanted[0] else inputs[1]
        found.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * found[1].abs().max().item())


@needs_kernels
def test_conv2d_takes_views_and_broadcast_cotangents():
    ours, theirs, _ = layers(32, 32, torch.float32, torch.contiguous_format)
    whole = torch.randn(2, 40, 16, 16)
    views = [
        whole[:, 3:35],
        whole.contiguous(memory_format=torch.channels_last)[:, 3:35],
        whole[:, :32, ::2, 1::3],
    ]
    for x in views:
        x = x.requires_grad_() if x.is_leaf else x
        with use("cpu"):
            y = ours(x)
        expected = theirs(x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(out.sum(), layer.weight)[0] for out, layer in ((y, ours), (expected, theirs))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@needs_kernels
def test_conv2d_of_special_values_is_torchs():
    ours, theirs, _ = layers(32, 32, torch.float32, torch.contiguous_format)
    x = torch.randn(3, 32, 8, 8)
    x[0, 1, 2, 3], x[2, 0, 0, 0] = float("nan"), float("inf")
    with use("cpu"):
        y = ours(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5, equal_nan=True)


SERVED = {
    "channels_last": ((1, 32, 16, 16), {}, torch.channels_last, None),
    "NCHW of many channels": ((1, 64, 16, 16), {}, torch.contiguous_format, None),
    "NCHW of few channels": ((1, 32, 16, 16), {}, torch.contiguous_format, "transpositions of NCHW"),
    "same": ((1, 32, 16, 16), {"padding": "same"}, torch.channels_last, None),
    "stride": ((1, 32, 16, 16), {"stride": 2}, torch.channels_last, r"stride must be \(1, 1\), got \(2, 2\)"),
    "padding": ((1, 32, 16, 16), {"padding": 0}, torch.channels_last, r"padding must be \(1, 1\)"),
    "dilation": ((1, 32, 16, 16), {"dilation": 2}, torch.channels_last, "dilation"),
    "groups": ((1, 32, 16, 16), {"groups": 2}, torch.channels_last, "groups must be 1, got 2"),
    "mode": ((1, 32, 16, 16), {"padding_mode": "reflect"}, torch.channels_last, "padding_mode"),
    "kernel": ((1, 32, 16, 16), {"kernel_size": 1, "padding": 0}, torch.channels_last, "kernel_size"),
    "few channels": ((1, 8, 16, 16), {}, torch.channels_last, "8 channels are too few"),
    "one tile": ((1, 32, 4, 4), {}, torch.channels_last, "single tile"),
    "bad fit": ((1, 32, 1, 5), {}, torch.channels_last, "tiles of 4×4 fit"),
    "no samples": ((0, 32, 16, 16), {}, torch.channels_last, "with values"),
}


@needs_kernels
@pytest.mark.skipif(
    cpu.processor.kind().cap == "portable", reason="Winograd is not measured on this processor"
)
@pytest.mark.parametrize(("shape", "settings", "order", "reason"), SERVED.values(), ids=SERVED)
def test_conv2d_serves_and_explains(shape, settings, order, reason, calls):
    channels = shape[1]
    settings = {"in_channels": channels, "out_channels": channels, "kernel_size": 3, "padding": 1} | settings
    ours, theirs = Conv2d(**settings), nn.Conv2d(**settings)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape).contiguous(memory_format=order)
    explanation = ours.explain(x)
    y, expected = ours(x), theirs(x)
    assert explanation.backend == ("cpu" if reason is None else "library")
    assert calls == (["grouped_conv2d"] if reason is None else [])
    if reason is None:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    else:
        assert re.search(reason, explanation.why_not["cpu"])
        assert torch.equal(y, expected)


def test_conv2d_of_float64_a_forced_library_and_other_devices_is_torchs(calls):
    x = torch.randn(1, 64, 8, 8)
    ours, theirs, exact = layers(64, 64, torch.float32, torch.contiguous_format)
    with use("grouped_conv2d=library"):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(copy.deepcopy(ours).double()(x.double()), exact(x.double()))
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).shape == x.shape
    assert calls == []


@needs_kernels
def test_conv2d_reads_no_parameters_that_do_not_fit(calls):
    x = torch.randn(1, 64, 8, 8)
    for name, wrong in (("weight", torch.randn(64, 64, 5, 5)), ("bias", torch.randn(32))):
        ours, theirs, _ = layers(64, 64, torch.float32, torch.contiguous_format)
        outcomes = []
        for layer in (ours, theirs):
            setattr(layer, name, nn.Parameter(wrong))
            try:
                outcomes.append(layer(x).shape)
            except RuntimeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
    assert calls == []


def test_conv2d_takes_one_image_without_a_batch():
    ours, theirs, _ = layers(64, 48, torch.float32, torch.contiguous_format)
    x = torch.randn(64, 12, 8)
    y = ours(x)
    assert y.shape == (48, 12, 8)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [torch.randn(1, 32, 8, 8), torch.randn(2, 64), torch.ones(1, 64, 8, 8).half()]
)
def test_conv2d_refuses_what_torchs_does(wrong):
    ours, theirs, _ = layers(64, 64, torch.float32, torch.contiguous_format)
    messages = []
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            layer(wrong)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@needs_kernels
@pytest.mark.parametrize("order", ORDERS, ids=["NCHW", "NHWC"])
def test_conv2d_under_autocast_is_torchs(order, calls):
    ours, theirs, exact = layers(64, 64, torch.float32, order)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=order)
    with use("cpu"), torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), theirs(x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), ours.weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert y.stride() == expected.stride()
    assert gradient.dtype == torch.float32
    wide = exact(x.double())
    assert (
        y.double() - wide
    ).norm() <= 8e-3 * wide.norm()  # the input, the weight and the output are rounded
    assert calls == ["grouped_conv2d", "grouped_conv2d_backward"]


@needs_kernels
def test_conv2d_has_derivatives_of_any_order():
    ours, theirs, _ = layers(32, 32, torch.float32, torch.channels_last)
    x = torch.randn(1, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    found = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with use("cpu"):
            y = layer(leaf).square().sum()
        leaves = [leaf, layer.weight, layer.bias]
        first = torch.autograd.grad(y, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@needs_kernels
def test_conv2d_passes_opcheck():
    ours, _, _ = layers(16, 17, torch.float32, torch.channels_last)
    x = torch.randn(2, 16, 5, 6, requires_grad=True)
    layout = dense.Conv2dLayout((2,), (16,), (0,), (17,), 5, 6, 3, "none")
    flat = (*layout, True)
    with use("cpu"):
        torch.library.opcheck(torch.ops.msd_kernels.conv2d, (x, ours.weight, ours.bias, *flat))
        dy = torch.randn(2, 17, 5, 6)
        wanted = [True, True, True]
        torch.library.opcheck(
            torch.ops.msd_kernels.conv2d_backward, (dy, x.detach(), ours.weight.detach(), *layout, wanted)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [3]}, r"x must be \[3, 16, 5, 6\]"),
        ({"out_channels": [18]}, r"weight must be \[18, 16, 3, 3\]"),
        ({"kernel": 5}, "3×3 kernels"),
        ({"counts": [1, 1], "channels": [16, 16]}, "one stage"),
        ({"height": 2**62, "width": 2**62}, "x must be"),
    ],
    ids=["counts", "outs", "kernel", "stages", "large"],
)
def test_conv2d_refuses_sizes_that_lie(change, message):
    fields = {"counts": [2], "channels": [16], "skip_channels": [0], "out_channels": [17]}
    fields |= {"height": 5, "width": 6, "kernel": 3, "resample": "none"} | change
    tensors = torch.randn(2, 16, 5, 6), torch.randn(17, 16, 3, 3), torch.randn(17)
    with pytest.raises(ValueError, match=message):
        torch.ops.msd_kernels.conv2d(*tensors, *fields.values(), True)


@needs_kernels
def test_conv2d_is_batch_invariant_where_it_is_asked_for():
    ours, _, _ = layers(32, 32, torch.float32, torch.channels_last)
    x = torch.randn(3, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), msd_kernels.batch_invariant():
        whole = ours(x)
        for sample in range(3):
            assert torch.equal(ours(x[sample : sample + 1])[0], whole[sample])


def test_conv2d_flops_are_torchs():
    ours, theirs, _ = layers(32, 48, torch.float32, torch.channels_last)
    counts = []
    for layer in (ours, theirs):
        x = torch.randn(2, 32, 8, 8, requires_grad=True)
        with FlopCounterMode(display=False) as counter, use("cpu"):
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def network(order: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Sequential(nn.Conv2d(64, 64, 3, padding="same"), nn.Conv2d(64, 8, 1)),
    ).to(memory_format=order)


class OwnConv2d(nn.Conv2d):
    """Somebody's own."""


def test_replace_conv2d_reports_what_it_leaves_alone():
    model = network()
    model.append(OwnConv2d(8, 8, 3, padding=1))
    patched = nn.Conv2d(64, 64, 3, padding=1)
    patched.forward = lambda x: x
    model.append(patched)
    report = replace_conv2d(model)
    assert (int(report), report.found, report.kind) == (2, 7, "convolutions")
    assert report.left == {
        "0": "3 channels are too few for the transforms to pay",
        "4": "stride must be (1, 1), got (2, 2)",
        "5.1": "8 channels are too few for the transforms to pay",
        "6": "a subclass, OwnConv2d",
        "7": "has a forward of its own",
    }
    assert str(report).startswith("2 of 7 convolutions replaced\n  left 0: 3 channels")
    assert replace_conv2d(model) == 0


def test_restore_undoes_both_replacements():
    model, x = network(), torch.randn(1, 3, 8, 8)
    text, expected, held = repr(model), model(x), [dict(vars(m)) for m in model.modules()]
    replace_group_norm(model)
    replace_conv2d(model)
    assert restore(model) == 3
    assert repr(model) == text
    assert [dict(vars(m)) for m in model.modules()] == held
    assert torch.equal(model(x), expected)
    assert restore(model) == 0


def test_restore_refuses_a_convolution_that_was_changed():
    model = network()
    replace_conv2d(model)
    torch.nn.utils.parametrize.register_parametrization(model[3], "weight", nn.Tanh())
    with pytest.raises(ValueError, match="restore: the convolution '3' was changed after it was replaced"):
        restore(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[3], "weight")
    assert restore(model) == 2


TRAVELS: dict[str, Callable[[nn.Module, Tensor], Callable]] = {
    "pickle": lambda model, x: pickled(model),
    "save": lambda model, x: saved(model),
    "deepcopy": lambda model, x: copy.deepcopy(model),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "jit.trace": lambda model, x: torch.jit.trace(model, x),
    "jit.script": lambda model, x: torch.jit.script(model),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, dynamic=True, backend="eager"),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "checkpoint": lambda model, x: lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
    "vmap": lambda model, x: lambda x: torch.func.vmap(lambda image: model(image[None])[0])(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", ORDERS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("travel", TRAVELS.values(), ids=TRAVELS)
def test_replaced_models_travel(travel, order):
    model, x = network(order), torch.randn(2, 3, 8, 8)
    expected, keys = model(x), list(model.state_dict())
    replace_conv2d(model)
    torch.testing.assert_close(travel(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys


def test_hooks_of_convolutions_run():
    model, seen = network(), []
    replace_conv2d(model)
    model[3].register_forward_hook(lambda module, args, output: seen.append(output))
    model[3].register_full_backward_hook(lambda module, given, gradients: seen.append(gradients[0]))
    y = model(torch.randn(1, 3, 8, 8))
    y.sum().backward()
    assert [t.shape for t in seen] == [(1, 64, 8, 8), (1, 64, 8, 8)]


def test_conv2d_drops_in_for_torchs():
    settings = {
        "stride": 2,
        "padding": 2,
        "dilation": 3,
        "groups": 4,
        "bias": False,
        "padding_mode": "circular",
    }
    theirs, ours = nn.Conv2d(8, 12, (5, 3), **settings), Conv2d(8, 12, (5, 3), **settings)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 19, 17)
    assert torch.equal(ours(x), theirs(x))
