"""How often layers of stages are compiled for new mixes of counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from msd_kernels import StageBatch
from multistage_diffusion.networks.layers import StageConv2d, StageGroupNorm, StageLinear

WIDTHS = (12, 8, 4)
MIXES = [
    (3, 2, 4), (2, 5, 2), (5, 2, 2), (2, 2, 5), (3, 3, 3), (4, 3, 2),
    (1, 4, 4), (7, 1, 1), (1, 1, 7), (2, 6, 1), (6, 1, 2), (3, 5, 1),
]  # fmt: skip
ABSENT = [(9, 0, 0), (8, 1, 0), (0, 5, 4), (4, 0, 5)]


class Decoder(nn.Module):
    """Up-sampling, a skip, a projection, a norm and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.up = StageConv2d((8,) * 3, WIDTHS, 3, resample="up")
        self.merge = StageConv2d([c + 8 for c in WIDTHS], WIDTHS, 3)
        self.mix = StageLinear(WIDTHS, WIDTHS)
        self.norm = StageGroupNorm(WIDTHS, (4,) * 3)
        self.out = StageConv2d(WIDTHS, (3,) * 3, 3)

    def forward(self, features: Tensor, skip: Tensor, counts: tuple[int, ...]) -> Tensor:
        x = self.merge(self.up(StageBatch.from_dense(features, counts)), skip=skip)
        return self.out(self.norm(self.mix(x), activation="silu")).dense()


@pytest.fixture
def decoder() -> Decoder:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield Decoder()
    torch._dynamo.reset()


def inputs(generator) -> tuple[Tensor, Tensor]:
    return torch.randn(9, 8, 4, 4, generator=generator), torch.randn(9, 8, 8, 8, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "most"),
    [(None, 4), pytest.param(True, 2, marks=pytest.mark.full)],
    ids=["default", "dynamic"],
)
def test_new_mixes_of_counts_do_not_compile_anew(dynamic, most, decoder, generator):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decoder, backend=counter, fullgraph=True, dynamic=dynamic)
    for counts in MIXES:
        found = []
        for network in (compiled, decoder):
            decoder.zero_grad()
            y = network(*inputs(generator.manual_seed(0)), counts)
            y.square().mean().backward()
            found.append([y.detach(), *(p.grad.clone() for p in decoder.parameters())])
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= most


@pytest.mark.full
@pytest.mark.slow
def test_without_gradients_absent_stages_do_not_compile_anew(decoder, generator):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(decoder, backend=counter, fullgraph=True)
    with torch.no_grad():
        for counts in [*MIXES[:4], *ABSENT]:
            y = compiled(*inputs(generator.manual_seed(0)), counts)
            expected = decoder(*inputs(generator.manual_seed(0)), counts)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 4


@pytest.mark.full
@pytest.mark.slow
def test_compiled_training_leaves_absent_stages_without_gradients(decoder, generator):
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    compiled(*inputs(generator), (4, 0, 5)).square().mean().backward()
    for layer in (decoder.up, decoder.mix, decoder.norm):
        assert [weight.grad is None for weight in layer.weight] == [False, True, False]
