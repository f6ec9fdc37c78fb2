"""The drop-in modules against those of torch.nn."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from helpers import pickled, saved
from msd_kernels.nn import FusedSequential, GroupNorm, replace_group_norm, restore
from msd_kernels.nn import norms as module_of_norms

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
    assert type(after) is (FusedSequential if fuse_silu else nn.Sequential)
    assert type(after[2]) is nn.SiLU
    assert type(after[3]) is nn.Sequential
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
    model, x = nn.ModuleList([norm, nn.Sequential(norm, nn.SiLU())]), torch.randn(2, 4, 3, 3)
    expected = [module(x) for module in model]
    replace_group_norm(model)
    assert model[0].activation is None
    assert isinstance(model[1][1], nn.SiLU)
    torch.testing.assert_close([module(x) for module in model], expected, **CLOSE)


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


def doubles(*args) -> Tensor:
    """As a forward hook."""
    return 2 * args[-1]


def norm_and_silu() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())


def test_replace_group_norm_fuses_a_sequential_that_is_called_as_a_whole(activations):
    model = norm_and_silu()
    replace_group_norm(model)
    model(torch.randn(2, 8, 3, 3))
    assert activations == ["silu"]


class ScaledBlock(nn.Module):
    """The residual block of guided diffusion: the embedding scales and shifts what the norm returns."""

    def __init__(self, take_apart: Callable) -> None:
        super().__init__()
        self.take_apart, self.embed = take_apart, nn.Linear(4, 16)
        self.out_layers = nn.Sequential(
            nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(8, 8, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.embed(x.mean((2, 3))[:, :4])[..., None, None].chunk(2, dim=1)
        norm, *rest = self.take_apart(self.out_layers)
        h = norm(x) * (1 + scale) + shift
        for module in rest:
            h = module(h)
        return x + h


class PreActivation(nn.Sequential):
    """The shortcut begins behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x)
        return h + self[2](self[1](h))


