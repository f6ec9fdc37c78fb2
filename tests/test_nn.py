"""The drop-in modules against those of torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msd_kernels.nn import GroupNorm, replace_group_norm

# float32: both round the same formula a few times; measured worst 7e-7 on values up to 5.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_group_norm_drops_in_for_torchs():
    torch.manual_seed(0)
    theirs = nn.GroupNorm(4, 32, eps=1e-6)
    nn.init.normal_(theirs.weight)
    ours = GroupNorm(4, 32, eps=1e-6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_group_norm_applies_its_activation_scale_and_shift():
    torch.manual_seed(0)
    ours = GroupNorm(4, 32, activation="silu")
    x, scale, shift = torch.randn(2, 32, 5, 7), torch.randn(2, 32), torch.randn(2, 32)
    z = nn.functional.group_norm(x, 4) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(ours(x, scale=scale, shift=shift), nn.functional.silu(z), **CLOSE)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Sequential(nn.Conv2d(16, 8, 1), nn.GroupNorm(2, 8, affine=False), nn.ReLU()),
    )


@pytest.mark.parametrize("fuse_silu", [True, False])
def test_replace_group_norm_keeps_outputs_gradients_and_state(fuse_silu):
    before, after = convolutions(), convolutions()
    assert replace_group_norm(after, fuse_silu=fuse_silu) == 2
    assert isinstance(after[1], GroupNorm)
    assert isinstance(after[2], nn.Identity if fuse_silu else nn.SiLU)
    assert after.state_dict().keys() == before.state_dict().keys()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(after(x), before(x), **CLOSE)
    after(x).square().sum().backward()
    before(x).square().sum().backward()
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_replace_group_norm_keeps_a_shared_norm_shared():
    norm = nn.GroupNorm(2, 4)
    model = nn.ModuleList([norm, nn.Sequential(norm)])
    assert replace_group_norm(model) == 1
    assert model[0] is model[1][0]
    assert model[0].weight is norm.weight


def test_replace_group_norm_fuses_no_activation_into_a_shared_norm():
    norm = nn.GroupNorm(2, 4)
    model = nn.ModuleList([norm, nn.Sequential(norm, nn.SiLU())])
    replace_group_norm(model)
    assert model[0].activation is None
    assert isinstance(model[1][1], nn.SiLU)


def test_replace_group_norm_leaves_subclasses_alone():
    class Own(nn.GroupNorm):
        pass

    model = nn.Sequential(Own(2, 4))
    assert replace_group_norm(model) == 0
    assert type(model[0]) is Own


@pytest.mark.parametrize("activation", ["relu", "SiLU", 1, nn.SiLU()], ids=str)
def test_group_norm_refuses_another_activation_when_it_is_built(activation):
    with pytest.raises(ValueError, match="GroupNorm: activation must be None or 'silu', got"):
        GroupNorm(2, 8, activation=activation)


def doubles(*args) -> torch.Tensor:
    """As a forward hook."""
    return 2 * args[-1]


def norm_and_silu() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())


def test_replace_group_norm_leaves_a_norm_with_hooks_alone():
    model, x = norm_and_silu(), torch.randn(2, 8, 3, 3)
    norm = model[0]
    norm.register_forward_hook(doubles)
    expected = model(x)
    assert replace_group_norm(model) == 0
    assert model[0] is norm
    assert torch.equal(model(x), expected)


def test_replace_group_norm_leaves_an_activation_with_hooks_alone():
    model, x = norm_and_silu(), torch.randn(2, 8, 3, 3)
    model[1].register_forward_hook(doubles)
    expected = model(x)
    assert replace_group_norm(model) == 1
    assert isinstance(model[0], GroupNorm)
    assert isinstance(model[1], nn.SiLU)
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_replace_group_norm_shows_hooks_of_ours_no_activation():
    model, x = nn.Sequential(GroupNorm(2, 8), nn.SiLU()), torch.randn(2, 8, 3, 3)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    replace_group_norm(model)
    model(x)
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: module.register_forward_hook(lambda *args: None),
        lambda module: module.register_full_backward_pre_hook(lambda *args: None),
        lambda module: module.register_full_backward_hook(lambda *args: None),
        lambda module: module.register_state_dict_pre_hook(lambda *args: None),
        lambda module: module.register_state_dict_post_hook(lambda *args: None),
        lambda module: module.register_load_state_dict_pre_hook(lambda *args: None),
        lambda module: module.register_load_state_dict_post_hook(lambda *args: None),
    ],
    ids=[
        "forward pre",
        "forward",
        "backward pre",
        "backward",
        "state_dict pre",
        "state_dict",
        "load_state_dict pre",
        "load_state_dict post",
    ],
)
def test_replace_group_norm_knows_every_kind_of_hook(register):
    model = norm_and_silu()
    handle = register(model[0])
    assert replace_group_norm(model) == 0
    if handle is not None:
        handle.remove()
        assert replace_group_norm(model) == 1


def test_replace_group_norm_works_in_a_diffusers_unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    expected = unet(x, t).sample
    assert replace_group_norm(unet) > 5
    # A few dozen layers of float32 roundings.
    torch.testing.assert_close(unet(x, t).sample, expected, rtol=1e-3, atol=1e-4)
