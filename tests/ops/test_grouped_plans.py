"""Plans of the grouped Triton kernels, their launch parameters and the choice of backend: all without Triton."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import import_benchmarks
from msd_kernels.dispatch.backends import Call
from msd_kernels.dispatch.layout_cache import LAYOUTS
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d import plan as problems
from msd_kernels.ops.grouped_conv2d import triton
from msd_kernels.ops.grouped_conv2d.plan import PRODUCT_FIELDS, SUM_FIELDS, WGRAD_FIELDS
from msd_kernels.ops.grouped_linear import triton as linear
from msd_kernels.runtime import formulas, launch, plan_cache, tuned
from msd_kernels.runtime.formulas import Recording

CPU = torch.device("cpu")
PRODUCT = tuned.product(90, "half")
WGRAD = tuned.wgrad(90, "half")
EDM = Conv2dLayout((60, 0, 3), (384, 256, 32), (256, 256, 256), (384, 256, 32), 32, 32, 3, "none")
HOT_PATH = (triton, linear, problems, formulas, plan_cache, launch)


def rows(table: plan_cache.Table, fields) -> list[dict[str, int]]:
    """The problems of a table by field name, without the unused ones."""
    columns = table.values.view(len(fields), -1).t().tolist()
    return [dict(zip(fields, c, strict=True)) for c in columns if c[0] < table.tiles]


def with_formulas(layout: Conv2dLayout) -> Conv2dLayout:
    return layout._replace(counts=Recording(layout.counts).counts)


def product_plan(plans: problems.ProductPlans, layout: Conv2dLayout) -> SimpleNamespace:
    """The plan that serves a layout's counts, with its table."""
    plan = plans.plan(plans.choose(layout.counts))
    (table,), _ = plan.tables.at(layout.counts, CPU)
    return SimpleNamespace(table=table, wide=plan.wide, narrow=plan.narrow, warps=plan.warps)


def forward_plan(layout: Conv2dLayout, parameters: tuned.ProductParameters = PRODUCT) -> SimpleNamespace:
    return product_plan(problems.forward_plans(with_formulas(layout), parameters, CPU), layout)


def dgrad_plan(layout: Conv2dLayout, wanted: tuple[bool, bool]) -> SimpleNamespace:
    return product_plan(problems.dgrad_plans(with_formulas(layout), wanted, PRODUCT, CPU), layout)


def wgrad_plan(layout: Conv2dLayout, wanted: tuple[bool, bool, bool]) -> SimpleNamespace:
    plan = problems.wgrad_plan(with_formulas(layout), wanted, WGRAD, CPU)
    (partials, sums), (workspace,) = plan.tables.at(layout.counts, CPU)
    return SimpleNamespace(partials=partials, sums=sums, workspace=workspace)


def test_forward_has_one_problem_per_stage_with_samples():
    plan = forward_plan(EDM)
    wide, narrow = rows(plan.table, PRODUCT_FIELDS)
    assert (wide["rows"], wide["columns"], wide["narrow"]) == (60 * 1024, 384, 0)
    assert (narrow["rows"], narrow["columns"], narrow["narrow"]) == (3 * 1024, 32, 1)
    assert narrow["result"] == 60 * 1024 * 384
    assert narrow["weight"] == 9 * (384 * 640 + 256 * 512)


def test_forward_covers_every_tile_once():
    plan = forward_plan(EDM)
    _, narrow = rows(plan.table, PRODUCT_FIELDS)
    assert narrow["first_tile"] == 60 * 1024 // plan.wide.m * (384 // plan.wide.n)
    assert plan.table.tiles == narrow["first_tile"] + 3 * 1024 // plan.narrow.m


def test_longest_tiles_come_first():
    layout = EDM._replace(counts=(1, 2, 3), channels=(64, 256, 128), out_channels=(64, 64, 64))
    plan = forward_plan(layout)
    assert [p["channels"] for p in rows(plan.table, PRODUCT_FIELDS)] == [256, 128, 64]


