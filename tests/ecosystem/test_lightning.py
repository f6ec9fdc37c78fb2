"""Lightning: ``fit`` trains what a loop trains, its checkpoints arrive."""

from __future__ import annotations

import pytest
import torch

from ecosystem_networks import Network, assert_arrived, copies, difference, filled, images

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of Lightning's own, about loggers and workers
]
lightning = pytest.importorskip(
    "lightning.pytorch", reason="needs lightning: make test-ecosystem installs it"
)

STAGES = [[0, 1, 2, 1], [0, 0, 2, 2], [0, 2, 0, 2]]


class Task(lightning.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = filled(Network(), seed)

    def training_step(self, batch, index):
        x, stage = batch
        return self.network(x[0], stage[0]).square().mean()

    def configure_optimizers(self):
        return optimizer_of(self.network)


def optimizer_of(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


def batches() -> torch.utils.data.DataLoader:
    data = [(images(4, seed), torch.tensor(stage)) for seed, stage in enumerate(STAGES)]
    return torch.utils.data.DataLoader(data, batch_size=1)


def fit(task: Task, folder, **options) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, default_root_dir=folder, **quiet, **options
    )
    trainer.fit(task, batches())
    return trainer


def test_fit_trains_what_a_loop_does(tmp_path):
    task, network = Task(), filled(Network())
    fit(task, tmp_path, enable_checkpointing=False)
    optimizer = optimizer_of(network)
    for _ in range(2):
        for seed, stage in enumerate(STAGES):
            optimizer.zero_grad()
            network(images(4, seed), torch.tensor(stage)).square().mean().backward()
            optimizer.step()
    assert_arrived(task.network, copies(network.state_dict()))


def test_a_checkpoint_arrives(tmp_path):
    task = Task()
    path = fit(task, tmp_path).checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert difference(task.state_dict(), saved) is None
    other = Task.load_from_checkpoint(path, seed=1, map_location="cpu")
    assert difference(other.state_dict(), saved) is None
