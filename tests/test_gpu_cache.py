"""Kernels found and compiled where there is no GPU, and the cache that carries them to one."""

from __future__ import annotations

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from helpers import import_benchmarks
from msd_kernels.layouts import GroupNormLayout
from msd_kernels.runtime import launch as triton_launch
from msd_kernels.runtime import tuned

import_benchmarks()

import bench_grouped_linear  # noqa: E402
import gpu_cache  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_races  # noqa: E402
import launches  # noqa: E402
from gpu_cache import Manifest  # noqa: E402
from launches import Launch, Pointer  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(triton_launch.unavailable()) or triton_launch.interpreted() or torch.cuda.is_available(),
    reason="needs Triton's compiler, and no GPU",
)

HALF, FLOAT, TABLE = (Pointer(dtype, 0) for dtype in (torch.bfloat16, torch.float32, torch.int64))
KERNEL_MODULE = "msd_kernels.ops.grouped_conv2d.wgrad_kernels"
CONSTANTS = {"PROBLEMS": 4, "BLOCK_TERMS": 4, "BLOCK": 16, "BIAS_BLOCK_TERMS": 4, "BIAS_BLOCK": 16}


def small_launch(dtype: torch.dtype = torch.float32) -> Launch:
    """Of a kernel that compiles quickly."""
    arguments = (FLOAT, Pointer(dtype, 0), None, None, TABLE)
    name = "_grouped_conv2d_sum_partials_kernel"
    return Launch(KERNEL_MODULE, name, arguments, tuple({"enable_fp_fusion": True, **CONSTANTS}.items()))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of one kernel for sm_90."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    return folder, gpu_cache.make([small_launch()], folder, 90)


def test_launches_are_those_of_the_plans_for_the_gpu():
    found: dict[Launch, None] = {}
    call = gpu_cases.stage_norm("small", (2, 0, 1), (3, 64, 160), (3, 8, 20), 9)
    case = gpu_cases.Case(call, "triton", "bf16")
    with launches.recorded(found):
        case.run("cpu")
    assert list(dict.fromkeys(launch.kernel for launch in found)) == [
        "_weights_kernel",
        "_write_cells_kernel",
        "_group_norm_forward_kernel",
        "_group_norm_backward_kernel",
        "_group_norm_parameters_kernel",
    ]
    forward, backward, parameters = [launch for launch in found if "group_norm" in launch.kernel]
    # One source, no seed; 81 pixels, eps, and what a dropout would take.
    tensors = (HALF, None, *(HALF,) * 4, None, HALF, FLOAT, FLOAT, TABLE)
    assert forward.arguments == (*tensors, 17, 0.5, 0, 0.5)
    from msd_kernels.ops.group_norm import triton as group_norm

    layout = GroupNormLayout((1, 1, 1), (3, 64, 160), (0, 0, 0), (3, 8, 20), 81, True, 1e-5, False)
    constants = group_norm.tile_constants(layout, tuned.group_norm(90))
    assert constants.items() <= dict(forward.options).items()
    assert dict(backward.options)["SILU"] is True
    assert parameters.arguments == (FLOAT, FLOAT, HALF, HALF, TABLE)


def test_launches_name_each_kind_of_arguments_once():
    def launch(number, offset, by_value=5):
        specialized = [SimpleNamespace(do_not_specialize=by_value) for by_value in (False,) * 4 + (True,)]
        kernel = SimpleNamespace(module="m", __name__="k", params=specialized)
        return Launch.of(kernel, (torch.zeros(64)[offset:], number, None, 0.25, by_value), {"BLOCK": 4})

    assert launch(32, 4) == launch(48, 0)
    assert launch(32, 0) == launch(32, 0, by_value=2**40)
    assert launch(32, 0) != launch(33, 0) != launch(1, 0)
    assert launch(32, 0) != launch(32, 1)
    assert launch(2**31, 0) != launch(16, 0)


def test_launches_of_forced_backends_and_autocast():
    """Under autocast group norm runs in float32 on a GPU; what the library serves launches nothing."""
    found: dict[Launch, None] = {}
    call = gpu_cases.linear("small", (3, 2), (32, 32), (16, 48))
    with launches.recorded(found):
        gpu_cases.Case(call, "library", "bf16").run("cpu")
    assert not found
    norm = gpu_cases.dense_norm("small", (2, 32, 4, 4), 8, torch.channels_last)
    with launches.recorded(found), torch.autocast("cpu", torch.bfloat16):
        gpu_cases.Case(norm, "triton", "bf16").run("cpu")
    tables, forward, *_ = found
    assert (tables.kernel, forward.arguments[0]) == ("_write_cells_kernel", FLOAT)