def test_dgrad_serves_both_sources_in_one_table():
    plan = dgrad_plan(EDM, (True, True))
    found = rows(plan.table, PRODUCT_FIELDS)
    assert sorted((p["target"], p["columns"]) for p in found) == [(0, 32), (0, 384), (1, 256), (1, 256)]
    first_of_x = next(p["weight"] for p in found if p["columns"] == 32)
    assert first_of_x + 32 in [p["weight"] for p in found if p["target"] == 1]


@pytest.mark.parametrize("stages", [1, 3, 64])
def test_tables_grow_with_stages_alone(stages):
    few, many = (
        Conv2dLayout((n,) * stages, (64,) * stages, (0,) * stages, (64,) * stages, 8, 8, 3, "none")
        for n in (1, 999)
    )
    sizes = {forward_plan(layout).table.values.shape for layout in (few, many)}
    assert sizes == {(len(PRODUCT_FIELDS) * max(4, stages if stages == 64 else 4),)}


def test_offsets_are_64_bit():
    layout = Conv2dLayout((40_000, 8), (64, 64), (0, 0), (64, 64), 32, 32, 1, "none")
    last = rows(forward_plan(layout).table, PRODUCT_FIELDS)[-1]
    assert last["result"] == 40_000 * 1024 * 64 > 2**31


def test_wgrad_writes_zeros_for_an_empty_stage():
    plan = wgrad_plan(EDM, (True, True, False))
    empty = [p for p in rows(plan.sums, SUM_FIELDS) if p["terms"] == 0]
    assert sorted((p["target"], p["size"]) for p in empty) == [(0, 9 * 256 * 512), (1, 256)]


def test_wgrad_partial_sums_fill_the_workspace_without_overlap():
    plan = wgrad_plan(EDM, (True, True, True))
    spans = sorted(
        (p["partial"], p["terms"] * p["stride"] if p["stride"] else p["size"])
        for p in rows(plan.sums, SUM_FIELDS)
    )
    ends = {start + size for start, size in spans}
    assert max(ends) == plan.workspace
    starts = {start for start, size in spans if size}
    assert starts <= ends | {0}


def test_wgrad_cuts_long_sums_into_many_tiles():
    small = wgrad_plan(EDM, (True, False, False))
    large = wgrad_plan(EDM._replace(counts=(600, 0, 30)), (True, False, False))
    assert large.partials.tiles >= problems.WGRAD_TILES * 0.9
    assert {p["chunk"] % WGRAD.wide.k for p in rows(large.partials, WGRAD_FIELDS)} == {0}
    assert small.partials.tiles > 0


def planned(layout: Conv2dLayout, arithmetic: str = "half", itemsize: int = 2, biased_samples: bool = False):
    return triton._plan_forward(layout, arithmetic, itemsize, biased_samples, PRODUCT, CPU)


def test_plans_are_cached_per_shapes():
    assert planned(LAYOUTS.same(EDM)) is planned(LAYOUTS.same(Conv2dLayout(*EDM)))
    assert planned(EDM) is not planned(EDM._replace(counts=(1, 1, 1)))


def test_biases_of_single_samples_take_no_large_tile(monkeypatch):
    monkeypatch.setattr(problems, "multiprocessors", lambda _: 1)
    layout = EDM._replace(counts=(3, 2, 1))
    build = triton._plan_forward.__wrapped__
    sides = [
        build(with_formulas(layout), "half", 2, biased, PRODUCT, CPU)(layout.counts).options["WIDE_M"]
        for biased in (False, True)
    ]
    assert sides == [PRODUCT.large.m, PRODUCT.wide.m]


