"""Exported and compiled ahead of time: run by processes that know the kernels alone, not the networks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.export import export, load, save

import forks
from ecosystem_networks import STAGE, Network, UNet, assert_arrived, copies, filled, images

pytestmark = pytest.mark.ecosystem  # for what they take

SERVE = """
import sys, torch, msd_kernels
assert "multistage_diffusion" not in sys.modules
torch.set_num_threads(1)
kind, program, given, expected = sys.argv[1:]
run = torch.export.load(program).module() if kind == "export" else torch._inductor.aoti_load_package(program)
y = run(torch.load(given))
assert not any(name.startswith("multistage_diffusion") for name in sys.modules)
torch.testing.assert_close(y, torch.load(expected), rtol=1e-4, atol=1e-5)
print("served", list(y.shape))
"""


class Served(torch.nn.Module):
    """Of a batch whose stages are known."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x, STAGE)


@pytest.fixture(params=[Network, UNet], ids=["readme", "edm"])
def served(request) -> torch.nn.Module:
    return Served(filled(request.param())).eval()


def serve(kind: str, program: Path, network: torch.nn.Module, folder: Path) -> str:
    """What a process that imports the kernels alone prints."""
    with torch.no_grad():
        torch.save(images(seed=1), folder / "given.pt")
        torch.save(network(images(seed=1)), folder / "expected.pt")
    ended = forks.run(SERVE, kind, program, folder / "given.pt", folder / "expected.pt")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_an_exported_network_has_its_weights_and_runs_where_the_kernels_are(served, tmp_path):
    save(export(served, (images(),)), tmp_path / "network.pt2")
    other = Served(filled(type(served.network)(), seed=1))
    other.load_state_dict(load(tmp_path / "network.pt2").module().state_dict())
    assert_arrived(other, copies(served.state_dict()))
    assert serve("export", tmp_path / "network.pt2", served, tmp_path) == "served [5, 3, 8, 8]"


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_network_compiled_ahead_of_time_runs_where_the_kernels_are(tmp_path):
    network = Served(filled(Network())).eval()
    package = torch._inductor.aoti_compile_and_package(
        export(network, (images(),)), package_path=str(tmp_path / "network.pt2")
    )
    assert serve("aoti", Path(package), network, tmp_path) == "served [5, 3, 8, 8]"
