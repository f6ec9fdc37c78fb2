"""What a graphed network copies, keeps and hands on; tests/gpu has the real graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from multistage_diffusion import cuda_graphs
from multistage_diffusion.cuda_graphs import GraphedNetwork
from multistage_diffusion.networks import build
from multistage_diffusion.preconditioning import EDMPreconditioner
from multistage_diffusion.samplers import SamplerConfig, generate
from multistage_diffusion.stage_order import StageOrder
from multistage_diffusion.stages import Stages
from stand_ins import TinyNetwork, one_thread  # noqa: F401

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

    def capture(run, device, pool):
        output = run()
        captured.append(pool)
        return lambda: output.copy_(run()), output, pool or "pool"

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    monkeypatch.setattr(cuda_graphs, "_serves", lambda x: True)
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


def test_bad_arguments():
    with pytest.raises(TypeError, match="needs a StageNetwork, got TinyNetwork"):
        GraphedNetwork(TinyNetwork())
    with pytest.raises(ValueError, match="max_graphs=0 must be at least 1"):
        GraphedNetwork(network(), max_graphs=0)
    with pytest.raises(AttributeError, match="colour"):
        _ = GraphedNetwork(network()).colour
