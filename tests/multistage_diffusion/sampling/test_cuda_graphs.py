"""What a graphed network copies, keeps and hands on; tests/gpu has the real graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from multistage_diffusion.networks import build
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.sampling import cuda_graphs
from multistage_diffusion.sampling.cuda_graphs import GraphedFunction, GraphedNetwork
from multistage_diffusion.sampling.samplers import SamplerConfig, generate
from multistage_diffusion.training.trainer import Trainer
from stand_ins import (
    SMALL_UNET,
    TinyNetwork,
    assert_same_run,
    config_of,
    no_plots,  # noqa: F401
    one_thread,  # noqa: F401
    tiny_images,
)

UNET = {
    "family": "edm",
    "image_size": 8,
    "encoder_widths": (8,),
    "decoder_widths": (12, 8, 4),
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
    "label_dim": 2,
}
ORDERS = [[0, 2, 1, 0], [2, 0, 0, 1], [0, 0, 1, 2]]


@pytest.fixture
def captures(monkeypatch):
    """On the CPU: a "graph" runs again on the tensors that it was captured with, into the output that it had."""
    captured = []

    def capture(run, place, adds_to):
        before = [tensor.clone() for tensor in adds_to]
        with torch.random.fork_rng([]):
            output = run()
        for tensor, value in zip(adds_to, before, strict=True):
            tensor.copy_(value)
        captured.append(place.pool)
        place.pool = "pool"
        return lambda: output.copy_(run()), output

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    monkeypatch.setattr(cuda_graphs, "serves", lambda x: True)
    return captured


def network(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build({**UNET, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(seed: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randn(batch, 2, generator=generator)


@torch.no_grad()
def test_one_graph_serves_every_order_of_the_same_counts(captures):
    model = network()
    graphed = GraphedNetwork(model)
    results = []
    for seed, stages in enumerate(ORDERS):
        x, noise, labels = inputs(seed)
        results.append((graphed(x, noise, stages, class_labels=labels), (x, noise, stages, labels)))
    assert len(captures) == 1
    for actual, (x, noise, stages, labels) in results:  # at the end: no call has touched an earlier result
        assert torch.equal(actual, model(x, noise, stages, class_labels=labels))


@torch.no_grad()
def test_other_counts_shapes_and_arguments_are_captured_anew(captures):
    model = network()
    graphed = GraphedNetwork(model)
    x, noise, labels = inputs(0)
    calls = [
        ((x, noise, [0, 1, 2, 0]), {"class_labels": labels}),
        ((x, noise, [0, 1, 2, 1]), {"class_labels": labels}),
        ((x, noise, [0, 1, 2, 0]), {}),
        ((x[:2], noise[:2], [2, 1]), {}),
    ]
    for arguments, labels in calls * 2:
        assert torch.equal(graphed(*arguments, **labels), model(*arguments, **labels))
    assert captures == [None, "pool", "pool", "pool"]
    with torch.autocast("cpu", torch.bfloat16):
        arguments, labels = calls[0]
        assert torch.equal(graphed(*arguments, **labels), model(*arguments, **labels))
    assert len(captures) == 5


@torch.no_grad()
def test_the_graph_not_used_for_longest_goes_first(captures):
    graphed = GraphedNetwork(network(), max_graphs=2)
    x, noise, _ = inputs(0)
    for stages in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]):
        graphed(x, noise, stages)
    assert len(captures) == 3
    graphed(x, noise, [1, 1, 1, 1])
    assert len(captures) == 4


@torch.no_grad()
def test_an_order_takes_the_place_of_the_stages(captures):
    model = network()
    graphed = GraphedNetwork(model)
    x, noise, _ = inputs(1)
    for stages in ORDERS:
        assert torch.equal(graphed(x, noise, StageOrder.of(stages, 3, 4)), model(x, noise, stages))
    assert len(captures) == 1


def test_inference_mode_and_no_grad_share_a_graph(captures):
    model = network()
    graphed = GraphedNetwork(model)
    x, noise, _ = inputs(0)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(graphed(x, noise, ORDERS[0]), model(x, noise, ORDERS[0]))
    assert len(captures) == 1


@torch.no_grad()
def test_graphs_are_dropped_where_they_would_read_other_weights(captures):
    graphed = GraphedNetwork(network())
    x, noise, _ = inputs(0)
    graphed(x, noise, ORDERS[0])
    graphed.float()
    graphed(x, noise, ORDERS[0])
    assert captures == [None, None]
    twin = copy.deepcopy(graphed)
    twin(x, noise, ORDERS[0])
    assert captures == [None, None, None]
    graphed.train()
    graphed(x, noise, ORDERS[0])  # in training the network itself is called
    assert len(captures) == 3


def test_gradients_and_the_cpu_go_to_the_network_itself(captures, monkeypatch):
    graphed = GraphedNetwork(network())
    x, noise, _ = inputs(0)
    graphed(x.requires_grad_(), noise, ORDERS[0]).sum().backward()
    assert x.grad is not None
    monkeypatch.undo()
    with torch.no_grad():
        graphed(x, noise, ORDERS[0])
    assert not captures


def test_a_denoiser_samples_through_it(captures):
    model, stages = network(label_dim=0), Stages.edm()
    config = SamplerConfig(5)
    plain = generate(EDMPreconditioner(model, stages), range(3), (3, 8, 8), config, dtype=torch.float32)
    graphed = EDMPreconditioner(GraphedNetwork(model), stages)
    images = generate(graphed, range(3), (3, 8, 8), config, dtype=torch.float32).images
    assert torch.equal(images, plain.images)
    assert len(captures) == sum(n > 0 for n in plain.evaluations_per_stage)


def affine(tensors, order):
    return tensors["x"] * 2 + sum(order.counts)


def test_a_function_goes_without_a_graph_when_all_are_taken(captures):
    graphed = GraphedFunction(affine, max_graphs=2, replace=False)
    x = torch.arange(3.0)
    for counts in ((3, 0), (2, 1), (1, 2), (3, 0), (0, 3), (2, 1)):
        assert torch.equal(graphed({"x": x}, StageOrder(counts, None, None)), 2 * x + 3)
        x = x + 1
    assert len(graphed) == len(captures) == 2


def test_an_order_is_explicit_or_not_in_graphs_of_their_own(captures):
    def ordered(tensors, order):
        return order.sort(tensors["x"])

    graphed = GraphedFunction(ordered)
    x = torch.arange(4.0)
    for stages, expected in (
        ([1, 0, 0, 1], [1, 2, 0, 3]),
        ([0, 0, 1, 1], [0, 1, 2, 3]),
        ([1, 1, 0, 0], [2, 3, 0, 1]),
    ):
        order = StageOrder.of(stages, 2, 4)
        assert graphed({"x": x}, order).tolist() == expected
    assert len(graphed) == 2


def test_results_hold_no_graph_of_autograd(captures):
    """It would keep all activations alive."""
    weight = torch.ones(3, requires_grad=True)
    enabled = []

    def function(tensors, order):
        enabled.append(torch.is_grad_enabled())
        return weight * tensors["x"]

    graphed = GraphedFunction(function, max_graphs=2, replace=False)
    order = StageOrder((3,), None, None)
    for size in (3, 1):  # the second one goes without a graph where gradients are enabled
        for mode in (torch.no_grad, torch.enable_grad, torch.no_grad):
            with mode():
                assert not graphed({"x": torch.ones(size)}, order).requires_grad
                assert enabled[-1] == (mode is torch.enable_grad)
    assert len(graphed) == len(captures) == 2


@pytest.mark.parametrize("sampling", ["mixed", pytest.param("systematic", marks=pytest.mark.full)])
def test_training_from_graphs_gives_the_bits_of_training_without(captures, tmp_path, sampling):
    changes = {
        "network": {**SMALL_UNET, "dropout": 0.2},
        "batch_size": 16,
        "accumulate": 2,
        "stage_sampling": sampling,
        "gradient_clip": 1.0,
        "precision": "bf16",
    }
    for graphs in (False, True):
        config = config_of(**changes)
        directory = tmp_path / str(graphs)
        trainer = Trainer(config, directory, data=tiny_images(), cuda_graphs=graphs, quiet=True)
        trainer.run()
    assert_same_run(tmp_path / "False", tmp_path / "True", 12)
    mixes = trainer.batches.noise_levels.mixes(8) if sampling == "systematic" else range(24)
    assert 1 < len(captures) <= len(mixes)


def test_training_from_graphs_needs_a_stage_network(tmp_path):
    with pytest.raises(ValueError, match="CUDA graphs need a StageNetwork, got TinyNetwork"):
        Trainer(config_of(), tmp_path, data=tiny_images(), network=TinyNetwork(), cuda_graphs=True)


def test_bad_arguments():
    with pytest.raises(TypeError, match="needs a StageNetwork, got TinyNetwork"):
        GraphedNetwork(TinyNetwork())
    with pytest.raises(ValueError, match="max_graphs=0 must be at least 1"):
        GraphedNetwork(network(), max_graphs=0)
    with pytest.raises(AttributeError, match="colour"):
        _ = GraphedNetwork(network()).colour
