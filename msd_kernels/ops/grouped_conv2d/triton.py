"""The grouped convolution in Triton: one launch forward, at most three backward, for any number of stages.

The kernels are imported with the first call, so that this module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from msd_kernels.dispatch import allocate, stage_weights
from msd_kernels.dispatch.backends import Call
from msd_kernels.layouts import Conv2dLayout
from msd_kernels.ops.grouped_conv2d.plan import (
    MAX_KERNEL,
    MAX_LOCAL,
    ProductPlans,
    arithmetic_constants,
    dgrad_modes,
    dgrad_plans,
    forward_modes,
    forward_plans,
    sum_constants,
    tile_constants,
    wgrad_modes,
    wgrad_plan,
)
from msd_kernels.runtime import launch as triton_launch
from msd_kernels.runtime import tuned
from msd_kernels.runtime.compilation import register_options
from msd_kernels.runtime.plan_cache import Table, cached_plan


class PlannedLaunch(NamedTuple):
    """One launch, but for its tensors.

    Attributes:
        kernel: what is launched.
        table: its problems.
        sizes: what the kernel takes besides, by value: the tiles and the map's height and width, where it walks them.
        programs_per_multiprocessor: of a grid that walks the tiles; None for one program per tile.
        options: the kernel's constants and the compiler's options.
    """

    kernel: object
    table: Table
    sizes: tuple[int, ...]
    programs_per_multiprocessor: int | None
    options: dict[str, object]

    def launch(self, on: Tensor, *tensors: Tensor | None, numbers: tuple[float, ...] = ()) -> None:
        """Runs the kernel on its tensors, the table, the sizes and other numbers, if there is anything to do."""
        grid = self.table.tiles
        if self.programs_per_multiprocessor:
            grid = triton_launch.programs(on.device, grid, self.programs_per_multiprocessor)
        if grid:
            arguments = (*tensors, self.table.values, *self.sizes, *numbers)
            triton_launch.launch(self.kernel, grid, on, *arguments, **self.options)


def cannot(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    layout = call.layout
    if layout.largest_local_offset > MAX_LOCAL // 2:
        return (
            f"one stage's weight and one sample's feature map may have {MAX_LOCAL // 2} elements, "
            f"got {layout.largest_local_offset}"
        )
    if layout.most_pixels > MAX_LOCAL:
        return f"one stage's samples may have {MAX_LOCAL} pixels together, got {layout.most_pixels}"
    if layout.kernel > MAX_KERNEL:
        return f"takes kernels up to {MAX_KERNEL}, got {layout.kernel}"
    return triton_launch.cannot_run(call.device.type, call.dtype)


def slower(call: Call) -> str | None:
    """Why the library's loop over the stages is preferred to one launch, or None."""
    if call.device.type != "cuda":
        return triton_launch.slower_than_others(call.device.type)
    stages = len(call.layout.stages)
    if stages < 2:
        return f"{stages} non-empty stage: one library call is one launch too"
    rule = tuned.crossover(tuned.architecture_of(call.device), call.op)
    gflop = call.layout.flops / stages / 1e9
    if gflop <= rule.gflop_per_stage:
        return None
    origin = (
        f"measured on {rule.measured_on}" if rule.measured_on else "an estimate, not measured on this GPU"
    )
    return (
        f"{gflop:.3g} GFLOP per non-empty stage are more than {rule.gflop_per_stage:g}, "
        f"from where on one library call per stage is faster ({origin})"
    )


def grouped_conv2d(
    x: Tensor,
    skip: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    layout: Conv2dLayout,
    scale: float,
) -> Tensor:
    """The flat output of :func:`msd_kernels.grouped_conv2d`."""
    return run_forward(x, skip, sample_bias, residual, weight, bias, layout, scale, _arithmetic(x))


def grouped_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Sequence[Tensor],
    layout: Conv2dLayout,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for ``(x, skip, sample_bias, *weight, *bias)`` from the cotangent of the unscaled sum."""
    return run_backward(dy, x, skip, weight, layout, wanted, _arithmetic(x))


def _arithmetic(x: Tensor) -> str:
    """Float32 follows PyTorch's own setting for convolutions."""
    allow_tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return tuned.arithmetic(x.dtype, allow_tf32)


