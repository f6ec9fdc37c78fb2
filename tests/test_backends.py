from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from msd_kernels import (
    BackendError,
    FallbackWarning,
    StageBatch,
    explain,
    group_norm,
    grouped_linear,
    layouts,
)
from msd_kernels.dispatch.backends import NAMES, VARIABLE, Candidate, OpBackends, forced_backend, use
from msd_kernels.ops import group_norm as group_norm_op
from msd_kernels.runtime import launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FAST, SLOW, PLAIN = (SimpleNamespace(name=name) for name in ("fast", "slow", "plain"))


@layouts.layout
class Size(NamedTuple):
    """The layout of the op that is tested here."""

    size: int


def on(device: torch.device):
    """Stands for a tensor there."""
    return SimpleNamespace(device=device, dtype=torch.float32)


def cannot_large(call) -> str | None:
    size = call.layout.size
    return f"takes at most 10, got {size}" if size > 10 else None


def slower_when_small(call) -> str | None:
    return "library is faster below 3" if call.layout.size < 3 else None


@pytest.fixture
def backends(monkeypatch):
    """An op whose cpu kernel takes sizes up to 10 and is slow below 3."""
    monkeypatch.delenv(VARIABLE, raising=False)
    return OpBackends(
        "toy",
        [
            Candidate("cuda", SLOW, ("cuda",)),
            Candidate("cpu", FAST, ("cpu",), cannot=cannot_large, slower=slower_when_small),
            Candidate("library", PLAIN),
        ],
    )


def test_backends_auto_takes_the_first_that_can(backends):
    assert backends.choose(on(CPU), Size(5)) is FAST
    assert backends.choose(on(CUDA), Size(5)) is SLOW


def test_backends_every_gpu_has_a_choice_of_its_own(monkeypatch):
    """GPUs of one process may be of different generations, and predicates ask the current one."""
    current = []

    @contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    old = Candidate("cuda", FAST, ("cuda",), cannot=lambda call: "is too old" if current == [1] else None)
    backends = OpBackends("toy", [old, Candidate("library", PLAIN)])
    assert backends.choose(on(torch.device("cuda", 0)), Size(0)) is FAST
    with pytest.warns(FallbackWarning, match="is too old"):
        assert backends.choose(on(torch.device("cuda", 1)), Size(0)) is PLAIN
    assert backends.choose(on(torch.device("cuda", 0)), Size(0)) is FAST
    assert backends.explain(on(torch.device("cuda", 1)), Size(0)).why_not["cuda"] == "is too old"
    assert not current


