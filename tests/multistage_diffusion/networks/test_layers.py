"""The layers by themselves: loading, what they refuse, and what they leave as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msd_kernels import StageBatch
from msd_kernels.runtime import processor
from multistage_diffusion.networks.embeddings import FourierEmbedding
from multistage_diffusion.networks.layers import (
    OnStages,
    PerStage,
    StageConv2d,
    StageLayerNorm,
    StageLinear,
    StageModule,
    StageStridedConv2d,
    StageTable,
)

COUNTS, WIDTHS = (2, 0, 1), (8, 4, 12)


def batch(
    channels: tuple[int, ...] = WIDTHS, size: int = 2, counts=COUNTS, dtype=torch.float32
) -> StageBatch:
    generator = torch.Generator().manual_seed(0)
    segments = zip(counts, channels, strict=True)
    return StageBatch.from_segments(
        [torch.randn(n, c, size, size, generator=generator).to(dtype) for n, c in segments]
    )


def conv(**arguments) -> StageConv2d:
    return StageConv2d(WIDTHS, (5, 6, 7), 3, **arguments)


def random_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn(t.shape, device="cpu") for name, t in module.state_dict().items()}


def assert_state(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = module.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_every_stage_has_an_ordinary_parameter():
    layer = conv()
    named = dict(layer.named_parameters())
    assert (
        named.keys()
        == layer.state_dict().keys()
        == {f"{n}.{s}" for n in ("weight", "bias") for s in range(3)}
    )
    assert [w.shape for w in layer.weight] == [(o, i, 3, 3) for o, i in zip((5, 6, 7), WIDTHS, strict=True)]
    for parameter in layer.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
    assert layer.weight[1] is named["weight.1"]
    assert layer.weight() == list(layer.weight) == layer.weight.tensors()
    assert (len(layer.weight), layer.weight.device.type, layer.weight.dtype) == (3, "cpu", torch.float32)


def test_gradients_are_those_of_one_layer_per_stage():
    layer, x = conv(), batch()
    layer(x).values.square().sum().backward()
    for stage, segment in enumerate(x.segments()):
        alone = nn.Conv2d(WIDTHS[stage], 5 + stage, 3, padding=1)
        alone.load_state_dict({"weight": layer.weight[stage], "bias": layer.bias[stage]})
        alone(segment).square().sum().backward()
        for name, holder in (("weight", layer.weight), ("bias", layer.bias)):
            if COUNTS[stage]:
                theirs = getattr(alone, name).grad
                torch.testing.assert_close(holder[stage].grad, theirs, rtol=1e-4, atol=1e-5)
                assert holder[stage].grad.is_contiguous()
            else:
                assert holder[stage].grad is None


def test_weights_in_float32_get_gradients_in_float32_from_16_bit_features():
    layer, x = conv(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.values.float().square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert {gradient.dtype for gradient in found} == {torch.float32}
    layer.zero_grad()
    layer(x).values.square().sum().backward()
    exact = [p.grad for p in layer.parameters() if p.grad is not None]
    for gradient, expected in zip(found, exact, strict=True):
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_a_layer_of_some_stages_is_named_after_them():
    module = OnStages(StageLinear((4, 12), (5, 7)), (0, 2))
    assert {name for name, _ in module.named_parameters()} == {
        f"module.{n}.{s}" for n in ("weight", "bias") for s in (0, 2)
    }


def test_the_holder_of_a_layers_weights_says_that_it_cannot_be_sharded():
    class FSDPPerStage(PerStage):
        """The class that fully_shard would give it."""

    layer = StageLinear(WIDTHS, (5, 6, 7))
    layer.weight.__class__ = FSDPPerStage
    with pytest.raises(RuntimeError, match="apply it to the layer, or to what contains it"):
        layer(batch())


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_takes_values_that_require_grad(assign):
    layer, other = conv(), conv()
    state = {name: tensor.requires_grad_() for name, tensor in random_state(layer).items()}
    layer.load_state_dict(state, assign=assign)
    assert_state(layer, state)
    layer.load_state_dict(other.state_dict(keep_vars=True), assign=assign)
    assert_state(layer, other.state_dict())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("build", [conv, lambda: FourierEmbedding((8, 6))], ids=["parameters", "buffer"])
def test_load_state_dict_assigns_to_a_module_on_the_meta_device(build):
    with torch.device("meta"):
        module = build()
    state = {name: torch.randn(t.shape, dtype=torch.float64) for name, t in module.state_dict().items()}
    names = {name for name, _ in module.named_parameters()}
    missing, unexpected = module.load_state_dict(state, assign=True)
    assert not missing + unexpected
    assert_state(module, state)
    assert {name for name, _ in module.named_parameters()} == names
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_load_state_dict_assigns_some_stages_and_keeps_the_others():
    layer = conv()
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected["weight.1"] = torch.randn(6, 4, 3, 3)
    layer.load_state_dict({"weight.1": expected["weight.1"]}, strict=False, assign=True)
    assert_state(layer, expected)


class Scaled(StageConv2d):
    """A layer with more than its stages' parameters."""

    def __init__(self, value: float) -> None:
        super().__init__(WIDTHS, (5, 6, 7), 3)
        self.gain = nn.Parameter(torch.full((2,), value))
        self.register_buffer("steps", torch.tensor([value]))
        self.register_buffer("scratch", torch.tensor([value]), persistent=False)