@pytest.mark.parametrize(
    ("out_channels", "narrow_m"), [((3, 3, 3), PRODUCT.narrow.m), ((3, 3, 65), PRODUCT.unaligned.m)]
)
def test_few_out_channels_of_any_number_keep_the_wide_loads(out_channels, narrow_m):
    """A network's last convolution has 3: what it loads is aligned all the same."""
    options = planned(EDM._replace(out_channels=out_channels)).options
    assert (options["VECTOR_IN"], options["VECTOR_OUT"]) == (8, 1)
    assert options["NARROW_M"] == narrow_m


def test_vector_needs_every_channel_count_divisible():
    assert problems.vector(2, (384, 32)) == 8
    assert problems.vector(2, (384, 12)) == 1
    assert problems.vector(4, (12, 4)) == 4


def test_few_rows_take_the_short_tile():
    plan = forward_plan(Conv2dLayout((5, 3), (512, 512), (0, 0), (384, 32), 1, 1, 1, "none"))
    assert (plan.wide.m, plan.narrow, plan.warps) == (PRODUCT.short.m, None, PRODUCT.short_warps)


@pytest.mark.parametrize("parameters", [PRODUCT, tuned.product(80, "float32")], ids=["large", "none"])
def test_single_elements_take_the_unaligned_tile(parameters):
    (launch, _), *others = parameters.for_vectors(8, 1).launches(1000, 64, False, False)
    assert launch.wide == parameters.unaligned
    assert launch.narrow.n == parameters.narrow.n
    assert launch.narrow.m <= parameters.unaligned.m
    assert launch.narrow.k <= parameters.unaligned.k
    assert not others
    assert parameters.for_vectors(8, 8) is parameters


@pytest.mark.parametrize(
    ("multiprocessors", "rows", "large"),
    [
        (1, 10, True),  # one large tile for two wide ones
        (4, 2, False),  # two wide tiles at once are sooner there than a large one
        (4, 8, True),
        (4, 9, False),  # the ninth pair of wide tiles would need a large round of its own
        (4, 100, True),
    ],
)
def test_large_tiles_serve_where_they_fill_the_gpu(multiprocessors, rows, large, monkeypatch):
    """``rows`` are those of wide tiles."""
    monkeypatch.setattr(problems, "multiprocessors", lambda _: multiprocessors)
    layout = Conv2dLayout((rows,), (64,), (0,), (128,), PRODUCT.wide.m, 1, 3, "none")
    plan = forward_plan(layout)
    assert (plan.wide.m, plan.wide.n) == ((256, 128) if large else (128, 128))


@pytest.mark.parametrize(("kernel", "resample"), [(3, "up"), (3, "down"), (1, "up")])
def test_resampled_launches_take_no_large_tile(kernel, resample, monkeypatch):
    monkeypatch.setattr(problems, "multiprocessors", lambda _: 1)
    layout = Conv2dLayout((99,), (64,), (0,), (128,), 16, 16, kernel, resample)
    assert forward_plan(layout).wide.m == 128


@pytest.mark.parametrize(("unknown", "taken"), [(86, 80), (89, 80), (103, 100), (120, 80), (75, 80)])
def test_an_unknown_gpu_takes_the_nearest_table(unknown, taken):
    assert tuned.product(unknown, "half") == tuned.product(taken, "half")


@pytest.mark.parametrize("architecture", tuned.architectures())
@pytest.mark.parametrize("arithmetic", tuned.ARITHMETICS)
def test_tables_hold_powers_of_two(architecture, arithmetic):
    for parameters in (tuned.product(architecture, arithmetic), tuned.wgrad(architecture, arithmetic)):
        tiles = [parameters.wide, parameters.narrow, parameters.pooled, parameters.unaligned]
        for tile in [*tiles, getattr(parameters, "large", None) or parameters.wide]:
            assert all(
                side >= tuned.SMALLEST_SIDE and side & (side - 1) == 0 for side in (tile.m, tile.n, tile.k)
            )


