"""diffusers' models with this library's norms and convolutions: the same outputs, gradients, files, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from msd_kernels.nn import ReplacedGroupNorm, Report, replace_conv2d, replace_group_norm, restore

pytestmark = pytest.mark.ecosystem
diffusers = pytest.importorskip("diffusers", reason="needs diffusers: make test-ecosystem installs it")

NORMS = {"norm_num_groups": 8}


def unet(**settings) -> nn.Module:
    settings = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    } | settings
    sizes = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
    return diffusers.UNet2DModel(**sizes, **settings, **NORMS)


def scaled_unet() -> nn.Module:
    """Whose embedding scales and shifts, and which resamples in residual blocks."""
    return unet(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        **NORMS,
    )


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **NORMS,
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the norms that no SiLU follows, of attention
    "U-Net": (unet, 4),
    "U-Net that scales and shifts": (scaled_unet, 0),
    "conditional U-Net": (conditional_unet, 10),
    "autoencoder": (autoencoder, 2),
}
each_model = pytest.mark.parametrize(("make", "alone"), MODELS.values(), ids=MODELS)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    channels = 4 if isinstance(model, diffusers.UNet2DConditionModel) else 3
    x = torch.randn(2, channels, 16, 16, generator=generator).to(dtype)
    if isinstance(model, diffusers.AutoencoderKL):
        return model(x).sample
    steps = torch.tensor([3, 500])
    if isinstance(model, diffusers.UNet2DModel):
        return model(x, steps).sample
    return model(x, steps, torch.randn(2, 7, 32, generator=generator).to(dtype)).sample


def replaced(model: nn.Module) -> tuple[nn.Module, Report, Report]:
    ours = copy.deepcopy(model)
    return ours, replace_group_norm(ours), replace_conv2d(ours)


def assert_alike(found: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    """A few dozen layers of float32 roundings."""
    assert (found - expected).norm() <= bound * expected.norm()


@each_model
def test_norms_are_replaced_and_fused(make, alone):
    model = made(make)
    _, norms, convolutions = replaced(model)
    count = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert (int(norms), norms.found, norms.left) == (count, count, {})
    assert norms.fused == count - alone
    served = [
        m
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and (m.kernel_size, m.stride) == ((3, 3), (1, 1)) and m.padding == (1, 1)
    ]
    assert int(convolutions) == sum(min(m.in_channels, m.out_channels) >= 16 for m in served)


@each_model
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_outputs_and_gradients_are_the_models_own(make, alone, order):
    model = made(make).to(memory_format=order)
    ours, _, _ = replaced(model)
    found, expected = output(ours), output(model)
    assert_alike(found, expected)
    gradients = [
        torch.autograd.grad(y.square().mean(), list(m.parameters()), allow_unused=True)
        for y, m in ((found, ours), (expected, model))
    ]
    pairs = [pair for pair in zip(*gradients, strict=True) if pair[1] is not None]
    # Of all together: those of the keys' biases are zero but for roundings.
    assert_alike(*(torch.cat([g.flatten() for g in part]) for part in zip(*pairs, strict=True)))


@each_model
def test_bfloat16_rounds_no_worse(make, alone):
    model = made(make)
    exact = output(model)
    theirs = copy.deepcopy(model).bfloat16()
    ours, _, _ = replaced(theirs)
    errors = [(output(m, torch.bfloat16).float() - exact).norm() for m in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


@each_model
def test_saved_models_are_plain_ones(make, alone, tmp_path):
    model = made(make)
    ours, _, _ = replaced(model)
    assert list(ours.state_dict()) == list(model.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), output(model))


@each_model
def test_restored_models_are_what_they_were(make, alone):
    model = made(make)
    ours, norms, convolutions = replaced(model)
    assert restore(ours) == norms + convolutions
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(output(ours), output(model))


@pytest.mark.parametrize("make", [unet, conditional_unet, autoencoder])
def test_gradient_checkpointing(make):
    ours, _, _ = replaced(made(make).train())
    whole = torch.autograd.grad(output(ours).square().mean(), list(ours.parameters()), allow_unused=True)
    ours.enable_gradient_checkpointing()
    parts = torch.autograd.grad(output(ours).square().mean(), list(ours.parameters()), allow_unused=True)
    pairs = [pair for pair in zip(parts, whole, strict=True) if pair[1] is not None]
    assert_alike(*(torch.cat([g.flatten() for g in part]) for part in zip(*pairs, strict=True)))


def test_lora_adapts_layers_and_convolutions():
    peft = pytest.importorskip("peft", reason="needs peft: make test-ecosystem installs it")
    ours, _, _ = replaced(made(conditional_unet))
    expected = output(ours)
    ours.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))
    y = output(ours)
    assert_alike(y, expected)
    y.square().mean().backward()
    adapted = [name for name, p in ours.named_parameters() if "lora_B" in name and p.grad is not None]
    assert any("conv1" in name for name in adapted)
    assert any("to_q" in name for name in adapted)


def test_swapped_activations_and_hooks_are_obeyed():
    model = made(unet)
    ours, _, _ = replaced(model)
    seen: list[Tensor] = []
    for each in (model, ours):
        each.conv_act = nn.ReLU()
        block = each.mid_block.resnets[0]
        block.norm1.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_alike(output(ours), output(model))
    assert_alike(*seen)
    assert isinstance(ours.mid_block.resnets[0].norm1, ReplacedGroupNorm)