def run_forward(x, skip, sample_bias, residual, weight, bias, layout, scale, arithmetic) -> Tensor:
    """Allocates and computes the output."""
    y = x.new_empty(sum(layout.out_sizes))
    x, skip, sample_bias, residual = (
        t if t is None else t.contiguous() for t in (x, skip, sample_bias, residual)
    )
    weight, bias = (stage_weights.joined(tensors, x.dtype) for tensors in (weight, bias))
    grouped_conv2d_forward(x, skip, weight, bias, sample_bias, residual, y, layout, scale, arithmetic)
    return y


def run_backward(dy, x, skip, weight, layout, wanted, arithmetic) -> list[Tensor | None]:
    """Allocates and computes the wanted gradients; those of the weights and biases in the dtype of the weights."""
    stages, masters = len(weight), weight[0].dtype
    want_weight, want_bias = wanted[3 : 3 + stages], wanted[3 + stages :]
    dy, x, skip = (t if t is None else t.contiguous() for t in (dy, x, skip))
    dx, dskip = allocate.gradients_like((x, skip), wanted[:2])
    dsample_bias = x.new_empty(sum(layout.sample_sizes)) if wanted[2] else None
    dweight = x.new_empty(sum(layout.weight_sizes), dtype=masters) if any(want_weight) else None
    dbias = x.new_empty(sum(layout.out_channels), dtype=masters) if any(want_bias) else None
    if dx is not None or dskip is not None:
        grouped_conv2d_dgrad(dy, stage_weights.joined(weight, x.dtype), dx, dskip, layout, arithmetic)
    if dweight is not None or dbias is not None or dsample_bias is not None:
        grouped_conv2d_wgrad(dy, x, skip, dweight, dbias, dsample_bias, layout, arithmetic)
    return [
        dx,
        dskip,
        dsample_bias,
        *stage_weights.wanted_parts(dweight, layout.weight_shapes, want_weight),
        *stage_weights.wanted_parts(dbias, layout.bias_shapes, want_bias),
    ]


def grouped_conv2d_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    layout: Conv2dLayout,
    scale: float,
    arithmetic: str,
    parameters: tuned.ProductParameters | None = None,
) -> None:
    """Writes ``y``: one launch, with the committed parameters unless others are given."""
    planned = _plan_forward(layout, arithmetic, x.itemsize, sample_bias is not None, parameters, x.device)
    planned.launch(x, x, skip, weight, bias, sample_bias, residual, y, numbers=(scale,))


@cached_plan
def _plan_forward(
    layout: Conv2dLayout,
    arithmetic: str,
    itemsize: int,
    biased_samples: bool,
    parameters: tuned.ProductParameters | None,
    device: torch.device,
) -> Callable[[Sequence[int]], PlannedLaunch]:
    constants = arithmetic_constants(layout, arithmetic, itemsize)
    parameters = parameters or tuned.product(tuned.architecture_of(device), arithmetic)
    vectors = [constants["VECTOR_IN"]]
    # Narrow tiles have the registers to store single elements.
    if max(layout.out_channels) > parameters.narrow.n:
        vectors.append(constants["VECTOR_OUT"])
    parameters = parameters.for_vectors(*vectors)
    if biased_samples:  # too many registers for the large tile
        parameters = replace(parameters, large=None)
    plans = forward_plans(layout, parameters, device)
    kernel = _product_kernels()._grouped_conv2d_forward_kernel
    return _planned_products(kernel, plans, layout, layout.grid, forward_modes(layout) | constants, device)


def _planned_products(
    kernel,
    plans: ProductPlans,
    layout: Conv2dLayout,
    grid: tuple[int, int],
    constants: dict,
    device: torch.device,
) -> Callable[[Sequence[int]], PlannedLaunch]:
    """The launch of the counts."""

    @cache
    def planned(choice: int) -> tuple:
        plan = plans.plan(choice)
        options = {
            "PROBLEMS": plan.tables.problems[0],
            "KERNEL": layout.kernel,
            **constants,
            **tile_constants(plan.wide, plan.narrow),
            "num_warps": plan.warps,
            **register_options(plan.warps, plan.programs_per_multiprocessor),
        }
        return plan.tables, plan.programs_per_multiprocessor, options

    def launch(counts: Sequence[int]) -> PlannedLaunch:
        tables, walk, options = planned(plans.choose(counts))
        (table,), _ = tables.at(counts, device)
        return PlannedLaunch(kernel, table, (table.tiles, *grid), walk, options)

    return launch