@pytest.mark.parametrize("assign", [False, True])
def test_what_a_subclass_adds_is_saved_and_loaded(assign):
    layer, other = Scaled(1.0), Scaled(2.0)
    state = other.state_dict()
    assert state.keys() == conv().state_dict().keys() | {"gain", "steps"}
    layer.load_state_dict(state, assign=assign)
    assert_state(layer, state)
    assert layer.gain.tolist() == [2.0, 2.0]
    assert layer.steps.tolist() == [2.0]
    assert layer.scratch.tolist() == [1.0]
    assert {name for name, _ in layer.named_parameters()} == conv().state_dict().keys() | {"gain"}
    missing, unexpected = layer.load_state_dict(conv().state_dict() | {"extra": torch.zeros(1)}, strict=False)
    assert (missing, unexpected) == (["gain", "steps"], ["extra"])


@pytest.mark.parametrize("key", ["bias.0", "colour"])
def test_load_state_dict_names_parameters_that_the_layer_lacks(key):
    layer = nn.ModuleDict({"conv": conv(bias=False)})
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*conv\.{key}"):
        layer.load_state_dict(layer.state_dict() | {f"conv.{key}": torch.zeros(5)})


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(3, 5, 2, 2), TypeError, r"residual must be a StageBatch, got Tensor"),
        (StageBatch(torch.zeros(68), COUNTS, (5, 6, 7), 4, 1), ValueError, r"at 2x2, got .* at 4x1"),
        (StageBatch(torch.zeros(1), (1,), (1,), 1, 1), ValueError, r"counts=\(2, 0, 1\).* got counts=\(1,\)"),
        (batch((5, 6, 7), dtype=torch.float64), TypeError, r"must be torch\.float32 .* got torch\.float64"),
        (batch((5, 6, 7)).to("meta"), ValueError, r"residual is on meta, but x is on cpu"),
    ],
    ids=["tensor", "size", "broadcast", "dtype", "device"],
)
def test_linear_refuses_a_residual_that_is_not_like_its_output(residual, error, message):
    with pytest.raises(error, match=f"StageLinear: .*{message}"):
        StageLinear(WIDTHS, (5, 6, 7))(batch(), residual=residual)


def test_linear_adds_its_residual_and_scales():
    layer, residual = StageLinear(WIDTHS, (5, 6, 7)), batch((5, 6, 7))
    expected = 0.5 * (layer(batch()).values + residual.values)
    assert torch.equal(layer(batch(), residual=residual, scale=0.5).values, expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(batch(), residual=residual).values
    # The product is rounded to bfloat16: 2**-9 of values up to about 4.
    torch.testing.assert_close(y, 2 * expected, rtol=0.01, atol=0.03)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: StageConv2d((8,), (5,), 0), ValueError, r"StageConv2d: kernel=0 must be at least 1"),
        (lambda: StageConv2d((8,), (5,), 2), ValueError, r"StageConv2d: kernel must be odd, got 2"),
        (
            lambda: StageConv2d((8,), (5,), 3.0),
            TypeError,
            r"StageConv2d: kernel must be an integer, got 3\.0",
        ),
        (lambda: StageConv2d((0,), (5,), 3), ValueError, r"StageConv2d: in_channels=0 must be at least 1"),
        (
            lambda: StageConv2d((8,), (5,), 3, resample="x", filter=(1, 3, 3, 1)),
            ValueError,
            r"StageConv2d: resample must be None, 'up' or 'down', got 'x'",
        ),
        (lambda: StageLinear((0,), (0,)), ValueError, r"StageLinear: in_features=0 must be at least 1"),
        (
            lambda: StageLinear((8,), (None,)),
            TypeError,
            r"StageLinear: out_features must be an integer, got None",
        ),
        (
            lambda: StageStridedConv2d((8,), (5,), 0),
            ValueError,
            r"StageStridedConv2d: kernel=0 must be at least 1",
        ),
        (lambda: StageStridedConv2d((8,), (5,), 3, stride=0), ValueError, r"stride=0 must be at least 1"),
        (lambda: StageStridedConv2d((8,), (5,), 3, padding=-1), ValueError, r"padding=-1 must be at least 0"),
        (lambda: StageTable(0, (8,)), ValueError, r"StageTable: rows=0 must be at least 1"),
    ],
)
def test_layers_refuse_impossible_sizes_when_they_are_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    "layer",
    [StageStridedConv2d(WIDTHS, (5, 6, 7), 3), StageTable(16, WIDTHS), StageLayerNorm(WIDTHS)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (batch((7, 4, 12), 4), ValueError, r"channels=\(8, 4, 12\), one per stage, got \(7, 4, 12\)"),
        (batch((8,), 4, (1,)), ValueError, r"channels=\(8, 4, 12\), one per stage, got \(8,\)"),
        (torch.zeros(3, 8, 4, 4), TypeError, r"x must be a StageBatch, got Tensor"),
        (batch(size=4, dtype=torch.int64), TypeError, r"x must be of a floating dtype, got torch\.int64"),
    ],
    ids=["channels", "stages", "tensor", "integers"],
)
def test_layers_refuse_other_input(layer: StageModule, x, error, message):
    with pytest.raises(error, match=f"{type(layer).__name__}: .*{message}"):
        layer(x)


