"""The networks in ordinary PyTorch that ours are measured against compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import import_benchmarks

import_benchmarks()

import plain_network  # noqa: E402
import whole_networks  # noqa: E402

from multistage_diffusion.networks import build  # noqa: E402

# Every kind of block: with and without attention, up and down, and with a skip that is projected in some stages only.
UNET = {
    "family": "edm",
    "image_size": 16,
    "encoder_widths": (16,),
    "decoder_widths": (24, 16, 8),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (8,),
    "dropout": 0.0,
    "augment_dim": 9,
}
SEPARATE = {**UNET, "encoder_widths": (32, 16, 8), "decoder_widths": (32, 16, 8)}
STAGE = torch.tensor([0, 2, 1, 0, 0, 1])


def new_network(config=UNET) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(config)
    whole_networks.draw_weights(model)
    return model


@pytest.fixture
def batch(generator) -> tuple[Tensor, Tensor]:
    size = (len(STAGE), 3, UNET["image_size"], UNET["image_size"])
    return torch.randn(size, generator=generator), torch.rand(len(STAGE), generator=generator)


@pytest.mark.parametrize("config", [UNET, SEPARATE], ids=["shared encoder", "separate networks"])
def test_twins_equal_the_network_and_its_gradients(config, batch, generator):
    model, (x, noise) = new_network(config), batch
    y = model(x, noise, STAGE)
    dy = torch.randn(y.shape, generator=generator)
    gradients = torch.autograd.grad(y, list(model.parameters()), dy, allow_unused=True)
    expected = plain_network.named_gradients(model, gradients)
    found: dict[str, Tensor] = {}
    for stage, twin in enumerate(plain_network.twins(model)):
        own = stage == STAGE
        plain = twin(x[own], noise[own])
        torch.testing.assert_close(plain, y[own], rtol=1e-4, atol=1e-4)
        for name, gradient in plain_network.named_gradients(
            twin, torch.autograd.grad(plain, list(twin.parameters()), dy[own])
        ).items():
            found[name] = found.get(name, 0) + gradient
    unused = {name for name in model.state_dict() if name.startswith("map_augment.")}
    assert unused
    assert set(found) == set(expected) == set(model.state_dict()) - unused
    for name, gradient in found.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(expected[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)


def test_twins_share_what_the_stages_share_and_nothing_with_the_network():
    model = new_network()
    parameters = [dict(twin.named_parameters()) for twin in plain_network.twins(model)]
    shared = {name for name in parameters[0] if not name.startswith("dec.")}
    for name in set(parameters[0]) | set(parameters[1]):
        if name in shared:
            assert parameters[0][name] is parameters[1][name] is parameters[2][name]
        elif name in parameters[0] and name in parameters[1]:
            assert parameters[0][name] is not parameters[1][name]
    before = model.state_dict()["dec.16x16.head.conv.weight.1"].clone()
    with torch.no_grad():
        parameters[1]["dec.16x16.head.conv.weight"].zero_()
    assert torch.equal(model.state_dict()["dec.16x16.head.conv.weight.1"], before)


def test_twins_keep_the_layout_and_the_dtype_that_are_fastest(batch):
    """A convolution that has to turn its input round or to cast it would make the comparison unfair."""
    twin = plain_network.twins(new_network())[0]
    seen = []

    def record(layer, inputs):
        layout = torch.channels_last
        seen.append((inputs[0].dtype, inputs[0].is_contiguous(memory_format=layout)))
        assert layer.weight.is_contiguous(memory_format=layout)
        assert not torch.is_autocast_enabled("cpu")  # it would run the norms of a GPU in float32

    for layer in twin.modules():
        if isinstance(layer, plain_network.Conv2d):
            layer.register_forward_pre_hook(record)
    x, noise = batch
    with torch.autocast("cpu", torch.bfloat16):
        y = twin(x, noise)
    assert y.dtype == torch.float32
    assert len(seen) > 20
    assert set(seen) == {(torch.bfloat16, True)}
    assert twin.bfloat16()(x.bfloat16(), noise).dtype == torch.bfloat16


def test_twins_drop_out_in_training_only(batch):
    x, noise = batch
    model = new_network({**UNET, "dropout": 0.5}).eval()
    twin = plain_network.twins(model)[0]
    assert torch.equal(twin(x, noise), twin(x, noise))
    twin.train()
    assert not torch.equal(twin(x, noise), twin(x, noise))


@pytest.mark.full
def test_a_twin_is_compiled_whole(batch):
    x, noise = batch
    twin = plain_network.twins(new_network())[0]
    compiled = torch.compile(twin, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for network in (compiled, twin):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x, noise)
        gradients = torch.autograd.grad(y.square().mean(), list(twin.parameters()))
        results.append({"y": y, **plain_network.named_gradients(twin, gradients)})
    whole_networks.check("compiled", *results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample_filter": (1, 3, 3, 1)}, r"resample_filter must be \[1, 1\], got \[1, 3, 3, 1\]"),
        ({"label_dim": 10}, "label_dim must be 0, got 10"),
        ({"encoder_type": "residual"}, "encoder_type must be 'standard', got 'residual'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_that_the_twins_cannot_be_like_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plain_network.twins(build({**UNET, **changes}))


def test_another_family_is_refused():
    with pytest.raises(TypeError, match="needs an EDMUNet, got NCSNpp"):
        plain_network.PlainUNet(build({"family": "ncsnpp", "image_size": 16, "decoder_widths": (64,)}), 0)
