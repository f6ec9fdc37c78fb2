"""Other people's norms and blocks: what is fused, and that nothing but the time changes."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stand_in_blocks as blocks
from helpers import pickled, saved
from msd_kernels.dispatch.backends import use
from msd_kernels.nn import replace_conv2d, replace_group_norm, restore
from msd_kernels.nn.pending import PendingNorm
from stand_in_blocks import CHANNELS, EMBEDDING, GROUPS

# Both sides compute the same formulas, rounded a few times.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# The blocks, their norms, and those that are fused. Guided diffusion's norms are float32 whatever comes.
MADE: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "diffusers": (blocks.ResnetBlock2D, 2, 2),
    "diffusers, scaled and shifted": (lambda: blocks.ResnetBlock2D(True), 2, 2),
    "diffusers' end": (blocks.Decoder, 1, 1),
    "guided": (blocks.ResBlock, 2, 2),
    "guided, added": (lambda: blocks.ResBlock(False), 2, 2),
    "EDM": (blocks.UNetBlock, 2, 2),
    "EDM, added": (lambda: blocks.UNetBlock(False), 2, 2),
    "LDM's autoencoder": (blocks.ResnetBlock, 1, 1),
    "k-diffusion": (blocks.Conditioned, 1, 0),
}
each_block = pytest.mark.parametrize(("make", "norms", "fused"), MADE.values(), ids=MADE)


@pytest.fixture(autouse=True)
def _libraries() -> Iterator[None]:
    with blocks.libraries():
        yield


def filled(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """With random parameters, in float64 or the widest dtype that it takes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + 0.2)
    module.to(dtype or widest(module))
    for norm in module.modules():
        if isinstance(norm, blocks.GroupNorm32):
            norm.float()
    return module


def widest(module: nn.Module) -> torch.dtype:
    return torch.float32 if isinstance(module, blocks.ResBlock) else torch.float64


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, CHANNELS, 5, 6, generator=generator, dtype=torch.float64) + 1
    return x.to(dtype), torch.randn(2, EMBEDDING, generator=generator, dtype=torch.float64).to(dtype)


def results(module: nn.Module) -> list[Tensor]:
    """The output and all gradients that there are."""
    x, embedding = (t.requires_grad_() for t in inputs(widest(module)))
    y = module(1 * x, embedding)
    leaves = [x, embedding, *module.parameters()]
    found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [y, *(g for g in found if g is not None)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        bound = TOLERANCE[b.dtype]
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * (1 + b.abs().max().item()))


@each_block
def test_blocks_compute_what_they_did(make, norms, fused, activations):
    module = filled(make())
    expected, state = results(module), copy.deepcopy(module.state_dict())
    report = replace_group_norm(module)
    assert (int(report), report.found, report.fused, report.left) == (norms, norms, fused, {})
    assert_close(results(module), expected)
    assert activations.count("silu") == fused
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state)


@each_block
def test_restored_blocks_are_what_they_were(make, norms, fused):
    module = filled(make())
    expected, kinds = results(module), {name: type(m) for name, m in module.named_modules()}
    held = {name: set(vars(m)) for name, m in module.named_modules()}
    assert replace_group_norm(module) == norms
    assert replace_group_norm(module) == 0
    assert restore(module) == norms
    assert {name: type(m) for name, m in module.named_modules()} == kinds
    assert {name: set(vars(m)) for name, m in module.named_modules()} == held
    for found, exact in zip(results(module), expected, strict=True):
        assert torch.equal(found, exact)


@each_block
@pytest.mark.parametrize("travel", [copy.deepcopy, pickled, saved])
def test_copies_are_fused_as_their_originals(make, norms, fused, travel, activations):
    module = filled(make())
    expected = results(module)
    replace_group_norm(module)
    copied = travel(module)
    assert_close(results(copied), expected)
    assert activations.count("silu") == fused
    assert restore(copied) == norms
    assert restore(module) == norms


@each_block
def test_blocks_round_as_their_originals(make, norms, fused):
    module = filled(make())
    exact = module(*inputs(widest(module)))
    theirs = filled(make(), torch.bfloat16)
    ours = copy.deepcopy(theirs)
    replace_group_norm(ours)
    errors = [(m(*inputs(torch.bfloat16)).double() - exact).norm() for m in (ours, theirs)]
    # Both are a handful of roundings; ours leave out those between a norm and its SiLU.
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("make", [lambda: blocks.ResnetBlock2D(True), blocks.UNetBlock, blocks.Conditioned])
def test_blocks_compile_in_one_graph(make):
    module = filled(make())
    given = inputs(widest(module))
    expected = module(*given)
    replace_group_norm(module)
    assert_close([torch.compile(module, fullgraph=True, backend="eager")(*given)], [expected])