@pytest.mark.parametrize("size", [2, 5])
def test_a_table_refuses_another_number_of_pixels(size):
    with pytest.raises(ValueError, match=rf"StageTable: x must have 16 pixels, got {size}x{size}"):
        StageTable(16, WIDTHS)(batch(size=size))


@pytest.mark.parametrize(
    ("arguments", "smallest"),
    [({"kernel": 3}, 3), ({"kernel": 3, "padding": 1}, 1), ({"kernel": 3, "filter": (1, 3, 3, 1)}, 2)],
    ids=["bare", "padding", "filter"],
)
def test_a_strided_convolution_takes_its_smallest_image_and_refuses_smaller_ones(arguments, smallest):
    layer = StageStridedConv2d(WIDTHS, (5, 6, 7), **arguments)
    assert layer(batch(size=smallest)).layout == (COUNTS, (5, 6, 7), 1, 1)
    if smallest > 1:
        with pytest.raises(ValueError, match=rf"x must be at least {smallest}x{smallest} for kernel 3"):
            layer(batch(size=smallest - 1))


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        (
            (0, 1, 2),
            ValueError,
            r"module must be built for the stages \(0, 1, 2\), got a StageConv2d of 2 stages",
        ),
        ((2, 0), ValueError, r"stages must be ascending, at least one, got \(2, 0\)"),
        ((0, 0), ValueError, r"stages must be ascending, at least one, got \(0, 0\)"),
        ((), ValueError, r"stages must be ascending, at least one, got \(\)"),
        ((-1, 0), ValueError, r"stages=-1 must be at least 0"),
        ((0.0, 2), TypeError, r"stages must be an integer, got 0\.0"),
    ],
)
def test_on_stages_refuses_stages_that_do_not_fit_its_module(stages, error, message):
    with pytest.raises(error, match=f"OnStages: {message}"):
        OnStages(StageConv2d((8, 12), (8, 12), 3), stages)


def test_on_stages_refuses_a_batch_without_its_stages():
    with pytest.raises(ValueError, match=r"OnStages: x must have the stages \(0, 5\), got 3 stages"):
        OnStages(StageConv2d((8, 12), (8, 12), 3), (0, 5))(batch())
    with pytest.raises(TypeError, match="OnStages: x must be a StageBatch, got Tensor"):
        OnStages(StageConv2d((8, 12), (8, 12), 3), (0, 2))(torch.zeros(3, 8, 4, 4))


def test_on_stages_leaves_the_other_stages_alone():
    module, x = StageConv2d((8, 12), (8, 12), 3), batch(counts=(2, 1, 1))
    first, second, third = OnStages(module, (0, 2))(x).segments()
    expected = module(StageBatch.from_segments([x.segments()[0], x.segments()[2]])).segments()
    assert torch.equal(first, expected[0])
    assert torch.equal(second, x.segments()[1])
    assert torch.equal(third, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_strided_convolution_sums_in_float32_where_the_processor_lacks_the_type(dtype, monkeypatch):
    monkeypatch.setattr(processor, "computes_in", lambda dtype: dtype == torch.float32)
    layer = StageStridedConv2d((64,), (8,), 3, padding=1).to(dtype)
    x = torch.randn(2, 64, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(StageBatch.from_dense(x))
    weight = layer.weight[0]
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), stride=2, padding=1)
    assert y.dtype == dtype
    # One rounding of the result, and float32's of the sum.
    torch.testing.assert_close(y.dense().double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-4)
