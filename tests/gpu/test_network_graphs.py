"""Whole training and sampling steps of a mixed batch in CUDA graphs: new data and new orders, no waiting."""

from __future__ import annotations

import pytest
import torch

import msd_kernels
from helpers import waiting_is_an_error, warm_up
from multistage_diffusion.networks import build
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.preconditioning import EDMPreconditioner
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.sampling.cuda_graphs import GraphedNetwork

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_cuda")]

UNET = {
    "family": "edm",
    "image_size": 16,
    "encoder_widths": (32,),
    "decoder_widths": (48, 32, 16),
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (8,),
    "dropout": 0.0,
}
ORDERS = ([0, 2, 1, 0, 0, 1], [2, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 2])
PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(UNET)
    with torch.no_grad():  # no weight at zero, as some are at the beginning
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.cuda()


def batch(seed: int) -> list[torch.Tensor]:
    """x, noise and the target of a training step."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, target = (torch.randn(6, 3, 16, 16, generator=generator, device="cuda") for _ in range(2))
    return [x, torch.rand(6, generator=generator, device="cuda"), target]


def training_step(model, optimizer, data, order, precision) -> torch.Tensor:
    """One step with an optimizer that reads no state on the host."""
    x, noise, target = data
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        loss = (model(x, noise, order) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trained(precision, graphed: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The losses of steps on ``ORDERS``, and the weights after them."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    data = batch(0)
    order = StageOrder.of(ORDERS[0], 3, 6, "cuda", explicit=True)

    def step() -> torch.Tensor:
        return training_step(model, optimizer, data, order, precision)

    warm_up(step)
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    losses = []
    for seed, stages in enumerate(ORDERS, start=1):
        for tensor, values in zip(data, batch(seed), strict=True):
            tensor.copy_(values)
        order.copy_(StageOrder.of(stages, 3, 6, "cuda", explicit=True))
        if graphed:
            graph.replay()
            losses.append(captured.clone())
        else:
            losses.append(step())
    return losses, [parameter.detach() for parameter in model.parameters()]


@PRECISIONS
def test_a_captured_training_step_trains_on_new_data_and_orders(precision):
    graphed, eager = trained(precision, True), trained(precision, False)
    for actual, expected in zip((*graphed[0], *graphed[1]), (*eager[0], *eager[1]), strict=True):
        assert torch.equal(actual, expected)
    assert len({float(loss) for loss in graphed[0]}) == len(ORDERS)


@PRECISIONS
@torch.no_grad()
def test_a_graphed_network_equals_the_network(precision):
    model = network().eval()
    graphed = GraphedNetwork(model)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        for seed, stages in enumerate((*ORDERS, [0] * 6, [2] * 6, *ORDERS)):
            x, noise, _ = batch(seed)
            assert torch.equal(graphed(x, noise, stages), model(x, noise, stages))
    assert len(graphed._graphs) == 3


@torch.no_grad()
def test_a_graph_captured_where_weights_are_frozen_reads_them_later():
    """Nothing of the scope goes into the graph, which outlives it."""
    model = network().eval()
    graphed = GraphedNetwork(model)
    x, noise, _ = batch(0)
    with msd_kernels.frozen_weights():
        assert torch.equal(graphed(x, noise, ORDERS[0]), model(x, noise, ORDERS[0]))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert torch.equal(graphed(x, noise, ORDERS[0]), model(x, noise, ORDERS[0]))


@torch.no_grad()
def test_a_graph_reads_new_weights_and_outlives_others():
    model = network().eval()
    graphed = GraphedNetwork(model, max_graphs=2)
    x, noise, _ = batch(0)
    for stages in (ORDERS[0], [0] * 6, [1] * 6, ORDERS[0], [2] * 6, ORDERS[1]):
        assert torch.equal(graphed(x, noise, stages), model(x, noise, stages))
        for parameter in model.parameters():
            parameter.mul_(1.01)
    with torch.inference_mode():
        assert torch.equal(graphed(x, noise, ORDERS[2]), model(x, noise, ORDERS[2]))


@pytest.mark.parametrize(
    "config",
    [
        {**UNET, "label_dim": 3},
        {**UNET, "family": "ncsnpp"},
        {**UNET, "family": "ldm", "encoder_widths": (32,), "decoder_widths": (64, 32, 32)},
        {
            "family": "uvit",
            "image_size": 16,
            "encoder_widths": (32,),
            "decoder_widths": (48, 32, 16),
            "depth": 3,
            "num_heads": 2,
        },
    ],
    ids=lambda config: config["family"],
)
@torch.no_grad()
def test_every_family_is_captured(config):
    torch.manual_seed(0)
    model = build(config).cuda().eval()
    graphed = GraphedNetwork(model)
    labels = {"class_labels": torch.eye(3, device="cuda").repeat(2, 1)} if config.get("label_dim") else {}
    for seed, stages in enumerate(ORDERS):
        x, noise, _ = batch(seed)
        assert torch.equal(graphed(x, noise, stages, **labels), model(x, noise, stages, **labels))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.no_grad()
def test_the_graph_is_on_the_device_of_its_inputs():
    model = network().eval().to("cuda:1")
    graphed = GraphedNetwork(model)
    for seed, stages in enumerate(ORDERS):
        x, noise, _ = (tensor.to("cuda:1") for tensor in batch(seed))
        assert torch.equal(graphed(x, noise, stages), model(x, noise, stages))


@torch.no_grad()
def test_a_graphed_sampling_step_does_not_wait_for_the_device():
    denoiser = EDMPreconditioner(GraphedNetwork(network().eval()), Stages.edm())
    x = batch(0)[0]
    for sigma in (50.0, 5.0, 0.5):  # a capture of each stage
        denoiser(x, sigma)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        for sigma in (40.0, 4.0, 0.4):
            denoiser(x, sigma)
