"""StageBatch as PyTorch's tools see it: a pytree and a dataclass, in hooks, checkpoints and exported programs."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.data._utils.pin_memory import pin_memory

from helpers import stage_batch
from msd_kernels import StageBatch, attention, group_norm, grouped_conv2d, grouped_linear, resample2d

COUNTS, CHANNELS = (2, 0, 1), (4, 7, 2)


@pytest.fixture
def batch(generator) -> StageBatch:
    return stage_batch(generator, COUNTS, CHANNELS, 4, 4)


class Block(nn.Module):
    """A residual block of a decoder; ``emb`` is per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.ParameterList([torch.full((c, c, 3, 3), 0.1) for c in CHANNELS])

    def forward(self, x: StageBatch, emb: Tensor | None = None) -> StageBatch:
        h = group_norm(x, 1, activation="silu")
        if emb is not None:
            h = h.map(lambda values: values * emb)
        return grouped_conv2d(h, list(self.weight), residual=x)


def test_containers_have_their_values_as_the_only_leaf(batch):
    leaves, structure = pytree.tree_flatten(batch)
    assert len(leaves) == 1
    assert leaves[0] is batch.values
    again = pytree.tree_unflatten(leaves, structure)
    assert type(again) is StageBatch
    assert again.values is batch.values
    assert again.layout == batch.layout
    ((path, _),) = pytree.tree_leaves_with_path(batch)
    assert pytree.keystr(path) == ".values"


def test_containers_are_mapped_over(batch):
    mapped = pytree.tree_map(torch.exp, {"x": [batch]})["x"][0]
    assert mapped.layout == batch.layout
    assert torch.equal(mapped.values, batch.values.exp())


def test_containers_of_one_layout_have_one_structure(batch, generator):
    same = stage_batch(generator, COUNTS, CHANNELS, 4, 4, dtype=torch.float64)
    other = stage_batch(generator, (1, 0, 2), CHANNELS, 4, 4)
    assert pytree.tree_structure(batch) == pytree.tree_structure(same)
    assert pytree.tree_structure(batch) != pytree.tree_structure(other)


def test_containers_structures_are_serialised(batch):
    structure = pytree.tree_structure((batch, 1))
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


@pytest.mark.parametrize("leaf", [None, True, "name", torch.zeros(3), torch.zeros(2, 2)], ids=str)
def test_containers_take_any_leaf_unseen(leaf, batch):
    held = pytree.tree_map(lambda _: leaf, batch)
    assert type(held) is StageBatch
    assert held.values is leaf
    assert pytree.tree_leaves(held, is_leaf=lambda x: x is None)[0] is leaf


def test_containers_close_the_gaps_of_leaves(batch):
    """Kernels read dense memory."""
    expanded = pytree.tree_map(lambda t: t[:1].expand(t.shape), batch)
    assert expanded.values.is_contiguous()
    assert torch.equal(group_norm(expanded, 1).values, torch.zeros_like(batch.values))


DENSE = torch.zeros(3, 2, 4, 4)
X, EMB = StageBatch.from_dense(DENSE, (2, 1)), StageBatch.from_dense(DENSE[:, :, 0, 0], (2, 1))
QKV = StageBatch.from_dense(torch.zeros(3, 6, 4, 4))
SHORT, SHORT_EMB, SHORT_QKV = (pytree.tree_map(lambda t: t[:1], batch) for batch in (X, EMB, QKV))
KERNELS = [torch.zeros(2, 2, 3, 3)] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_norm(SHORT, 1), "group_norm: x"),
        (lambda: group_norm(X, 1, scale=SHORT_EMB), "group_norm: scale"),
        (lambda: group_norm(X, 1, shift=SHORT_EMB), "group_norm: shift"),
        (lambda: grouped_conv2d(SHORT, KERNELS), "grouped_conv2d: x"),
        (lambda: grouped_conv2d(X, [torch.zeros(2, 4, 3, 3)] * 2, skip=SHORT), "grouped_conv2d: skip"),
        (lambda: grouped_conv2d(X, KERNELS, sample_bias=SHORT_EMB), "grouped_conv2d: sample_bias"),
        (lambda: grouped_conv2d(X, KERNELS, residual=SHORT), "grouped_conv2d: residual"),
        (lambda: grouped_linear(SHORT, [torch.zeros(3, 2)] * 2), "grouped_linear: x"),
        (lambda: attention(SHORT, X, X), "attention: q"),
        (lambda: attention(X, SHORT, X), "attention: k"),
        (lambda: attention(X, X, SHORT), "attention: v"),
        (lambda: attention(SHORT_QKV, layout="blocked"), "attention: q"),
        (lambda: resample2d(SHORT, [1, 1]), "resample2d: x"),
    ],
)
def test_containers_of_other_values_than_their_layout_says_are_refused_by_ops(call, message):
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{message} must hold \[\d+\] values for .*, got \[1\]$"):
            call()