def test_launches_of_a_race_are_found_by_its_own_functions(monkeypatch):
    monkeypatch.setattr(bench_grouped_linear, "MIXES", {"few": (3, 3, 2)})
    ((label, found, results),) = gpu_races.rehearse("grouped_linear")
    assert label == "few"
    assert {launch.kernel for launch in found} == {
        "_weights_kernel",
        "_write_cells_kernel",
        "_grouped_conv2d_forward_kernel",
        "_grouped_conv2d_dgrad_kernel",
        "_grouped_conv2d_wgrad_kernel",
        "_grouped_conv2d_sum_partials_kernel",
    }
    assert [(result["case"], result["l2"]) for result in results] == [
        (f"few {what}", l2) for what in ("forward", "step") for l2 in ("cold", "warm")
    ]


def test_a_cache_is_found_by_triton_in_a_folder_of_another_name(made, tmp_path):
    folder, manifest = made
    assert sorted(path.name for path in folder.iterdir()) == ["kernels.zip", "manifest.json"]
    assert Manifest.read(folder) == manifest
    installed = gpu_cache.install(folder, tmp_path, 90)
    assert (installed.kernels, installed.detail) == (1, "made for exactly this Triton")
    assert gpu_cache.missing([small_launch()], tmp_path, 90) == []
    files = {path.suffix for path in tmp_path.rglob("*sum_partials*")}
    assert files == {".json", ".cubin"}


def test_a_kernel_that_is_not_in_the_cache_is_named(made):
    other = small_launch(torch.bfloat16)
    _, absent = gpu_cache.check([small_launch(), other], made[0], 90)
    assert absent == [str(other)]
    assert "_grouped_conv2d_sum_partials_kernel(float32, bfloat16, NoneType" in absent[0]


def test_rehearsal_says_which_case_lacks_a_kernel(made, monkeypatch, capsys):
    monkeypatch.setattr(gpu_cache, "CACHE", made[0])
    cases = {"whole": [small_launch()], "half": [small_launch(), small_launch(torch.bfloat16)]}
    assert gpu_cache.rehearse(cases, 90) == 1
    printed = capsys.readouterr().out
    assert "whole: 1 of 1 kernels in the cache" in printed
    assert "half: 1 of 2 kernels in the cache" in printed
    assert f"not in the cache: {small_launch(torch.bfloat16)}" in printed
    assert gpu_cache.rehearse({"whole": [small_launch()]}, 90) == 0


@pytest.mark.parametrize(
    ("change", "kernels", "detail"),
    [
        ({"triton": "3.5.0"}, 0, "triton 3.5.0, here"),
        ({"architecture": 80}, 0, "architecture 80, here 90"),
        ({"triton_key": "another"}, 1, "another build of Triton"),
        ({"backend": "another"}, 1, "another ptxas"),
        ({"sources": "others"}, 1, "made from other sources"),
        ({"suffix": ".cpython-39-x86_64-linux-gnu.so"}, 1, "launchers are compiled"),
    ],
    ids=str,
)
def test_a_cache_of_another_origin_serves_where_it_can(change, kernels, detail, made, tmp_path):
    """Whatever the build of Triton, its own key is taken; another release reads other files."""
    manifest = json.loads((made[0] / "manifest.json").read_text())
    folder, target = tmp_path / "cache", tmp_path / "target"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    (folder / "kernels.zip").write_bytes((made[0] / "kernels.zip").read_bytes())
    installed = gpu_cache.install(folder, target, 90)
    assert installed.kernels == kernels
    assert detail in installed.detail
    assert bool(gpu_cache.missing([small_launch()], target, 90)) == (not kernels)


def test_no_cache_costs_time_and_nothing_else(tmp_path):
    installed = gpu_cache.install(tmp_path / "none", tmp_path, 90)
    assert (installed.kernels, installed.launchers) == (0, 0)
    assert "kernels are compiled" in installed.detail


def test_what_triton_finds_and_compiles_is_counted(made, tmp_path, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.compilation, "listener", None)
    watch = gpu_cache.Watch()
    gpu_cache.install(made[0], tmp_path, 90)
    with gpu_cache.compiling_for(90, tmp_path):
        gpu_cache.compile_launch(small_launch())
        assert watch.as_dict() == {"kernels_found": 1, "kernels_compiled": {}}
        gpu_cache.compile_launch(small_launch(torch.float16))
    assert list(watch.as_dict()["kernels_compiled"]) == [small_launch().kernel]
    assert gpu_cache.counts([{"cache": "ops", **watch.as_dict()}])[0].startswith(
        "cache, ops: 1 found, 1 compiled in "
    )


def test_keys_are_asked_for_in_the_order_of_the_definitions(monkeypatch):
    """In Triton 3.6 the key of a function lacks the constants of those whose key nobody has asked for yet."""
    from triton import JITFunction

    asked, module = [], "msd_kernels.ops.group_norm.kernels"
    import_module(module)
    monkeypatch.setattr(JITFunction, "cache_key", property(lambda function: asked.append(function.__name__)))
    triton_launch.fix_cache_keys.cache_clear()
    triton_launch.fix_cache_keys(module)
    triton_launch.fix_cache_keys.cache_clear()
    order = ["find_problem", "_columns", "_group_norm_forward_kernel", "_group_norm_backward_kernel"]
    assert [name for name in dict.fromkeys(asked) if name in order] == order
