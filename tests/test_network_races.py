"""The GPU benchmarks of whole networks, on the CPU with small ones: what they compare, check and write down."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import SMALL_EDM, import_benchmarks

import_benchmarks()

import gpu_races  # noqa: E402
import sampling_steps  # noqa: E402
import training_steps  # noqa: E402
import whole_networks  # noqa: E402

import harness  # noqa: E402
from multistage_diffusion.noise.losses import edm_loss  # noqa: E402

TIMERS = dict.fromkeys(("cold", "warm", "as found"), harness.wall_clock)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Compiled by the front end alone."""
    monkeypatch.setattr(whole_networks, "CONFIG", SMALL_EDM)
    monkeypatch.setattr(gpu_races, "SECONDS_PER_RACE", 0.0)
    monkeypatch.setattr(gpu_races, "THIRDS", (2, 2, 2))
    for module in (sampling_steps, training_steps):
        options = {name: value for name, value in module.COMPILE.items() if name != "mode"}
        monkeypatch.setattr(module, "COMPILE", {**options, "backend": "eager"})
    whole_networks.published.cache_clear()
    yield
    whole_networks.published.cache_clear()


def measured(name: str) -> list[dict]:
    rates, *results = gpu_races.measure(name, "cpu", TIMERS, seconds=600.0)
    assert set(rates) == {"copy_bytes_per_second", "matmul_operations_per_second"}
    return results


def test_sampling_steps_of_every_stage_are_raced():
    results = measured("sampling_step")
    assert [result["case"] for result in results] == [
        f"{batch} of stage {stage} forward" for batch in (1, 8) for stage in (0, 1, 2)
    ]
    for result in results:
        assert set(result["ratio"]) == {"ours, eager", "eager"}
        assert result["l2"] == "as found"
        assert result["share_of_floor"] > 0
        assert "peak_bytes" not in result


@pytest.mark.full
def test_training_steps_of_mixed_batches_are_raced():
    results = measured("training_step")
    assert [(result["case"], set(result["ratio"])) for result in results] == [
        ("2+2+2 step", {"loop"}),
        ("92+3+1 step", {"loop"}),
        ("3+3+2 step", {"loop"}),
        ("3+3+2, graph step", {"loop", "ours, graph"}),
        ("2+2+2, graph step", {"loop", "ours, graph"}),
    ]
    for result in results:
        assert result["share_of_floor"] > 0


@pytest.mark.full
def test_compiled_networks_are_raced_last():
    sampling, training = measured("compiled_steps")
    assert sampling["case"] == "sampling, 8 of stage 0 forward"
    assert set(sampling["ratio"]) == {"ours, eager", "eager", "compiled"}
    assert training["case"] == "training, 2+2+2 step"
    assert set(training["ratio"]) == {"loop", "compiled loop"}


def test_the_floor_is_that_of_the_stages_with_samples():
    networks = whole_networks.published("cpu", torch.bfloat16)
    costs, parameters = networks.cost.macs, networks.cost.parameters
    assert networks.operations((2, 0, 1)) == 2 * (2 * costs[0] + costs[2])
    assert networks.weight_bytes((2, 0, 1)) == 2 * (
        networks.cost.shared_parameters + parameters[0] + parameters[2]
    )
    prepared = gpu_races.training_step_race((3, 3, 2), None, "cpu")
    networks = whole_networks.published("cpu", torch.float32)
    assert prepared.operations == networks.operations((3, 3, 2))
    assert prepared.least_bytes[True] == 2 * sum(p.nbytes for p in networks.ours.parameters())
    assert networks.ours.num_stages == len(networks.plain)


def test_the_share_of_the_floor_is_of_three_forwards(monkeypatch):
    """At one operation per second, and copies that cost nothing."""
    prepared = gpu_races.training_step_race((4, 0, 0), None, "cpu")
    timers = dict.fromkeys(TIMERS, lambda function: 2.0)
    race = gpu_races.Race("one", lambda device: prepared)
    (result,) = gpu_races.run(race, "cpu", timers, math.inf, 1.0)
    assert result["share_of_floor"] == pytest.approx(3 * prepared.operations / 2.0, rel=0.01)


def test_a_replayed_step_that_forgets_gradients_is_not_timed(monkeypatch):
    class Forgets(training_steps.GraphedFunction):
        def __call__(self, tensors, order):
            loss = super().__call__(tensors, order)
            self.adds_to[0].mul_(0.5)
            return loss

    monkeypatch.setattr(training_steps, "GraphedFunction", Forgets)
    problem = training_steps.Problem.of((2, 2, 2))
    with pytest.raises(AssertionError, match=r"ours, graph: .* is off by"):
        problem.checked_cases(gpu_races.GRAPH)