def test_containers_are_arguments_of_transforms(batch):
    gradient = torch.func.grad(lambda x: x.values.square().sum())(batch)
    assert gradient.layout == batch.layout
    assert torch.equal(gradient.values, 2 * batch.values)


def test_containers_survive_as_dataclasses(batch):
    """As FSDP2 casts what it finds in one."""
    copy = replace(batch)
    halved = replace(
        copy, **{f.name: getattr(copy, f.name) for f in fields(copy)} | {"values": batch.values.half()}
    )
    assert halved.layout == batch.layout
    assert torch.equal(halved.values, batch.values.half())


def test_containers_are_exported_with_their_layout(batch, generator, tmp_path):
    block = Block()
    program = torch.export.export(block, (batch,))
    torch.export.save(program, tmp_path / "block.pt2")
    again = torch.export.load(tmp_path / "block.pt2").module()
    x = stage_batch(generator, COUNTS, CHANNELS, 4, 4)
    y = again(x)
    assert type(y) is StageBatch
    assert y.layout == x.layout
    assert torch.equal(y.values, block(x).values)
    with pytest.raises((ValueError, RuntimeError)):
        again(stage_batch(generator, (1, 0, 2), CHANNELS, 4, 4))


def saved(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_containers_are_loaded_without_running_code(batch):
    found = torch.load(saved({"x": batch}), weights_only=True)["x"]
    assert found.layout == batch.layout
    assert torch.equal(found.values, batch.values)


def test_containers_of_files_that_lie_are_refused(batch):
    file = saved(pytree.tree_map(lambda t: t[:3], batch))
    with pytest.raises(
        ValueError, match=r"StageBatch: values must be flat with 160 elements .* got shape \(3,\)"
    ):
        torch.load(file, weights_only=True)


class Pinned(Tensor):
    """What ``pin_memory`` returns here, where no memory can be pinned."""


class Pinnable(Tensor):
    def pin_memory(self) -> Tensor:
        return self.as_subclass(Pinned)


def test_containers_are_pinned_by_data_loaders(batch):
    (found,) = pin_memory([batch.with_values(batch.values.as_subclass(Pinnable))])
    assert type(found.values) is Pinned
    assert found.layout == batch.layout


def test_containers_are_detached(batch):
    values = batch.values.requires_grad_()
    detached = batch.detach()
    assert not detached.values.requires_grad
    assert detached.layout == batch.layout
    assert detached.values.data_ptr() == values.data_ptr()


def gradients(run, block: Block, x: StageBatch, emb: Tensor) -> list[Tensor]:
    y = run(block, x.map(torch.clone), emb)
    leaves = [x.values, emb, *block.parameters()]
    return list(torch.autograd.grad(y.values.square().sum(), leaves, materialize_grads=True))


def test_containers_keep_all_gradients_in_checkpoints(generator):
    block, x = Block(), stage_batch(generator, COUNTS, CHANNELS, 4, 4, requires_grad=True)
    emb = torch.randn(160, generator=generator, requires_grad=True)
    expected = gradients(lambda block, *inputs: block(*inputs), block, x, emb)
    found = gradients(lambda *call: checkpoint(*call, use_reentrant=False), block, x, emb)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
def test_containers_are_refused_by_reentrant_checkpoints(wanted, batch, generator):
    x = batch.with_values(batch.values.requires_grad_(wanted[0]))
    emb = torch.randn(160, generator=generator).requires_grad_(wanted[1])
    with pytest.raises(TypeError, match="use_reentrant=True loses its gradients"):
        checkpoint(Block(), x, emb, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_containers_pass_reentrant_checkpoints_that_want_no_gradients(batch):
    block = Block().requires_grad_(False)
    assert torch.equal(checkpoint(block, batch, use_reentrant=True).values, block(batch).values)


def test_containers_inside_of_reentrant_checkpoints_of_tensors_are_right(generator):
    block, x = Block(), torch.randn(160, generator=generator, requires_grad=True)

    def function(values: Tensor) -> Tensor:
        y = block(StageBatch(values, COUNTS, CHANNELS, 4, 4))
        return pytree.tree_map(torch.square, y).values  # flattened below the checkpoint, and not by it

    found = []
    for run in (function, lambda values: checkpoint(function, values, use_reentrant=True)):
        block.zero_grad()
        x.grad = None
        run(x).sum().backward()
        found.append([t.grad for t in (x, *block.parameters()) if t.grad is not None])
    assert len(found[0]) > 2
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_containers_reach_forward_hooks_and_tensor_hooks_but_no_backward_hooks(batch):
    block, seen = Block(), []
    block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].layout, output.layout)))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    with pytest.warns(UserWarning, match="module output should be a Tensor or a tuple of Tensors"):
        y = block(batch)
    y.values.register_hook(lambda gradient: seen.append(gradient.shape))
    y.values.sum().backward()
    assert seen == [(batch.layout, batch.layout), batch.values.shape]
