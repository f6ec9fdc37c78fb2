"""What each step of a training run sees: a function of the seed and the step's number alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from multistage_diffusion.common.transfer import host_to_device
from multistage_diffusion.networks.stage_network import Takes
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.losses import loss_scalars
from multistage_diffusion.noise.noise_levels import NoiseLevels, stage_counts
from multistage_diffusion.noise.preconditioning import Preconditioner
from multistage_diffusion.training.config import TrainingConfig

__all__ = ["DataOrder", "MicroBatch", "TrainingBatches", "deal", "derive_seed"]


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """A 63-bit seed for one purpose and one step or epoch; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class DataOrder:
    """Which images each step sees: one permutation of the data set after the other."""

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, first: int, count: int) -> torch.Tensor:
        """Indices ``[count]`` of the images at positions first, first + 1, ... of the whole run."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(first, self.num_images)
            piece = self._epoch_order(epoch)[offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return torch.cat(pieces)

    def _epoch_order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.num_images, generator=generator)
        return self._permutation


def deal(stage: torch.Tensor, parts: int) -> torch.Tensor:
    """Positions ``[parts, B / parts]`` of the samples of each part of a batch, sorted by stage.

    The samples are dealt out like cards, stage after stage, so no two parts differ by more than one sample of any
    stage: they cost the same, although a wide decoder may cost 30 times as much as a narrow one.

    Args:
        stage: ids ``[B]`` on the host.
        parts: divides B.
    """
    return torch.argsort(stage, stable=True).view(-1, parts).T


@dataclass(frozen=True)
class MicroBatch:
    """The part of a batch that one process takes at once, sorted by stage.

    Attributes:
        positions: where its samples stand in the batch, int64 ``[b]`` on the device.
        stage: their stages; a ``StageOrder`` for a network that takes one, else ids ``[b]`` on the host.
        tensors: what the loss is computed from, on the device: ``y`` and ``noise`` of the images' shape; ``scalars``
            ``[6, b]``, see ``losses.loss_scalars``; ``share`` ``[b]`` of each sample's loss in the objective; and the
            network's conditioning.
    """

    positions: torch.Tensor
    stage: torch.Tensor | StageOrder
    tensors: dict[str, torch.Tensor]


class TrainingBatches:
    """Draws the batches of a run.

    Args:
        config: of the run.
        data: as ``multistage_diffusion.data.images.load_images`` returns them.
        denoiser: around the network in training.
        device: where the network is.
        rank, size: this process, and how many there are; each gets its share of every batch.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data,
        denoiser: Preconditioner,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
    ):
        if config.batch_size % (config.accumulate * size):
            raise ValueError(
                f"training: {size} processes with accumulate={config.accumulate} do not divide "
                f"batch_size={config.batch_size}"
            )
        self.config, self.data, self.denoiser, self.device = config, data, denoiser, device
        self.rank, self.size = rank, size
        self.takes = Takes.of(denoiser.network)
        self.noise_levels = config.noise_levels()
        self.augmentation = config.augmentation()
        self.order = DataOrder(data.num_images, config.seed)
        self._generator = torch.Generator(device)

    def draw(self, step: int) -> tuple[NoiseLevels, list[MicroBatch]]:
        """The noise levels of the whole batch of a step, and this process's parts of it."""
        config = self.config
        levels = self.noise_levels.draw(config.batch_size, self._host_generator("sigma", step))
        parts = deal(levels.stage, config.accumulate * self.size)[self.rank :: self.size]
        mine = parts.flatten()
        positions = host_to_device(mine, self.device)
        indices = self.order.indices(step * config.batch_size, config.batch_size)[mine]
        y = host_to_device(self.data.sample(indices), self.device, torch.float32)
        y, conditioning = self._augmented(y, mine, step)
        tensors = {
            "y": y,
            "noise": self._noise(y, step).index_select(0, positions),
            **self._scalars(levels, y[0].numel(), mine),
            **conditioning,
            **self._class_labels(indices),
        }
        pieces = {
            name: values.split(parts.shape[1], dim=-1 if name == "scalars" else 0)
            for name, values in tensors.items()
        }
        places = positions.split(parts.shape[1])
        return levels, [
            MicroBatch(
                places[i],
                self._stage(levels.stage[part]),
                {name: values[i] for name, values in pieces.items()},
            )
            for i, part in enumerate(parts)
        ]

    def _augmented(self, y: torch.Tensor, mine: torch.Tensor, step: int) -> tuple[torch.Tensor, dict]:
        """The augmented images, and what the network is told of that."""
        if self.augmentation is None:
            return y, {}
        draws = self.augmentation.draw(self.config.batch_size, self._host_generator("augmentation", step))
        y, labels = self.augmentation.apply(y, {name: values[mine] for name, values in draws.items()})
        return y, {"augment_labels": labels} if self.takes.augment_labels else {}

    def _noise(self, y: torch.Tensor, step: int) -> torch.Tensor:
        """That of the whole batch: which process takes a sample must not change its noise."""
        self._generator.manual_seed(derive_seed(self.config.seed, "noise", step))
        shape = (self.config.batch_size, *y.shape[1:])
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _scalars(self, levels: NoiseLevels, numbers: int, mine: torch.Tensor) -> dict[str, torch.Tensor]:
        share = levels.weight * self.config.loss_scale(numbers) / self.config.batch_size
        rows = torch.cat([loss_scalars(self.denoiser, levels.sigma), share[None]])[:, mine]
        rows = host_to_device(rows, self.device, torch.float32)
        return {"scalars": rows[:-1], "share": rows[-1]}

    def _class_labels(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """One-hot labels ``[b, label_dim]`` for a class-conditional network."""
        label_dim = self.takes.class_labels
        if not label_dim:
            return {}
        one_hot = nn.functional.one_hot(self.data.labels[indices], label_dim)
        return {"class_labels": host_to_device(one_hot, self.device, torch.float32)}

    def _stage(self, stage: torch.Tensor) -> torch.Tensor | StageOrder:
        if not self.takes.stage_order:
            return stage
        return StageOrder(stage_counts(stage, len(self.denoiser.stages)), None, None)

    def _host_generator(self, purpose: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.config.seed, purpose, step))