def test_backends_auto_prefers_the_faster_in_silence(backends):
    """What is slower is a choice and not a fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(on(CPU), Size(2)) is PLAIN


def test_backends_fallback_warns_once_per_reason(backends):
    with pytest.warns(
        FallbackWarning, match="toy: served by 'library' because 'cpu' cannot: takes at most 10, got 11"
    ):
        assert backends.choose(on(CPU), Size(11)) is PLAIN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(on(CPU), Size(11)) is PLAIN
    with pytest.warns(FallbackWarning, match="got 12"):
        backends.choose(on(CPU), Size(12))


def test_backends_of_another_device_are_no_fallback(backends):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose(on(CPU), Size(5))
        backends.choose(on(CUDA), Size(50))


def test_backends_without_a_candidate_say_why():
    only = OpBackends("toy", [Candidate("cpu", FAST, ("cpu",), cannot=cannot_large)])
    with pytest.raises(BackendError, match=r"toy: no backend serves this call: .*takes at most 10, got 11"):
        only.choose(on(CPU), Size(11))


def test_backends_forced_by_use_wins_over_speed_and_environment(backends, monkeypatch):
    monkeypatch.setenv(VARIABLE, "library")
    assert backends.choose(on(CPU), Size(5)) is PLAIN
    with use("cpu"):
        assert backends.choose(on(CPU), Size(2)) is FAST
        with use("auto"):
            assert backends.choose(on(CPU), Size(2)) is PLAIN
    assert backends.choose(on(CPU), Size(5)) is PLAIN


def test_backends_forced_but_unable_raises(backends):
    with (
        use("cpu"),
        pytest.raises(BackendError, match="'cpu' is forced but cannot serve this call: takes at most 10"),
    ):
        backends.choose(on(CPU), Size(11))
    with use("cuda"), pytest.raises(BackendError, match="serves cuda tensors, got a cpu tensor"):
        backends.choose(on(CPU), Size(1))
    with (
        use("triton"),
        pytest.raises(BackendError, match="has no implementation of this op; there are cuda, cpu, library"),
    ):
        backends.choose(on(CPU), Size(1))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("auto", {"attention": None, "group_norm": None}),
        ("", {"attention": None, "group_norm": None}),
        ("library", {"attention": "library", "group_norm": "library"}),
        ("attention=cpu", {"attention": "cpu", "group_norm": None}),
        ("attention=cpu,library", {"attention": "cpu", "group_norm": "library"}),
        ("library,attention=cpu", {"attention": "cpu", "group_norm": "library"}),
        (" attention=cpu , group_norm=reference ", {"attention": "cpu", "group_norm": "reference"}),
        ("library,attention=auto", {"attention": None, "group_norm": "library"}),
    ],
)
def test_backends_setting_syntax(setting, expected, monkeypatch):
    monkeypatch.setenv(VARIABLE, setting)
    assert {op: forced_backend(op) for op in expected} == expected
    monkeypatch.delenv(VARIABLE)
    with use(setting):
        assert {op: forced_backend(op) for op in expected} == expected


@pytest.mark.parametrize("setting", ["gpu", "group_norm=fast", "library,cud"])
def test_backends_unknown_name_is_an_error(setting, monkeypatch):
    with (
        pytest.raises(
            ValueError, match=r"unknown backend .* allowed are auto, reference, cpu, triton, cuda, library"
        ),
        use(setting),
    ):
        pytest.fail("the block must not run")
    assert forced_backend("group_norm") is None, "a refused setting leaves nothing behind"
    monkeypatch.setenv(VARIABLE, setting)
    with pytest.raises(ValueError, match="MSD_KERNELS_BACKEND: unknown backend"):
        group_norm(torch.zeros(1, 4, 2, 2), 2)


def test_backends_unknown_op_is_an_error():
    with (
        pytest.raises(ValueError, match=r"unknown op 'groupnorm' .* allowed are attention, group_norm"),
        use("groupnorm=cpu"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("setting", "target"),
    [
        ("cpu,library", "all ops"),
        ("library,library", "all ops"),
        ("attention=cpu,attention=auto", "attention"),
    ],
)
def test_backends_two_for_the_same_ops_are_an_error(setting, target):
    with pytest.raises(ValueError, match=f"{setting}' names two backends for {target}"), use(setting):
        pytest.fail("the block must not run")


def in_a_thread(function):
    """What ``function`` returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


def test_backends_use_is_the_choice_of_its_thread(monkeypatch):
    monkeypatch.setenv(VARIABLE, "group_norm=library")
    with use("reference"):
        assert in_a_thread(lambda: forced_backend("group_norm")) == "library"
        assert forced_backend("group_norm") == "reference"
    assert forced_backend("group_norm") == "library"


def test_backends_use_is_the_choice_of_its_task():
    async def task(name, entered, leave):
        with use(name):
            entered.set()
            await leave.wait()
            return forced_backend("group_norm")

    async def both():
        first, second, leave = (asyncio.Event() for _ in range(3))
        tasks = asyncio.gather(task("reference", first, leave), task("library", second, leave))
        await first.wait()
        await second.wait()
        assert forced_backend("group_norm") is None
        leave.set()
        return await tasks

    assert asyncio.run(both()) == ["reference", "library"]


def test_backends_forward_mode_is_no_choice_of_other_threads(monkeypatch):
    """The reference serves it; while it computes, another thread asks."""
    seen = []
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(group_norm_op._forward, "_warned", True)
    kernel = group_norm_op.reference.group_norm

    def asked_meanwhile(*args):
        seen.append((forced_backend("group_norm"), in_a_thread(lambda: forced_backend("group_norm"))))
        return kernel(*args)

    monkeypatch.setattr(group_norm_op.reference, "group_norm", asked_meanwhile)
    x = torch.randn(1, 4, 2, 2)
    torch.func.jvp(lambda t: group_norm(t, 2), (x,), (x,))
    assert seen == [("reference", None)]


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a thread"])
def test_backends_a_backward_keeps_the_choice_of_its_forward(inside, monkeypatch):
    seen = []
    monkeypatch.delenv(VARIABLE, raising=False)
    kernel = group_norm_op.BACKENDS.choose
    monkeypatch.setattr(
        group_norm_op.BACKENDS,
        "choose",
        lambda *args: (seen.append(forced_backend("group_norm")), kernel(*args))[1],
    )
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    with use("reference"):
        chosen = group_norm(x, 2)
    free = group_norm(x, 2)
    run = in_a_thread if inside else lambda function: function()
    with use("library"):
        run(lambda: torch.autograd.grad(chosen.sum(), x))
        run(lambda: torch.autograd.grad(free.sum(), x))
    assert seen == ["reference", None, "reference", None if inside else "library"]


