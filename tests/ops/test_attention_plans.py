"""Plans of the Triton attention kernels and the choice of backend: all without Triton."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

from msd_kernels.dispatch.backends import Call
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.layouts import AttentionLayout, view_heads
from msd_kernels.ops.attention import PACKED_ORDERS, triton
from msd_kernels.ops.attention import plan as plans
from msd_kernels.ops.attention.plan import FIELDS
from msd_kernels.runtime import tuned

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WHICH = ("forward", "dq", "dkv")
EDM = AttentionLayout((60, 0, 3), (1, 1, 1), (384, 256, 32), 256, 256, "nthd", None)
ORDERS = ["nthd", "nhtd", *(order for pair in PACKED_ORDERS.values() for order in pair)]


def make(layout: AttentionLayout, which: str = "forward") -> plans.Plan:
    return plans.plan(layout, which, tuned.attention(90, "half", which), "half", 2, CPU)


def rows(plan: plans.Plan) -> list[dict[str, int]]:
    """The problems of a table by field name, without the unused ones."""
    columns = plan.table.values.view(len(FIELDS), -1).t().tolist()
    return [dict(zip(FIELDS, c, strict=True)) for c in columns if c[0] < plan.table.tiles]


def place(
    layout: AttentionLayout, row: dict[str, int], name: str, like: str, index: tuple[int, int, int, int]
) -> int:
    """Where the kernels find ``[n, h, t, d]``, for a tensor with the distances of ``like``."""
    n, h, t, d = index
    first, step = row[name] + n * row[f"{like}_sample"] + h * row[f"{like}_head"], row[f"{like}_step"]
    inner = plans.parts_between(layout) if like != "y" else 1
    return first + (t + d * step if plans.is_planar(layout) else t * step + d * inner)


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_find_every_element_where_the_reference_does(order):
    packed = "p" in order
    layout = AttentionLayout((2, 0, 1), (2, 1, 3), (5, 4, 3), 4, 4 if packed else 6, order, None)
    found = {row["head_dim"]: row for row in rows(make(layout))}
    starts = {"q": 0, "k": 0, "y": 0}
    for n, h, d in zip(layout.counts, layout.heads, layout.head_dims, strict=True):
        size = n * h * d
        parts = 3 if packed else 1
        whole = {
            "q": torch.arange(parts * size * 4) + starts["q"],
            "k": torch.arange(parts * size * layout.context) + starts["k"],
            "y": torch.arange(size * 4) + starts["y"],
        }
        starts = {name: start + whole[name].numel() for name, start in starts.items()}
        if not n:
            continue
        q, y = view_heads(whole["q"], n, 4, h, d, order), view_heads(whole["y"], n, 4, h, d, layout.out_order)
        k = view_heads(whole["k"], n, layout.context, h, d, order)
        q, k, v = q if packed else (q, k, k)
        for name, like, view in (("q", "q", q), ("k", "k", k), ("v", "k", v), ("y", "y", y)):
            last = tuple(size - 1 for size in view.shape)
            for index in ((0, 0, 0, 0), last, (last[0], 0, 1, 1), (0, last[1], 2, 2)):
                assert place(layout, found[d], name, like, index) == view[index], (name, index)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("context", [256, 1024])
def test_tiles_cover_all_tokens_of_all_heads(context, which):
    layout = EDM._replace(heads=(1, 1, 4), tokens=100, context=context)
    plan = make(layout, which)
    own = {i: kind[2] for i, kind in enumerate(plan.constants.get("KINDS", ()))}
    covered = layout.context if which == "dkv" else layout.tokens
    wide, narrow = rows(plan)
    for row in (wide, narrow):
        block = own[row["kind"]] if plan.streams else plan.constants["OWN"]
        assert (row["blocks"] - 1) * block < covered <= row["blocks"] * block
    assert narrow["first_tile"] == 60 * wide["blocks"]
    assert plan.table.tiles == narrow["first_tile"] + 3 * 4 * narrow["blocks"]


def test_long_tiles_come_first_and_log_sums_follow_each_other():
    layout = EDM._replace(counts=(1, 2, 3), head_dims=(32, 384, 256))
    found = rows(make(layout))
    assert [row["head_dim"] for row in found] == [384, 256, 32]
    assert [row["rows"] for row in found] == [256, 3 * 256, 0]


def test_scale_is_each_stages_own_unless_given():
    bits = [row["scale"] for row in rows(make(EDM))]
    assert [struct.unpack("<d", struct.pack("<q", b))[0] for b in bits] == [384**-0.5, 32**-0.5]
    (first, _) = rows(make(EDM._replace(scale=-0.1)))
    assert struct.unpack("<d", struct.pack("<q", first["scale"]))[0] == -0.1


def test_code_does_not_depend_on_the_counts():
    for layout in (EDM, EDM._replace(tokens=1024, context=1024)):
        for which in WHICH:
            other = layout._replace(counts=(0, 1, 2))
            assert make(layout, which).constants == make(other, which).constants


def test_split_holds_every_head_in_two_powers_of_two():
    for head_dim in range(1, plans.LARGEST_HEAD + 1):
        low, high = plans.split(head_dim)
        assert head_dim <= low + high <= max(1.5 * head_dim, head_dim + 15)
        assert all(16 <= side <= 256 and side & (side - 1) == 0 for side in (low, high) if side)
    assert [plans.split(d) for d in (384, 256, 40, 24)] == [(256, 128), (256, 0), (32, 16), (32, 0)]


def test_streams_begin_beyond_256_tokens_of_the_other_side():
    cross = EDM._replace(tokens=4096, context=77)
    assert not make(cross).streams
    assert not make(cross, "dq").streams
    assert make(cross, "dkv").streams
    assert make(cross._replace(context=257)).streams


def test_rows_that_fill_a_power_of_two_are_not_masked():
    assert [make(EDM._replace(context=c)).constants["RAGGED"] for c in (256, 255, 16, 15)] == [0, 1, 0, 1]
    assert [make(EDM._replace(context=c)).constants["RAGGED"] for c in (1024, 1023)] == [0, 1]


@pytest.mark.parametrize(
    ("order", "head_dims", "tokens", "elements"),
    [
        ("nthd", (384, 32), 9, 8),
        ("nthd", (384, 36), 9, 1),
        ("nthpd", (24, 40), 9, 8),
        ("nthdp", (384, 32), 16, 1),
        ("nhpdt", (5, 3), 16, 8),
        ("nphdt", (8, 8), 9, 1),
    ],
)
def test_loads_are_wide_where_every_row_starts_at_16_bytes(order, head_dims, tokens, elements):
    assert (
        plans.vector(AttentionLayout((1, 1), (1, 1), head_dims, tokens, tokens, order, None), 2) == elements
    )


def test_offsets_are_64_bit():
    last = rows(make(EDM._replace(counts=(40_000, 0, 1))))[-1]
    assert last["q"] == last["v"] == last["y"] == 40_000 * 256 * 384 > 2**31


def test_plans_are_cached_per_shapes():
    assert make(LAYOUTS.same(EDM)) is make(LAYOUTS.same(AttentionLayout(*EDM)))
    assert make(EDM) is not make(EDM._replace(counts=(1, 1, 1)))


@pytest.mark.parametrize("architecture", tuned.architectures())
@pytest.mark.parametrize("arithmetic", tuned.ARITHMETICS)
@pytest.mark.parametrize("which", WHICH)
def test_tables_hold_powers_of_two_for_all_heads(which, arithmetic, architecture):
    parameters = tuned.attention(architecture, arithmetic, which)
    tiles = [parameters.row, parameters.ragged_row, parameters.single_row]
    sides = [side for tile in tiles for side in (tile.own, tile.depth)]
    for streams in (parameters.stream, parameters.single_stream):
        sides += [side for tile in streams for side in (tile.own, tile.other)]
        heads = [tile.head for tile in streams]
        assert heads == sorted(heads)
        assert heads[-1] == plans.LARGEST_HEAD
    assert all(side >= 16 and side & (side - 1) == 0 for side in sides)


def slower(
    layout: AttentionLayout, dtype: torch.dtype = torch.bfloat16, backward: bool = False
) -> str | None:
    return triton.slower(Call("attention", GPU, dtype, layout, backward))


LONG = AttentionLayout((4,), (8,), (64,), 1024, 1024, "nthd", None)


def test_auto_leaves_long_sequences_of_one_stage_to_sdpa():
    assert "estimate" in slower(LONG)
    assert slower(LONG, backward=True) is None, "SDPA's backward on CUDA is not deterministic"
    assert "1024 context tokens and head dimension 64" in slower(
        LONG._replace(counts=(4, 0), heads=(8, 8), head_dims=(64, 512))
    )


@pytest.mark.parametrize(
    "layout",
    [
        EDM,
        LONG._replace(context=256),
        LONG._replace(head_dims=(384,)),
        LONG._replace(head_dims=(44,)),
        EDM._replace(tokens=1024, context=1024),
        LONG._replace(counts=(0,)),
    ],
    ids=["stages", "256 tokens", "head 384", "head 44", "long stages", "no samples"],
)
def test_auto_takes_triton_elsewhere(layout):
    assert slower(layout) is None


def test_too_large_heads_and_samples_are_refused():
    def reason(layout: AttentionLayout) -> str:
        return triton.cannot(Call("attention", GPU, torch.bfloat16, layout))

    assert "up to 512, got 513" in reason(LONG._replace(head_dims=(513,)))
    assert re.search(r"one sample may span \d+ elements", reason(LONG._replace(tokens=2**23)))


def test_hot_path_never_waits_for_the_device():
    for module in (triton, plans):
        found = re.findall(
            r"\.item\(|\.cpu\(|\.tolist\(|\.numpy\(|synchronize\(|\.cuda\(", Path(module.__file__).read_text()
        )
        assert not found, f"{module.__name__}: {found}"
