"""The way of a mixed batch into stage order and back, and what is no way."""

from __future__ import annotations

import io
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from multistage_diffusion.networks.stage_order import StageOrder


def test_an_explicit_order_takes_over_others_of_its_counts():
    x = torch.arange(4.0)
    assert StageOrder.of([0, 0, 1, 1], 2, 4).order is None
    order = StageOrder.of([0, 0, 1, 1], 2, 4, explicit=True)
    assert torch.equal(order.sort(x), x)
    memory = order.order.data_ptr(), order.inverse.data_ptr()
    assert order.copy_(StageOrder.of([1, 0, 1, 0], 2, 4)) is order
    assert (order.order.data_ptr(), order.inverse.data_ptr()) == memory
    assert order.sort(x).tolist() == [1, 3, 0, 2]
    assert torch.equal(order.restore(order.sort(x)), x)
    with pytest.raises(ValueError, match=r"two explicit orders of the same counts, got .*counts=\(2, 2\)"):
        order.copy_(StageOrder.of([1, 0, 0, 0], 2, 4))
    sorted_order = StageOrder.of(StageOrder.of([0, 0, 1, 1], 2, 4), 2, 4, explicit=True)
    assert sorted_order.order.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"explicit=True\) makes one"):
        order.copy_(StageOrder.of([0, 0, 1, 1], 2, 4))


def test_stage_order_sorts_stably_and_restores():
    order = StageOrder.of(torch.tensor([1, 0, 1, 0]), 3, 4)
    assert order.counts == (2, 2, 0)
    x = torch.arange(4.0)
    assert order.sort(x).tolist() == [1, 3, 0, 2]
    assert torch.equal(order.restore(order.sort(x)), x)


@pytest.mark.parametrize(
    "ids",
    [
        (2, 0, 2),
        np.array([2, 0, 2]),
        [np.int32(2), np.uint8(0), 2],
        [torch.tensor(2), torch.tensor(0), 2],
        torch.tensor([2, 0, 2], dtype=torch.uint8),
    ],
    ids=["tuple", "array", "numpy", "tensors", "uint8"],
)
def test_whatever_stands_for_integers_is_an_id(ids):
    order = StageOrder.of(ids, 3, 3)
    assert order.counts == (1, 0, 2)
    assert order.order.tolist() == [1, 0, 2]
    assert order.inverse.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, r"0\.5"),
        (0.0, r"0\.0"),
        (np.float32(0.5), r".*0\.5.*"),
        (np.float64(1), r".*1\.0.*"),
        (Fraction(1, 2), r"Fraction\(1, 2\)"),
        (Decimal("0.5"), r"Decimal\('0\.5'\)"),
        (torch.tensor(0.5), r"tensor\(0\.5.*\)"),
        (1j, "1j"),
        (None, "None"),
        ("1", "'1'"),
        ([0], r"\[0\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_id_that_is_no_integer_is_refused(value, shown):
    with pytest.raises(TypeError, match=f"stage: ids must be integers, got {shown} for sample 1"):
        StageOrder.of([0, value], 2, 2)


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        (None, TypeError, r"stage: must hold one id per sample, got None"),
        (0, TypeError, r"stage: must hold one id per sample, got 0"),
        ("01", TypeError, r"stage: ids must be integers, got '0' for sample 0"),
        (np.array([0.0, 1.0]), TypeError, r"stage: ids must be integers, got .* for sample 0"),
        (torch.tensor([0.0, 1.0]), TypeError, r"stage: ids must be integers, got a torch\.float32 tensor"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, r"integers, got a torch\.complex64 tensor"),
        (torch.zeros(1, 2, dtype=torch.int64), ValueError, r"ids must be a vector, got shape \(1, 2\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, r"got a tensor on the meta device"),
        ([0, 2], ValueError, r"ids must lie in 0\.\.1, got 2"),
        ([0, 1, 1], ValueError, r"got 3 ids for 2 samples"),
    ],
    ids=str,
)
def test_what_holds_no_ids_of_the_batch_is_refused(stage, error, message):
    with pytest.raises(error, match=message):
        StageOrder.of(stage, 2, 2)