def test_backends_use_restores_after_an_error():
    with pytest.raises(KeyError), use("reference"):
        raise KeyError
    assert forced_backend("group_norm") is None


def test_explain_names_every_backend(backends):
    automatic = backends.explain(on(CPU), Size(11))
    assert automatic.backend == "library"
    assert automatic.why_not["cpu"] == "takes at most 10, got 11"
    assert automatic.why_not["cuda"] == "serves cuda tensors, got a cpu tensor"
    assert automatic.why_not["triton"] == "has no implementation of toy"
    assert {automatic.backend, *automatic.why_not} == set(NAMES)
    assert backends.explain(on(CPU), Size(2)).why_not["cpu"] == "library is faster below 3"
    assert backends.explain(on(CPU), Size(5)).why_not["library"] == "cpu comes first"


def test_explain_agrees_with_the_choice(backends):
    modules = {"cpu": FAST, "cuda": SLOW, "library": PLAIN}
    for device in (CPU, CUDA):
        for size in (1, 5):
            call = Size(size)
            assert modules[backends.explain(on(device), call).backend] is backends.choose(on(device), call)


def test_explain_of_a_forced_backend(backends):
    with use("library"):
        forced = backends.explain(on(CPU), Size(5))
    assert (forced.backend, forced.why) == ("library", "forced")
    assert forced.why_not["cpu"] == "MSD_KERNELS_BACKEND or use() forces library"
    with use("cpu"):
        impossible = backends.explain(on(CPU), Size(11))
    assert impossible.backend is None
    assert impossible.why == "cpu is forced and cannot serve it"
    assert impossible.why_not["cpu"] == "takes at most 10, got 11"


def test_explain_reads_well(backends):
    assert str(backends.explain(on(CPU), Size(11))).splitlines() == [
        "toy: library (the first of its order that serves this call)",
        "  not cuda: serves cuda tensors, got a cpu tensor",
        "  not cpu: takes at most 10, got 11",
        "  not reference: has no implementation of toy",
        "  not triton: has no implementation of toy",
    ]


def test_explain_checks_the_call_and_computes_nothing():
    x = torch.empty(2, 8, 4, 4, device="meta")
    assert "cpu" in explain("group_norm", x, 4).why_not
    with pytest.raises(ValueError, match="group_norm: num_groups=3 does not divide"):
        explain("group_norm", x, 3)
    with pytest.raises(ValueError, match="explain: unknown op 'softmax'; there are attention, group_norm"):
        explain("softmax", x)


def test_explain_serves_every_grouped_op():
    batch = StageBatch(torch.zeros(8), (1, 1), (4, 4), 1, 1)
    weight = [torch.zeros(3, 4)] * 2
    assert explain("grouped_linear", batch, weight).backend == "library"
    assert explain("grouped_conv2d", batch, [w[..., None, None] for w in weight]).backend == "library"
    with use("reference"):
        assert explain("grouped_linear", batch, weight).backend == "reference"


def test_forced_backends_compute_the_same(generator):
    x, weight = torch.randn(3, 4, generator=generator), torch.randn(2, 4, generator=generator)
    results = []
    for name in ("library", "reference"):
        with use(f"grouped_linear={name}"):
            results.append(grouped_linear(x, [weight]).values)
    torch.testing.assert_close(*results)


def test_triton_needs_a_compiler_on_cuda(monkeypatch):
    monkeypatch.setattr(launch, "unavailable", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(launch, "which", lambda name: None)
    monkeypatch.setattr(launch, "_has_compiler", launch._has_compiler.__wrapped__)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc or clang, or set CC" in launch.cannot_run("cuda", torch.float32)
    assert launch.cannot_run("cpu", torch.float32) is None
    monkeypatch.setenv("CC", "cc")
    assert launch.cannot_run("cuda", torch.float32) is None