def test_gradient_checkpointing_keeps_the_gradients():
    module = filled(blocks.ResnetBlock2D(True))
    expected = results(module)
    replace_group_norm(module)
    for reentrant in (False, True):
        checkpointed = copy.deepcopy(module)
        call = checkpointed.forward

        def forward(x, embedding, call=call, reentrant=reentrant):
            return torch.utils.checkpoint.checkpoint(call, x, embedding, use_reentrant=reentrant)

        x, embedding = (t.requires_grad_() for t in inputs())
        y = forward(1 * x, embedding)
        if reentrant:
            y.square().sum().backward()
            found = [y, x.grad, embedding.grad, *(p.grad for p in checkpointed.parameters())]
        else:
            leaves = [x, embedding, *checkpointed.parameters()]
            found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
        torch.testing.assert_close(found, expected, **CLOSE)


def hooked(module: nn.Module, kind: str) -> list:
    seen: list = []
    getattr(module, kind)(lambda *args: seen.append(args[-1]))
    return seen


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("part", ["norm1", "nonlinearity"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_blocks_see_what_they_saw(when, part, kind, activations):
    module, plain = filled(blocks.ResnetBlock2D()), filled(blocks.ResnetBlock2D())
    expected = hooked(plain.get_submodule(part), kind)
    if when == "before":
        seen = hooked(module.get_submodule(part), kind)
    assert replace_group_norm(module) == 2
    if when == "after":
        seen = hooked(module.get_submodule(part), kind)
    assert_close(results(module), results(plain))
    torch.testing.assert_close(seen, expected, **CLOSE)
    assert activations == ([None, "silu"] if part == "norm1" else [None, None])


def test_an_activation_that_is_swapped_later_is_the_one_that_runs():
    module, plain = filled(blocks.ResnetBlock2D(True)), filled(blocks.ResnetBlock2D(True))
    replace_group_norm(module)
    for each in (module, plain):
        each.nonlinearity = nn.GELU()
    assert_close(results(module), results(plain))


class Fork(blocks.ResnetBlock2D):
    """Somebody's own."""


def test_subclasses_of_blocks_and_what_has_no_silu_are_called_by_themselves(activations):
    gelu = filled(blocks.ResnetBlock2D())
    gelu.nonlinearity = nn.GELU()
    patched = filled(blocks.ResnetBlock2D())
    patched.forward = lambda x, embedding: patched.conv1(patched.norm1(x)) + patched.norm2(x)
    model = nn.ModuleDict({"fork": filled(Fork()), "gelu": gelu, "patched": patched})
    expected = [m(*inputs()) for m in model.values()]
    report = replace_group_norm(model)
    assert (int(report), report.fused) == (6, 0)
    reasons = {name: reason.removeprefix("is called by itself: ") for name, reason in report.left.items()}
    assert reasons == {
        "fork.norm1": "its block Fork is a subclass of ResnetBlock2D",
        "fork.norm2": "its block Fork is a subclass of ResnetBlock2D",
        "gelu.norm1": "nonlinearity is a GELU, no SiLU",
        "gelu.norm2": "nonlinearity is a GELU, no SiLU",
        "patched.norm1": "its block has a forward of its own",
        "patched.norm2": "its block has a forward of its own",
    }
    torch.testing.assert_close([m(*inputs()) for m in model.values()], expected, **CLOSE)
    assert set(activations) == {None}


def test_norms_without_fused_silu_have_none(activations):
    module = filled(blocks.ResnetBlock2D())
    assert replace_group_norm(module, fuse_silu=False).fused == 0
    results(module)
    assert activations == [None, None]


def test_a_norm_in_two_blocks_is_called_by_itself():
    first, second = blocks.ResnetBlock2D(), blocks.ResnetBlock2D()
    second.norm1 = first.norm1
    report = replace_group_norm(nn.ModuleList([first, second]))
    assert (int(report), report.fused) == (3, 2)
    assert set(report.left) == {"0.norm1", "1.norm1"}


class OtherNorm(blocks.GroupNorm32):
    """Of a fork: the same name in the same place, another formula."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_norm_of_a_known_name_that_computes_something_else_is_left_alone(monkeypatch):
    OtherNorm.__name__ = "GroupNorm32"
    monkeypatch.setattr(sys.modules["guided_diffusion.nn"], "GroupNorm32", OtherNorm)
    model = nn.ModuleList([OtherNorm(GROUPS, CHANNELS), blocks.GroupNorm32(GROUPS, CHANNELS)])
    report = replace_group_norm(model)
    assert (int(report), report.found) == (0, 2)
    assert report.left == {
        "0": "does not compute what GroupNorm32 is known to",
        "1": "a subclass, GroupNorm32",
    }


def test_hooks_of_foreign_norms_see_no_example():
    norm, seen = filled(blocks.GroupNorm()), []
    norm.register_forward_hook(lambda *args: seen.append(args))
    assert replace_group_norm(norm) == 1
    assert seen == []


def test_norms_of_edm_take_weights_of_another_dtype():
    norm = filled(blocks.GroupNorm(), torch.bfloat16)
    x, _ = inputs(torch.float32)
    expected = norm(x)
    assert replace_group_norm(norm) == 1
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


class OtherConv2d(blocks.Conv2d):
    """Of a fork."""


def test_convolutions_of_edm_are_replaced_where_they_do_not_resample():
    model = nn.ModuleList([blocks.Conv2d(), blocks.Conv2d(up=True), OtherConv2d(), blocks.Conv2d(channels=8)])
    model = filled(model).float()
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = [module(x) for module in model[:3]]
    report = replace_conv2d(model)
    assert (int(report), report.found) == (1, 4)
    assert set(report.left) == {"1", "2", "3"}
    with use("cpu"):
        for module, y in zip(model[:3], expected, strict=True):
            torch.testing.assert_close(copy.deepcopy(module)(x), y, rtol=1e-4, atol=1e-4)
    assert restore(model) == 1
    assert [type(m) for m in model] == [blocks.Conv2d, blocks.Conv2d, OtherConv2d, blocks.Conv2d]


def test_libraries_that_nobody_imported_are_not_looked_for(monkeypatch):
    for name in blocks.HOMES:
        monkeypatch.delitem(sys.modules, name)
    module = filled(blocks.ResnetBlock2D())
    report = replace_group_norm(module)
    assert (int(report), report.fused, report.left) == (2, 0, {})
    assert not set(blocks.HOMES) & set(sys.modules)


def test_reports_read_as_numbers_and_as_text():
    model = nn.ModuleList([blocks.ResnetBlock2D(), Fork()])
    report = replace_group_norm(model)
    assert report == 4
    assert report - 1 == 3
    assert f"{report:d}" == "4"
    assert str(report).splitlines() == [
        "4 of 4 norms replaced, 2 of them with their SiLU",
        "  left 1.norm1: is called by itself: its block Fork is a subclass of ResnetBlock2D",
        "  left 1.norm2: is called by itself: its block Fork is a subclass of ResnetBlock2D",
    ]
    assert pickle.loads(pickle.dumps(report)).left == report.left


def pending() -> tuple[PendingNorm, Tensor]:
    """What a norm of a block hands out, and the plain value."""
    module, (x, _) = filled(blocks.ResnetBlock2D()), inputs()
    exact = module.norm1(x)
    replace_group_norm(module)
    y = module.norm1(x)
    assert type(y) is PendingNorm
    return y, exact


ONE = torch.full((2, CHANNELS, 1, 1), 0.25, dtype=torch.float64)
USES: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda y: (y.shape, y.dtype, y.device, y.dim(), y.ndim, y.size(1)),
    "plus": lambda y: y + y,
    "minus": lambda y: 1 - y,
    "other scale": lambda y: F.silu(y * ONE[:1]),
    "shifted and scaled": lambda y: F.silu((y + ONE) * ONE),
    "scaled twice": lambda y: F.silu(y * ONE * ONE + ONE),
    "shifted twice": lambda y: F.silu(ONE + (ONE + y)),
    "scaled only": lambda y: F.silu(ONE * y),
    "added with a factor": lambda y: F.silu(torch.add(y, ONE, alpha=2)),
    "by name": lambda y: torch.mul(input=y, other=ONE) + torch.add(input=ONE, other=y),
    "addcmul": lambda y: F.silu(torch.addcmul(ONE, ONE, y)),
    "addcmul with a factor": lambda y: torch.addcmul(ONE, y, ONE, value=2),
    "addcmul to it": lambda y: torch.addcmul(y, ONE, ONE),
    "silu twice": lambda y: (F.silu(y), F.silu(y)),
    "silu, then itself": lambda y: (F.silu(y), y * 3),
    "in place": lambda y: (y.add_(1), y, F.silu(y)),
    "silu in place": lambda y: (F.silu(y, inplace=True), y + 0),
    "written out": lambda y: y * torch.sigmoid(y),
    "written out, turned": lambda y: y.sigmoid() * y,
    "sigmoid": lambda y: torch.sigmoid(y) + torch.sigmoid(torch.sigmoid(y)),
    "of another": lambda y: (y + ONE) * torch.sigmoid(y),
    "joined": lambda y: torch.cat([y, y], dim=1),
    "index": lambda y: y[0, :2],
    "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
    "list": lambda y: torch.tensor(y.tolist(), dtype=torch.float64),
    "copy": lambda y: copy.deepcopy(y.detach()) + pickle.loads(pickle.dumps(y.detach())),
    "text": lambda y: str(y.detach()),
    "half": lambda y: y.half(),
    "gradient": lambda y: (y.requires_grad, y.grad_fn is not None),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whatever_is_done_with_a_pending_norm_is_done_with_its_output(use):
    y, exact = pending()
    expected = use(exact.clone())
    found = use(y)
    if not isinstance(expected, Tensor) and not isinstance(expected[0], Tensor):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for result in found if isinstance(found, tuple) else (found,):
        assert not isinstance(result, Tensor) or not torch.isnan(result + 0).any()


def test_a_pending_norm_of_a_changed_input_is_refused():
    module, (x, _) = filled(blocks.ResnetBlock2D()), inputs()
    replace_group_norm(module)
    y = module.norm1(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="the input of a norm was changed in place"):
        F.silu(y)