def test_peak_memory_is_that_of_ours_and_of_the_loop(monkeypatch):
    """The captured graph has its memory for itself."""
    prepared = gpu_races.training_step_race((2, 2, 2), gpu_races.GRAPH, "cpu")
    assert prepared.weighed == ["ours", "loop"]
    weighed = []

    def peak_bytes(function):
        weighed.append(function)
        return 100 * len(weighed)

    monkeypatch.setattr(harness, "peak_bytes", peak_bytes)
    race = gpu_races.Race("one", lambda device: prepared)
    (result,) = gpu_races.run(race, "cuda", TIMERS, 1.0, 1.0)
    assert result["peak_bytes"] == {"ours": 100, "loop": 200}
    assert weighed == [prepared.cases(True)["ours"], prepared.cases(True)["loop"]]


def test_peak_memory_is_counted_beyond_what_is_there(monkeypatch):
    counter = {"now": 70, "most": 0}

    def use():
        counter["most"] = max(counter["most"], counter["now"] + 30)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: counter["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: counter.update(most=counter["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: counter["most"])
    assert harness.peak_bytes(use) == 30


def failures(name: str) -> list[str]:
    return [result["error"] for result in measured(name) if "failed" in result]


def test_a_network_with_wrong_results_is_not_timed():
    """Of one stage: the others are timed."""
    network = whole_networks.published("cpu", torch.bfloat16).ours
    with torch.no_grad():
        network.state_dict()["dec.8x8.head.conv.weight.1"].mul_(1.5)
    errors = failures("sampling_step")
    assert len(errors) == 2
    assert all("a wrong kernel has no speed" in error for error in errors)


def test_a_network_with_a_wrong_gradient_is_not_timed():
    """Whose results are right."""
    network = whole_networks.published("cpu", torch.float32).ours
    network.dec["4x4"].entry[0].norm0.weight[0].register_hook(lambda gradient: 1.5 * gradient)
    errors = failures("training_step")
    assert len(errors) == 5
    assert all("ours: dec.4x4.entry.0.norm0.weight.0 is off" in error for error in errors)


def test_what_is_missing_or_too_much_is_not_timed():
    exact = {"a": torch.ones(2), "b": torch.ones(2)}
    whole_networks.check("ours", exact, exact)
    whole_networks.check("ours", {**exact, "of an absent stage": torch.zeros(2)}, exact)
    with pytest.raises(AssertionError, match="ours: 1 results are missing, first b"):
        whole_networks.check("ours", {"a": exact["a"]}, exact)
    with pytest.raises(AssertionError, match="ours: of an absent stage is off"):
        whole_networks.check("ours", {**exact, "of an absent stage": torch.full((2,), 1e-6)}, exact)
    with pytest.raises(AssertionError, match="ours: b is off by nan"):
        whole_networks.check("ours", {**exact, "b": torch.full((2,), torch.nan)}, exact)


def test_a_compiled_loop_with_another_loss_is_not_timed(monkeypatch):
    def miscompile(function, **options):
        return lambda *arguments: 1.5 * function(*arguments)

    monkeypatch.setattr(training_steps.torch, "compile", miscompile)
    problem = training_steps.Problem.of((2, 2, 2))
    with pytest.raises(AssertionError, match="compiled loop: the loss is"):
        problem.checked_cases(gpu_races.COMPILED)

    cases = problem.checked_cases(gpu_races.COMPILED, at_once=False)
    cases[harness.OURS]()
    with pytest.raises(AssertionError, match="compiled loop: the loss is"):
        harness.compare(cases, seconds=0.0)


def test_the_loss_is_that_of_training():
    problem = training_steps.Problem.of((3, 3, 2))
    network = problem.networks.ours.eval()
    sigma = torch.tensor(whole_networks.SIGMAS, dtype=torch.float64)[problem.stage]
    clean, noise = problem.samples.clean, problem.samples.noise
    losses = edm_loss(whole_networks.denoiser(network), clean, sigma, problem.stage, noise=noise)
    (step,) = problem.mixed()
    loss = training_steps.mean_loss(step.denoiser, step.samples, step.order)
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-4, atol=0)


def test_the_batch_is_shuffled_and_every_sample_is_in_one_step_of_the_loop():
    problem = training_steps.Problem.of((3, 0, 2))
    assert problem.stage.tolist() != sorted(problem.stage.tolist())
    loop, (mixed,) = problem.loop(), problem.mixed()
    assert mixed.order.counts == (3, 0, 2)
    assert [step.order.counts for step in loop] == [(3, 0, 0), (0, 0, 2)]
    assert torch.cat([step.samples.noise for step in loop]).shape == problem.samples.noise.shape
    for step, stage in zip(loop, (0, 2), strict=True):
        assert torch.equal(step.samples.noise, problem.samples.noise[problem.stage == stage])
        assert step.network is problem.networks.plain[stage]
        assert step.samples.scalars[4].unique().item() == whole_networks.SIGMAS[stage]
