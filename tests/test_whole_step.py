"""The benchmark of whole steps, with small networks: what it compares, sums up and refuses."""

from __future__ import annotations

import argparse
from collections import Counter

import pytest
import torch

from forks import run
from helpers import SMALL_EDM, import_benchmarks

import_benchmarks()

import products  # noqa: E402
import whole_networks  # noqa: E402
import whole_step  # noqa: E402
import winograd_layers  # noqa: E402

import harness  # noqa: E402
from msd_kernels.dispatch.backends import BackendError  # noqa: E402
from msd_kernels.layouts import AttentionLayout, LinearLayout  # noqa: E402
from multistage_diffusion import flops, networks  # noqa: E402

COUNTS = (3, 0, 2)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(whole_networks, "CONFIG", SMALL_EDM)
    whole_networks.published.cache_clear()
    yield
    whole_networks.published.cache_clear()


@pytest.mark.parametrize(
    ("forward", "dtype"),
    [(False, torch.float32), (True, torch.bfloat16)],
    ids=["training float32", "sampling bfloat16"],
)
def test_a_step_is_summed_up(forward, dtype, monkeypatch):
    monkeypatch.setattr(whole_step.WholeStep, "peak_bytes", lambda self, say: {"ours": 1, "plain": 2})
    said: list[str] = []
    step = whole_step.WholeStep(COUNTS, dtype, forward)
    found = whole_step.measure(step, seconds=0.0, say=said.append)
    assert found["compiled"] is None
    assert all(found[name] > 0 for name in ("ours", "plain", "floor"))
    assert found["ratio"] == pytest.approx(found["plain"] / found["ours"], rel=1e-3)
    assert found["spread"].keys() == {"ours", "plain", "floor", "ratio"}
    assert found["peak_bytes"] == {"ours": 1, "plain": 2}
    assert found["plain_dtype"] == str(step.plain_dtype).removeprefix("torch.")
    assert {line.split()[-1] for line in said} >= {"ours", "plain", "floor"}
    for name in ("ours", "plain", "floor", "plain / ours"):
        assert name in whole_step.report(found)


@pytest.mark.parametrize("forward", [False, True], ids=["training", "sampling"])
def test_a_wrong_network_is_not_timed(forward):
    network = whole_networks.published("cpu", torch.float32).ours
    with torch.no_grad():
        network.state_dict()["dec.8x8.head.conv.weight.2"].mul_(1.01)
    with pytest.raises(AssertionError, match="a wrong"):
        whole_step.WholeStep(COUNTS, forward=forward).cases(lambda text: None)


def test_the_floor_has_every_product_as_often_as_the_step():
    with torch.device("meta"):
        cost = flops.count(networks.build(SMALL_EDM))
    found = products.layouts(SMALL_EDM, COUNTS)
    operations = sum(
        times * (2 * layout.product_flops if isinstance(layout, AttentionLayout) else layout.flops)
        for layout, times in found.items()
    )
    assert operations == sum(2 * n * macs for n, macs in zip(COUNTS, cost.macs, strict=True))
    calls: Counter[int] = Counter()
    floor = products.Floor(found, torch.float32, backward=True)
    floor.parts = [
        products.Part(lambda i=i: calls.update([i]), part.times) for i, part in enumerate(floor.parts)
    ]
    floor()
    assert list(calls.values()) == list(found.values())


def test_the_floor_takes_the_faster_way(monkeypatch):
    """And leaves out what cannot serve."""
    seconds = {"cpu": 2.0, "library": 1.0}

    def computed_by(way, function, product):
        def call():
            if way == "slowest":
                raise BackendError("cannot")
            return way

        return call

    monkeypatch.setattr(products, "computed_by", computed_by)
    monkeypatch.setattr(products, "wall_clock", lambda function: seconds[function()])
    for ways in (("slowest", "cpu", "library"), ("library", "cpu")):
        monkeypatch.setattr(products, "WAYS", ways)
        floor = products.Floor(Counter({LinearLayout((2,), (4,), (4,)): 1}), torch.float32, backward=False)
        assert floor.parts[0].run() == "library"


WEIGH = """
import sys
import torch
import harness, whole_networks, whole_step
whole_networks.CONFIG = {config}
print(harness.extra_bytes(lambda: torch.ones(2**24)))
print(whole_step.WholeStep((8, 0, 0), forward=sys.argv[2] == "forward").weigh(sys.argv[1]))
"""


@pytest.mark.parametrize(("name", "kind"), [("ours", "forward"), ("plain", "step")])
def test_a_step_is_weighed_alone(name, kind):
    """The memory of a process is that of its tensors and of what a first call loads."""
    config = {**SMALL_EDM, "image_size": 32, "attn_resolutions": (16,)}
    program = run(WEIGH.format(config=config), name, kind, path=[harness.ROOT / "benchmarks"])
    assert program.returncode == 0, program.stderr
    ones, step = map(int, program.stdout.split())
    assert 2**26 <= ones < 2**26 + 2**23
    three_maps = 3 * 8 * 24 * 32 * 32 * 4
    assert three_maps < step < 2**28


@pytest.mark.parametrize("text", ["8,0", "0,0,0", "1,-1,2"])
def test_counts_are_one_per_stage(text):
    with pytest.raises(argparse.ArgumentTypeError, match="counts are 3 numbers"):
        whole_step.parse_counts(text)


def result(ours: float, taken: bool, batch: int = 8) -> winograd_layers.Result:
    (layout, *_) = winograd_layers.layers(["edm-cifar10"], batch)
    turns = {"ours": [(ours,)], "oneDNN": [(1.0,)]}
    races = dict.fromkeys(winograd_layers.PASSES, harness.Comparison(turns))
    return winograd_layers.Result(layout, taken, races)


def test_auto_loses_where_it_takes_what_is_slower():
    assert result(1.02, taken=True).losses == []
    assert result(1.05, taken=True).losses == list(winograd_layers.PASSES)
    assert result(1.05, taken=True, batch=1).losses == []
    assert result(1.2, taken=True, batch=1).row()[-1] == "loses"
    assert result(9.0, taken=False).losses == []