def test_an_order_on_the_meta_device_is_refused_elsewhere():
    order = StageOrder.of([1, 0], 2, 2, "meta")
    assert order.order.is_meta
    assert order.to("meta") is order
    with pytest.raises(ValueError, match=r"an order on the meta device has no values to copy to cpu"):
        StageOrder.of(order, 2, 2)


def test_orders_are_made_inside_a_compiled_graph():
    """New ids compile anew; they may then be symbols to the compiler."""
    x = torch.arange(3.0)

    @torch.compile(fullgraph=True, backend="eager")
    def sort(x, ids):
        return StageOrder.of(ids, 3, 3).sort(x)

    for ids in ((1, 0, 1), (2, 0, 1), (2, 2, 0)):
        assert torch.equal(sort(x, ids), StageOrder.of(ids, 3, 3).sort(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_stage_order_traces_keep_their_batch():
    trace = torch.jit.trace(lambda x: StageOrder.of([1, 0, 1], 2, x.shape[0]).sort(x), torch.zeros(3, 2))
    assert torch.equal(trace(torch.eye(3)[:, :2]), torch.eye(3)[[1, 0, 2], :2])
    for batch in (2, 4):
        with pytest.raises(RuntimeError, match="split_with_sizes expects split_sizes to sum exactly"):
            trace(torch.zeros(batch, 2))
    with pytest.raises(ValueError, match=r"stage: torch\.jit\.trace would keep the ids of a tensor"):
        torch.jit.trace(lambda stage: StageOrder.of(stage, 2, 3).sort(stage), torch.tensor([1, 0, 1]))


def test_stage_order_is_a_container_of_its_indices():
    order = StageOrder.of([1, 0, 1], 2, 3)
    leaves, structure = pytree.tree_flatten(order)
    assert [leaf is t for leaf, t in zip(leaves, (order.order, order.inverse), strict=True)] == [True, True]
    cloned = pytree.tree_unflatten([leaf.clone() for leaf in leaves], structure)
    assert (type(cloned), cloned.counts) == (StageOrder, order.counts)
    assert torch.equal(cloned.inverse, order.inverse)
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    assert structure == pytree.tree_structure(StageOrder.of([1, 1, 0], 2, 3))
    assert structure != pytree.tree_structure(StageOrder.of([0, 1, 0], 2, 3))
    assert pytree.tree_map(lambda t: t, StageOrder.of([0, 1], 2, 2)).order is None


def test_stage_order_is_an_input_of_exported_programs():
    class Network(torch.nn.Module):
        def forward(self, x, order):
            return order.restore(order.sort(x) * torch.tensor([1.0, 10.0, 10.0]))

    program = torch.export.export(Network(), (torch.ones(3), StageOrder.of([1, 0, 1], 2, 3))).module()
    for stage in ([1, 0, 1], [1, 1, 0]):
        y = program(torch.ones(3), StageOrder.of(stage, 2, 3, explicit=True))
        assert y.tolist() == [10.0 if i else 1.0 for i in stage]


def test_stage_order_moves_with_a_batch():
    """As data loaders, accelerate and FSDP2 move, detach and cast what they find in a batch."""
    order = StageOrder.of([1, 0, 1], 2, 3)
    for moved in (order.to("cpu", non_blocking=False), order.detach(), replace(order)):
        assert moved.counts == order.counts
        assert torch.equal(moved.order, order.order)
        assert torch.equal(moved.inverse, order.inverse)
    assert order.to("meta", non_blocking=False).inverse.is_meta
    for sorted_order in (StageOrder.of([0, 1], 2, 2), StageOrder((1, 1), None, None)):
        assert sorted_order.pin_memory() is sorted_order.detach() is sorted_order


def test_stage_order_is_pinned_with_both_of_its_tensors(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    order = StageOrder.of([1, 0, 1], 2, 3)
    assert order.pin_memory().counts == order.counts
    assert [t is u for t, u in zip(pinned, (order.order, order.inverse), strict=True)] == [True, True]


def test_stage_order_is_loaded_without_running_code():
    file = io.BytesIO()
    order = StageOrder.of([1, 0, 1], 2, 3)
    torch.save(order, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert (type(found), found.counts) == (StageOrder, order.counts)
    assert torch.equal(found.order, order.order)