class Swapped(nn.Sequential):
    """Runs its modules in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[1](x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScaledBlock(lambda layers: (layers[0], layers[1:])),
        lambda: ScaledBlock(lambda layers: (layers[:1], layers[1:])),
        lambda: ScaledBlock(list),
        lambda: ScaledBlock(lambda layers: layers.children()),
        lambda: ScaledBlock(lambda layers: (layers.get_submodule("0"), *layers[1:3], layers[-1])),
        lambda: PreActivation(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)),
        lambda: Swapped(nn.GroupNorm(2, 8), nn.SiLU()),
        lambda: (
            nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())[:2] + nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU())
        ),
    ],
    ids=["index", "slice", "list", "children", "parts", "own forward", "own order", "sum"],
)
def test_replace_group_norm_changes_no_output_whoever_calls_the_modules(make):
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    expected = model(x)
    replace_group_norm(model)
    torch.testing.assert_close(model(x), expected)


def test_slices_of_a_fused_sequential_are_right(activations):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8), nn.SiLU())
    x = torch.randn(2, 8, 3, 3)
    plain = copy.deepcopy(model)
    replace_group_norm(model)
    for part in (slice(2), slice(2, None), slice(1, 4), slice(None, None, -1)):
        torch.testing.assert_close(model[part](x), plain[part](x), **CLOSE)
    assert activations == [None, "silu", "silu", None, "silu", None]


@pytest.mark.parametrize("position", [0, 1], ids=["norm", "activation"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_saw(when, position, activations):
    model, x = norm_and_silu(), torch.randn(2, 8, 3, 3)
    plain = copy.deepcopy(model)
    plain[position].register_forward_hook(doubles)
    if when == "before":
        model[position].register_forward_hook(doubles)
    assert replace_group_norm(model) == 1
    if when == "after":
        model[position].register_forward_hook(doubles)
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    assert activations == [None]


def test_hooks_of_all_modules_see_what_they_saw():
    model, x = norm_and_silu(), torch.randn(2, 8, 3, 3)
    expected = {nn.SiLU: model(x), nn.GroupNorm: model[0](x)}
    replace_group_norm(model)
    seen = {}
    handle = register_module_forward_hook(lambda module, _, output: seen.update({type(module): output}))
    model(x)
    handle.remove()
    torch.testing.assert_close(seen[nn.SiLU], expected[nn.SiLU], **CLOSE)
    torch.testing.assert_close(seen[type(model[0])], expected[nn.GroupNorm], **CLOSE)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("position", [0, 1], ids=["norm", "activation"])
def test_a_forward_of_an_instance_is_called(when, position):
    model, x = norm_and_silu(), torch.randn(2, 8, 3, 3)

    def patch() -> None:
        model[position].forward = lambda x: 3 * x

    expected = nn.functional.silu(3 * x) if position == 0 else 3 * model[0](x)
    if when == "before":
        patch()
    assert replace_group_norm(model) == (0 if (when, position) == ("before", 0) else 1)
    if when == "after":
        patch()
    torch.testing.assert_close(model(x), expected, **CLOSE)


HOOKS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_every_kind_of_hook_of_a_norm_survives(register):
    model, calls = norm_and_silu(), []
    getattr(model[0], register)(lambda *args: calls.append(register))
    for change in (replace_group_norm, restore):
        assert change(model) == 1
        model(torch.randn(2, 8, 3, 3, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == [register]
        calls.clear()


def test_what_a_norm_holds_survives_replacement_and_restore():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()).eval()
    norm, silu = model
    norm.register_buffer("mean", torch.ones(3))
    norm.note, norm.head = {"a": 1}, nn.Linear(2, 2)
    norm.weight.requires_grad_(False)
    norm.weight.note = "mine"
    held = dict(vars(norm))
    replace_group_norm(model)
    assert model[0] is norm
    assert model[1] is silu
    assert isinstance(norm, GroupNorm)
    assert {name: value for name, value in vars(norm).items() if name != "activation"} == held
    nn.init.normal_(norm.bias)
    assert restore(model) == 1
    assert model[0] is norm
    assert type(norm) is nn.GroupNorm
    assert type(model) is nn.Sequential
    assert vars(norm) == held
    assert restore(model) == 0


def test_restore_gives_the_outputs_of_before_to_the_bit():
    model, x = convolutions(), torch.randn(2, 3, 6, 6)
    text, expected = repr(model), model(x)
    for _ in range(2):
        replace_group_norm(model)
        assert replace_group_norm(model) == 0
        assert restore(model) == 2
        assert repr(model) == text
        assert torch.equal(model(x), expected)


def test_restore_leaves_ours_that_replaced_nothing():
    model = nn.Sequential(GroupNorm(2, 8, activation="silu"), GroupNorm(2, 8), nn.SiLU())
    assert replace_group_norm(model) == 0
    assert type(model) is FusedSequential
    assert restore(model) == 0
    assert [type(module) for module in model] == [GroupNorm, GroupNorm, nn.SiLU]
    assert type(model) is nn.Sequential


def test_a_parametrised_norm_is_left_alone_before_and_refused_after():
    parametrize = torch.nn.utils.parametrize
    model, late = norm_and_silu(), norm_and_silu()
    x = torch.randn(2, 8, 3, 3)
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    expected = model(x)
    assert replace_group_norm(model) == 0
    assert torch.equal(model(x), expected)
    replace_group_norm(late)
    parametrize.register_parametrization(late[0], "weight", nn.Tanh())
    torch.testing.assert_close(late(x), expected, **CLOSE)
    with pytest.raises(ValueError, match="restore: the norm '0' was changed after it was replaced"):
        restore(late)
    assert type(late) is FusedSequential
    parametrize.remove_parametrizations(late[0], "weight")
    assert restore(late) == 1


def test_an_activation_that_a_norm_has_got_is_not_dropped():
    model, named = norm_and_silu(), norm_and_silu()
    named[0].activation = "of another's code"
    assert replace_group_norm(named) == 0
    assert replace_group_norm(model) == 1
    model[0].activation = "silu"
    x = torch.randn(2, 8, 3, 3)
    silu = nn.functional.silu
    torch.testing.assert_close(model(x), silu(silu(nn.functional.group_norm(x, 2))), **CLOSE)
    with pytest.raises(ValueError, match="activation='silu'"):
        restore(model)


@pytest.mark.parametrize("change", [replace_group_norm, restore])
@pytest.mark.parametrize("model", [None, "model", torch.ones(2)], ids=["None", "text", "tensor"])
def test_what_is_no_module_is_refused(change, model):
    with pytest.raises(TypeError, match=rf"^{change.__name__}: model must be a torch.nn.Module, got"):
        change(model)


def test_a_norm_that_is_the_model_is_replaced():
    norm, x = nn.GroupNorm(2, 8), torch.randn(2, 8, 3, 3)
    expected = norm(x)
    assert replace_group_norm(norm) == 1
    torch.testing.assert_close(norm(input=x), expected, **CLOSE)


@pytest.mark.parametrize(
    "travel",
    [
        lambda model, x: pickled(model),
        lambda model, x: saved(model),
        lambda model, x: copy.deepcopy(model),
        lambda model, x: torch.fx.symbolic_trace(model),
        lambda model, x: pickled(torch.fx.symbolic_trace(model)),
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.jit.script(model),
        lambda model, x: torch.compile(model, fullgraph=True, backend="eager"),
        lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    ],
    ids=["pickle", "save", "deepcopy", "fx", "fx pickled", "jit.trace", "jit.script", "compile", "export"],
)
def test_replaced_models_travel_as_plain_ones_do(travel):
    model, x = convolutions(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    replace_group_norm(model)
    torch.testing.assert_close(travel(model, x)(x), expected, **CLOSE)
    assert type(model) is FusedSequential


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "record", [lambda model, x: torch.jit.trace(model, x), lambda model, x: torch.fx.symbolic_trace(model)]
)
@pytest.mark.parametrize("shape", [(1, 3, 12, 6), (4, 3, 3, 6), (2, 3, 4, 9), (3, 3, 5, 7)], ids=str)
def test_recorded_models_run_at_other_shapes(record, shape):
    model, x = convolutions(), torch.randn(shape)
    expected = model(x)
    replace_group_norm(model)
    torch.testing.assert_close(record(model, torch.randn(2, 3, 6, 6))(x), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("record", [torch.jit.trace, lambda model, inputs: torch.jit.script(model)])
def test_recorded_norms_apply_their_activation_scale_and_shift(record):
    norm = GroupNorm(4, 32, activation="silu")
    recorded = record(norm, (torch.randn(3, 32, 4), torch.randn(3, 32), torch.randn(3, 32)))
    inputs = torch.randn(2, 32, 6), torch.randn(2, 32), torch.randn(2, 32)
    torch.testing.assert_close(recorded(*inputs), norm(*inputs), **CLOSE)


def test_symbolic_trace_keeps_the_op():
    model = norm_and_silu()
    replace_group_norm(model)
    called = [
        node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_function"
    ]
    assert called == [module_of_norms.group_norm]