def grouped_conv2d_dgrad(
    dy: Tensor, weight: Tensor, dx: Tensor | None, dskip: Tensor | None, layout: Conv2dLayout, arithmetic: str
) -> None:
    """Writes the gradients of both sources, or of the one that is wanted: one launch."""
    wanted = (dx is not None, dskip is not None)
    planned = _plan_dgrad(layout, wanted, arithmetic, dy.itemsize, dy.device)
    planned.launch(dy, dy, weight, dskip if dx is None else dx, dskip)


@cached_plan
def _plan_dgrad(
    layout: Conv2dLayout, wanted: tuple[bool, bool], arithmetic: str, itemsize: int, device: torch.device
) -> Callable[[Sequence[int]], PlannedLaunch]:
    constants = arithmetic_constants(layout, arithmetic, itemsize)
    parameters = tuned.product(tuned.architecture_of(device), arithmetic)
    parameters = parameters.for_vectors(constants["VECTOR_IN"], constants["VECTOR_OUT"])
    plans = dgrad_plans(layout, wanted, parameters, device)
    kernel = _product_kernels()._grouped_conv2d_dgrad_kernel
    return _planned_products(
        kernel, plans, layout, layout.source_grid, dgrad_modes(layout) | constants, device
    )


def grouped_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dsample_bias: Tensor | None,
    layout: Conv2dLayout,
    arithmetic: str,
    parameters: tuned.WgradParameters | None = None,
) -> None:
    """Writes those gradients that are not None: one launch for partial sums, one to add them up."""
    wanted = tuple(g is not None for g in (dweight, dbias, dsample_bias))
    size, partials, sums = _plan_wgrad(layout, wanted, arithmetic, x.itemsize, parameters, x.device)
    workspace = x.new_empty(size, dtype=torch.float32)
    partials.launch(x, dy, x, skip, workspace)
    sums.launch(x, workspace, dweight, dbias, dsample_bias)


@cached_plan
def _plan_wgrad(
    layout: Conv2dLayout,
    wanted: tuple[bool, bool, bool],
    arithmetic: str,
    itemsize: int,
    parameters: tuned.WgradParameters | None,
    device: torch.device,
) -> Callable[[Sequence[int]], tuple[int, PlannedLaunch, PlannedLaunch]]:
    """The size of the workspace, the launch of the partial sums and that of their sums."""
    constants = arithmetic_constants(layout, arithmetic, itemsize)
    parameters = parameters or tuned.wgrad(tuned.architecture_of(device), arithmetic)
    parameters = parameters.for_vectors(constants["VECTOR_IN"], constants["VECTOR_OUT"])
    plan = wgrad_plan(layout, wanted, parameters, device)
    walk, grid = parameters.programs_per_multiprocessor, layout.grid
    options = {
        "PROBLEMS": plan.tables.problems[0],
        "KERNEL": layout.kernel,
        **wgrad_modes(layout),
        **constants,
        **tile_constants(plan.wide, plan.narrow),
        "SUM_ROWS": parameters.sum_rows if plan.pixel_sums else 0,
        "SUM_CHANNELS": parameters.sum_channels,
        "num_warps": parameters.warps,
        **register_options(parameters.warps, walk),
    }
    sum_options = {"PROBLEMS": plan.tables.problems[1], **sum_constants(parameters.sums)}
    kernels = import_module("msd_kernels.ops.grouped_conv2d.wgrad_kernels")

    def launches(counts: Sequence[int]) -> tuple[int, PlannedLaunch, PlannedLaunch]:
        (partials, sums), (workspace,) = plan.tables.at(counts, device)
        return (
            workspace,
            PlannedLaunch(
                kernels._grouped_conv2d_wgrad_kernel, partials, (partials.tiles, *grid), walk, options
            ),
            PlannedLaunch(kernels._grouped_conv2d_sum_partials_kernel, sums, (), None, sum_options),
        )

    return launches


@cache
def _product_kernels() -> ModuleType:
    return import_module("msd_kernels.ops.grouped_conv2d.product_kernels")