@pytest.fixture
def on_a_gpu(monkeypatch) -> torch.device:
    monkeypatch.setattr(tuned, "architecture_of", lambda device: 90)
    return torch.device("cuda", 0)


def test_auto_takes_one_launch_where_stages_are_small(on_a_gpu):
    small = EDM._replace(counts=(1, 1, 1), skip_channels=(0, 0, 0))
    assert triton.slower(Call("grouped_conv2d", on_a_gpu, torch.bfloat16, small)) is None


def test_auto_takes_the_library_where_stages_are_large(on_a_gpu):
    reason = triton.slower(Call("grouped_conv2d", on_a_gpu, torch.bfloat16, EDM))
    assert re.search(r"\d GFLOP per non-empty stage are more than", reason)


def test_auto_takes_the_library_for_one_stage(on_a_gpu):
    alone = EDM._replace(counts=(1, 0, 0))
    assert "one library call" in triton.slower(Call("grouped_conv2d", on_a_gpu, torch.bfloat16, alone))


def test_too_large_an_image_is_refused():
    layout = Conv2dLayout((1,), (2048,), (0,), (4,), 1024, 1024, 1, "none")
    assert "2147483648" in triton.cannot(Call("grouped_conv2d", CPU, torch.float32, layout))


def test_too_many_pixels_are_refused():
    layout = Conv2dLayout((2**21, 1), (4, 4), (0, 0), (4, 4), 32, 32, 1, "none")
    assert f"got {2**31}" in triton.cannot(Call("grouped_conv2d", CPU, torch.float32, layout))
    fewer = layout._replace(counts=(2**21 - 2**15, 2**20))
    assert "pixels" not in (triton.cannot(Call("grouped_conv2d", CPU, torch.float32, fewer)) or "")


def test_too_large_a_kernel_is_refused():
    layout = Conv2dLayout((1,), (4,), (0,), (4,), 32, 32, 17, "none")
    assert "up to 15, got 17" in triton.cannot(Call("grouped_conv2d", CPU, torch.float32, layout))
    fits = layout._replace(kernel=15)
    assert "kernel" not in (triton.cannot(Call("grouped_conv2d", CPU, torch.float32, fits)) or "")


def test_hot_path_never_waits_for_the_device():
    for module in HOT_PATH:
        source = Path(module.__file__).read_text()
        found = re.findall(
            r"\.item\(|\.cpu\(|\.tolist\(|\.numpy\(|synchronize\(|\.cuda\(|\.to\((?!device, non_blocking)",
            source,
        )
        assert not found, f"{module.__name__}: {found}"


@pytest.fixture
def tuning():
    import_benchmarks()
    return import_module("tune_grouped_conv2d")


@pytest.mark.parametrize("architecture", tuned.architectures())
def test_the_tuning_command_writes_tables_as_they_are_committed(architecture, tuning):
    """Whatever it does not tune, like attention's tiles, must survive."""
    committed = (Path(tuned.__file__).parent / f"sm_{architecture}.json").read_text()
    assert tuning.format_table(tuned.table(architecture)) == committed


@pytest.mark.parametrize(("gain", "large"), [(1.25, tuned.Tile(256, 128, 32, 3)), (1.0, None)])
def test_tuning_keeps_a_large_tile_that_is_faster(gain, large, tuning, monkeypatch):
    """All tiles take the same time per unit of work but one, which is faster or not."""
    tried = []

    def seconds_of(parameters, run, timer):
        tried.append(parameters.wide)
        return 1 / gain if parameters.wide == tuned.Tile(256, 128, 32, 3) else 1.0

    monkeypatch.setattr(tuning, "seconds_of", seconds_of)
    start = replace(PRODUCT, large=None, large_speed=1.0)
    found = tuning.with_large(start, PRODUCT.large, None, None, float("inf"))
    assert (found.large, found.large_speed) == (large, gain)
    assert tried[:2] == [PRODUCT.wide, PRODUCT.large]
    assert len(tried) == len(set(tried))
