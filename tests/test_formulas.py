"""Plans by formulas of the counts: what they give is what the same arithmetic gives for plain numbers."""

from __future__ import annotations

import random
from operator import floordiv

import pytest
import torch

from msd_kernels.layouts import AttentionLayout, Conv2dLayout, GroupNormLayout
from msd_kernels.ops.attention import plan as attention
from msd_kernels.ops.group_norm import triton as group_norm
from msd_kernels.ops.grouped_conv2d import plan as conv
from msd_kernels.runtime import formulas, plan_cache, tuned
from msd_kernels.runtime.formulas import Formulas, Linear, Recording, compiled, maximum, minimum

CPU = torch.device("cpu")
LAYOUTS = 700  # of each op and implementation
CHANNELS = (3, 8, 32, 64, 96, 160, 384)


@pytest.fixture(params=["python", "compiled"])
def implementation(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(formulas, "implementation", lambda: Formulas)
    elif formulas.implementation() is Formulas:
        pytest.skip("the extension was not built")


def draw(random_numbers: random.Random, stages: int, *choices: int) -> tuple[int, ...]:
    return tuple(random_numbers.choice(choices) for _ in range(stages))


def tables_of(tables: plan_cache.Tables, counts: tuple[int, ...]) -> list:
    found, numbers = tables.at(counts, CPU)
    return [[(t.values.tolist(), t.problems, t.tiles) for t in found], numbers]


def product_tables(plans: conv.ProductPlans, counts: tuple[int, ...]) -> list:
    choice = plans.choose(counts)
    return [choice, tables_of(plans.plan(choice).tables, counts)]


def plan_convolution(layout: Conv2dLayout, counts: tuple[int, ...], wanted: tuple[bool, ...]) -> list:
    product, wgrad = tuned.product(90, "half"), tuned.wgrad(90, "half")
    return [
        product_tables(conv.forward_plans(layout, product, CPU), counts),
        product_tables(conv.dgrad_plans(layout, wanted[:2], product, CPU), counts),
        tables_of(conv.wgrad_plan(layout, wanted, wgrad, CPU).tables, counts),
    ]


@pytest.mark.usefixtures("implementation")
def test_formulas_give_the_plans_of_plain_numbers():
    """Counts that are numbers make every cell a constant: Python's own arithmetic."""
    r = random.Random(0)
    for _ in range(LAYOUTS):
        stages = r.choice((1, 3, 3, 12))
        counts = draw(r, stages, 0, 1, 2, 60, r.randint(1, 5000))
        recorded = Recording(counts).counts
        widths = [draw(r, stages, *CHANNELS) for _ in range(2)]
        side, resample = 2 * r.randint(1, 32), r.choice(("none", "up", "down"))
        layout = Conv2dLayout(
            counts, widths[0], draw(r, stages, 0, 64), widths[1], side, side, r.choice((1, 3)), resample
        )
        wanted = draw(r, 3, False, True)
        plain = plan_convolution(layout, counts, wanted)
        assert plan_convolution(layout._replace(counts=recorded), counts, wanted) == plain, (layout, wanted)
        norm = GroupNormLayout(
            counts, draw(r, stages, 32, 96), (0,) * stages, draw(r, stages, 1, 8), side, True, 0.0, False
        )
        heads = draw(r, stages, 1, 4)
        scores = AttentionLayout(counts, heads, draw(r, stages, 16, 40, 384), side, 64, "nthd", None)
        parameters = tuned.attention(90, "half", "dkv")
        for build, shapes, others in (
            (group_norm.plan, norm, ()),
            (attention.plan, scores, ("dkv", parameters, "half", 2)),
        ):
            found, expected = (
                [value.values.tolist() if isinstance(value, plan_cache.Table) else value for value in plan]
                for plan in (
                    build.__wrapped__(shapes._replace(counts=c), *others, CPU)(counts)
                    for c in (recorded, counts)
                )
            )
            assert found == expected, shapes


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("counts", [(7, 2), (1, 5000)])
def test_formulas_of_each_kind(counts):
    a, b = Recording((1, 1)).counts
    outputs = [
        a + 1,
        3 * b + a * 2,
        -a // 4,
        10 // b,
        maximum(a, b),
        minimum(4, a),
        sum([a, b] * 6),
        0 * a,
        5,
    ]
    n, m = counts
    expected = (n + 1, 3 * m + 2 * n, floordiv(-n, 4), 10 // m, max(n, m), min(4, n), 6 * (n + m), 0, 5)
    assert compiled(outputs)(counts) == expected


@pytest.mark.usefixtures("implementation")
def test_formulas_hold_64_bits_and_refuse_division_by_zero():
    (n,) = Recording((1,)).counts
    assert compiled([n * 2**40, n * -(2**40) // 3])((5,)) == (5 * 2**40, -5 * 2**40 // 3)
    with pytest.raises((ZeroDivisionError, ValueError)):
        compiled([1 // (n + -1)])((1,))


def test_stages_without_samples_stay_numbers():
    zero, one = Recording((0, 4)).counts
    assert zero == 0
    assert isinstance(one, Linear)


def test_new_counts_of_known_shapes_are_planned_by_formulas():
    built = []
    plan = plan_cache.cached_plan(
        lambda layout, device: built.append(layout.counts) or (lambda counts: counts)
    )
    layout = GroupNormLayout((1, 2), (8, 8), (0, 0), (2, 2), 4, True, 0.0, False)
    for counts in ((1, 2), (3, 4), (1, 2), (5, 0), (7, 0)):
        assert plan(layout._replace(counts=counts), CPU) == counts
    assert [[isinstance(n, Linear) for n in counts] for counts in built] == [[True, True], [True, False]]
