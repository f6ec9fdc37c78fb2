"""Training of a denoiser: one configuration in, one run folder out.

    runs/x/
        config.json  stages.json    what was asked for
        log.jsonl  loss.png         what happened
        checkpoints/step-########   see checkpoints.py
        samples/step-########.png   if asked for

What a step sees is a function of the seed and the step's number alone: images, noise levels and noise come
from generators seeded with both. Only dropout draws from PyTorch's global generators, whose states are in
the checkpoints. So a run that was killed and resumed ends, on the CPU, with the same bits as one that was
not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from . import checkpoints
from .ema import EMA
from .losses import MixedNoise, StratifiedNoise, edm_loss
from .preconditioning import EDMPreconditioner, host_to_device
from .run_log import LossWindow, Progress, RunLog, TrainingDiverged
from .samplers import class_labels, generate
from .schedules import LogNormal
from .stages import Stages

PRECISIONS = ("fp32", "bf16")
STAGE_SAMPLINGS = ("mixed", "stratified")
LR_DECAYS = ("constant", "cosine")


class RunError(RuntimeError):
    """A run cannot start or go on: the folder is taken, or does not fit the configuration."""


# ---------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome of a run. Defaults are EDM's for CIFAR-10 (arXiv 2206.00364).

    Attributes:
        network: what ``multistage_diffusion.networks.build`` takes.
        stages: the stages of the noise levels.
        data: "digits", or a folder, archive or array file of images.
        image_size: pixels per side the images are brought to; ``None``: as they are.
        sigma_data: standard deviation of the data in [-1, 1].
        P_mean, P_std: ln sigma ~ N(P_mean, P_std²).
        stage_sampling: "mixed" (as EDM) or "stratified" (stages in given proportions).
        stage_probabilities: of stratified sampling; ``None``: uniform.
        importance_weights: of stratified sampling: keep the expected loss of "mixed".
        steps: optimizer steps.
        batch_size: images per step.
        accumulate: micro-batches a batch is split into; changes memory, not the result.
        precision: "fp32", or "bf16" for autocast to bfloat16.
        lr, betas, eps: of Adam.
        warmup_images: the learning rate grows linearly over that many images.
        lr_decay: "constant", or "cosine" to 0 at the last step.
        gradient_clip: largest norm of the whole gradient; ``None``: no clipping.
        ema_halflife_images, ema_rampup_ratio: see ``EMA``.
        seed: of everything random.
        checkpoint_every, log_every, sample_every: in steps; ``sample_every=None``: no grids.
        keep_checkpoints: the newest that many stay; ``None``: all.
        sample_count: images of a grid.
    """

    network: dict
    stages: Stages = field(default_factory=Stages.edm)
    data: str = "digits"
    image_size: int | None = None
    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2
    stage_sampling: str = "mixed"
    stage_probabilities: tuple[float, ...] | None = None
    importance_weights: bool = False
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "fp32"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_images: int = 0
    lr_decay: str = "constant"
    gradient_clip: float | None = None
    ema_halflife_images: float = 500_000
    ema_rampup_ratio: float | None = 0.05
    seed: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int | None = 2
    log_every: int = 50
    sample_every: int | None = None
    sample_count: int = 16

    def __post_init__(self):
        if self.stage_probabilities is not None:
            object.__setattr__(self, "stage_probabilities", tuple(map(float, self.stage_probabilities)))
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        if not isinstance(self.network, dict):
            raise ValueError(f"TrainingConfig: network must be a dictionary, got {self.network!r}")
        self._check_numbers()
        for name, allowed in (
            ("precision", PRECISIONS),
            ("stage_sampling", STAGE_SAMPLINGS),
            ("lr_decay", LR_DECAYS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TrainingConfig: {name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"TrainingConfig: accumulate={self.accumulate} does not divide batch_size={self.batch_size}"
            )
        if self.stage_sampling == "mixed" and (self.stage_probabilities or self.importance_weights):
            raise ValueError(
                'TrainingConfig: stage_probabilities and importance_weights need stage_sampling="stratified"'
            )
        self.noise_levels()  # raises what is wrong with the distribution and the probabilities

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "sample_count"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(
                    f"TrainingConfig: {name}={getattr(self, name)!r} must be a whole number >= 1"
                )
        for name in ("keep_checkpoints", "sample_every", "image_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"TrainingConfig: {name}={value!r} must be None or a whole number >= 1")
        for name in ("lr", "eps", "sigma_data"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainingConfig: {name}={getattr(self, name)} must be positive and finite")
        for name in ("warmup_images", "ema_halflife_images", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainingConfig: {name}={getattr(self, name)} must be at least 0")
        for name in ("gradient_clip", "ema_rampup_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainingConfig: {name}={value} must be None or positive")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"TrainingConfig: betas={self.betas} must be two numbers in [0, 1)")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        lr = self.lr
        if self.warmup_images:
            lr *= min(1.0, (step + 1) * self.batch_size / self.warmup_images)
        if self.lr_decay == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return lr

    def noise_levels(self) -> MixedNoise | StratifiedNoise:
        """What draws the noise levels of a batch."""
        distribution = LogNormal(self.P_mean, self.P_std)
        if self.stage_sampling == "mixed":
            return MixedNoise(self.stages, distribution)
        return StratifiedNoise(self.stages, self.stage_probabilities, distribution, self.importance_weights)

    def to_json(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["stages"] = self.stages.to_json()
        return json.loads(json.dumps(values))  # tuples become lists, as they are after a round trip

    @classmethod
    def from_json(cls, values: dict) -> TrainingConfig:
        """The inverse of ``to_json``. Raises ValueError for a key that does not exist."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"TrainingConfig: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return cls(**{**values, "stages": Stages.from_json(values["stages"])})

    def differences(self, saved: dict) -> list[str]:
        """What of a saved configuration differs from this one and may not when a run is resumed."""
        free = {
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "sample_every",
            "sample_count",
            "accumulate",
        }
        if self.lr_decay == "constant":
            free.add("steps")
        given = {k: v for k, v in self.to_json().items() if k not in free}
        return checkpoints.differing_keys({k: v for k, v in saved.items() if k not in free}, given)


# ------------------------------------------------------------------ randomness as a function of seed and step


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


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish to stop after the step; a second SIGINT interrupts at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


# ---------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: finished steps.
        checkpoint: the newest checkpoint.
        stopped_by: number of the signal that ended it early, or ``None``.
        seconds: training time, earlier parts of a resumed run included.
    """

    step: int
    checkpoint: Path
    stopped_by: int | None
    seconds: float


class Trainer:
    """Trains one denoiser.

    Args:
        config: what to do.
        directory: the run folder.
        data: images, as ``multistage_diffusion.data.load_images`` returns them; default: loaded from
            ``config.data``.
        network: default: built from ``config.network``, with weights drawn from ``config.seed``.
        device: where to train.
        quiet: no progress.

    Raises:
        ValueError: the data does not fit the network.
    """

    def __init__(
        self,
        config: TrainingConfig,
        directory: str | Path,
        *,
        data=None,
        network: nn.Module | None = None,
        device: torch.device | str = "cpu",
        quiet: bool = False,
    ):
        self.config, self.directory, self.device, self.quiet = (
            config,
            Path(directory),
            torch.device(device),
            quiet,
        )
        self.data = data if data is not None else _load_data(config)
        torch.manual_seed(derive_seed(config.seed, "weights", 0))
        self.network = (network if network is not None else _build(config)).to(self.device).train()
        self._check_data_fits()
        self.denoiser = EDMPreconditioner(self.network, config.stages, config.sigma_data)
        self.ema = EMA(self.network, config.ema_halflife_images, config.ema_rampup_ratio)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self.noise_levels = config.noise_levels()
        self.order = DataOrder(self.data.num_images, config.seed)
        self.noise_generator = torch.Generator(self.device)
        self.window = LossWindow(config.stages)
        self.log = RunLog(self.directory / "log.jsonl")
        self.step = 0
        self.seconds = 0.0

    @property
    def checkpoint_directory(self) -> Path:
        return self.directory / "checkpoints"

    def run(self, resume: bool = False) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or SIGINT, then saves.

        Args:
            resume: go on from the newest intact checkpoint of the folder (from the start if there is none).

        Raises:
            RunError: the folder holds a run already and ``resume`` is off, or holds another one.
            TrainingDiverged: a loss or weight is not finite; the checkpoints stay as they were.
            CheckpointError: a checkpoint could not be written, or does not fit.
        """
        self._prepare_directory(resume)
        torch.manual_seed(derive_seed(self.config.seed, "dropout", 0))
        if resume:
            self._restore()
        self._last_record_at = (time.monotonic(), self.step)
        progress = Progress(self.config.steps, self.step, self.quiet)
        try:
            with StopRequest() as stop:
                while self.step < self.config.steps and stop.signal is None:
                    self._train_step()
                    progress.advance()
                    self._after_step(progress)
                if len(self.window):
                    self._record(progress)
                path = self._save()
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}. {self._advice()}") from error
        finally:
            progress.close()
        self._plot()
        return TrainingResult(self.step, path, stop.signal, self.seconds)

    # ------------------------------------------------------------------ one step

    def _train_step(self) -> None:
        config, batch = self.config, self.config.batch_size
        levels = self.noise_levels.draw(batch, self._host_generator("sigma"))
        indices = self.order.indices(self.step * batch, batch)
        y = host_to_device(self.data.sample(indices), self.device, torch.float32)
        self.noise_generator.manual_seed(derive_seed(config.seed, "noise", self.step))
        noise = torch.randn(y.shape, generator=self.noise_generator, device=self.device)
        scale = host_to_device(levels.weight / batch, self.device, torch.float32)
        labels = self._class_labels(indices)
        losses = torch.empty(batch, device=self.device)
        for m in range(config.accumulate):
            part = slice(
                m, None, config.accumulate
            )  # strided: every micro-batch gets its share of every stage
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                conditioning = {} if labels is None else {"class_labels": labels[part]}
                loss = edm_loss(
                    self.denoiser,
                    y[part],
                    levels.sigma[part],
                    levels.stage[part],
                    noise=noise[part],
                    **conditioning,
                )
            (scale[part] * loss).sum().backward()
            losses[part] = loss.detach() / y[0].numel()
        self.step += 1
        self.window.add(self.step, levels, losses)
        if (
            self.device.type == "cpu"
        ):  # elsewhere this would wait for the device; the log interval does it there
            self.window.check_last()
        self._update_weights()

    def _update_weights(self) -> None:
        config = self.config
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step - 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.network, (self.step - 1) * config.batch_size, config.batch_size)

    def _class_labels(self, indices: torch.Tensor) -> torch.Tensor | None:
        """One-hot labels ``[B, label_dim]`` of a class-conditional network."""
        label_dim = getattr(self.network, "label_dim", 0)
        if not label_dim:
            return None
        one_hot = nn.functional.one_hot(self.data.labels[indices], label_dim)
        return host_to_device(one_hot, self.device, torch.float32)

    def _host_generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.config.seed, purpose, self.step))

    # ------------------------------------------------------------------ between steps

    def _after_step(self, progress: Progress) -> None:
        """Log record, checkpoint and sample grid, where they are due."""
        config = self.config
        save = self.step % config.checkpoint_every == 0
        if save or self.step % config.log_every == 0:
            self._record(progress)  # with every checkpoint, so that a resumed run writes the same records
        if save:
            self._save()
        if config.sample_every is not None and self.step % config.sample_every == 0:
            self._sample_grid()

    def _record(self, progress: Progress) -> None:
        """Writes a log record of the steps since the last one."""
        summary = self.window.summary()
        self.window.clear()
        now, (then, step) = time.monotonic(), self._last_record_at
        self._last_record_at = (now, self.step)
        self.seconds += now - then
        images = (self.step - step) * self.config.batch_size
        record = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            **summary,
            "images_per_second": round(images / max(now - then, 1e-9), 2),
            "lr": self.config.lr_at(self.step - 1),
            "seconds": round(self.seconds, 3),
        }
        self.log.append(record)
        progress.report(record)

    def _save(self) -> Path:
        self._check_weights()
        optimizer_tensors, scalars = checkpoints.optimizer_tensors(self.network, self.optimizer)
        tensors = {
            "network": self.network.state_dict(),
            "ema": self.ema.network.state_dict(),
            "optimizer": optimizer_tensors,
            "rng": checkpoints.rng_tensors(),
        }
        metadata = {
            "images": self.step * self.config.batch_size,
            "seconds": self.seconds,
            "config": self.config.to_json(),
            "optimizer": scalars,
            "data_fingerprint": self.data.fingerprint,
        }
        keep = self.config.keep_checkpoints
        return checkpoints.save_checkpoint(self.checkpoint_directory, self.step, tensors, metadata, keep)

    def _check_weights(self) -> None:
        """Raises TrainingDiverged if a weight is not finite: that must not replace a good checkpoint."""
        named = list(self.network.named_parameters())
        finite = torch.stack([torch.isfinite(p.detach()).all() for _, p in named]).cpu().tolist()
        bad = [name for (name, _), ok in zip(named, finite, strict=True) if not ok]
        if bad:
            raise TrainingDiverged(
                f"{len(bad)} of {len(named)} weights are not finite after step {self.step}, first {bad[0]}. "
                f"{self._advice()}"
            )

    def _advice(self) -> str:
        found = checkpoints.list_checkpoints(self.checkpoint_directory)
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return f"{kept}. Try a lower lr, a longer warm-up, gradient clipping or precision fp32"

    def _sample_grid(self) -> None:
        from .plots import save_sample_grid

        denoiser = EDMPreconditioner(self.ema.network, self.config.stages, self.config.sigma_data)
        shape = (self.network.in_channels, self.network.image_size, self.network.image_size)
        seeds = range(self.config.sample_count)
        labels = class_labels(self.network, seeds)
        samples = generate(denoiser, seeds, shape, dtype=torch.float32, **labels)
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        save_sample_grid(samples.images.float(), folder / f"step-{self.step:08d}.png")

    def _plot(self) -> None:
        from .plots import plot_loss

        if self.log.path.exists():
            plot_loss(self.log.path, self.directory / "loss.png")

    # ------------------------------------------------------------------ start and resume

    def _check_data_fits(self) -> None:
        given = (self.data.channels, self.data.image_size)
        needed = (self.network.in_channels, self.network.image_size)
        if given != needed:
            raise ValueError(
                f"the data has {given[0]} channel(s) at {given[1]} pixels, "
                f"the network takes {needed[0]} channel(s) at {needed[1]} pixels"
            )
        label_dim = getattr(self.network, "label_dim", 0)
        if label_dim and self.data.labels is None:
            raise ValueError(f"the network takes one of {label_dim} classes, but the images have no labels")
        if label_dim and int(self.data.labels.max()) >= label_dim:
            raise ValueError(
                f"the network takes classes 0 to {label_dim - 1}, "
                f"the images have class {int(self.data.labels.max())}"
            )

    def _prepare_directory(self, resume: bool) -> None:
        config_path = self.directory / "config.json"
        if config_path.exists():
            if not resume:
                raise RunError(f"{self.directory} holds a run already; resume it, or choose another folder")
            differences = self.config.differences(json.loads(config_path.read_text()))
            if differences:
                raise RunError(
                    f"{self.directory} holds a run of another configuration: {'; '.join(differences)}"
                )
        self.directory.mkdir(parents=True, exist_ok=True)
        _write_json(config_path, self.config.to_json())
        self.config.stages.save(self.directory / "stages.json")

    def _restore(self) -> None:
        path = checkpoints.latest_checkpoint(self.checkpoint_directory)
        if path is None:
            self._say(f"no checkpoint in {self.checkpoint_directory} yet; starting from step 0")
            self.log.truncate(0)
            return
        metadata = checkpoints.read_metadata(path)
        if metadata["data_fingerprint"] != self.data.fingerprint:
            raise RunError(
                f"the images of {self.config.data} have changed since {path} was written "
                f"(fingerprint {metadata['data_fingerprint']}, now {self.data.fingerprint})"
            )
        checkpoints.load_weights(self.network, checkpoints.read_tensors(path, "network"), path)
        checkpoints.load_weights(self.ema.network, checkpoints.read_tensors(path, "ema"), path)
        optimizer_tensors = checkpoints.read_tensors(path, "optimizer")
        checkpoints.restore_optimizer(self.network, self.optimizer, optimizer_tensors, metadata["optimizer"])
        checkpoints.restore_rng(checkpoints.read_tensors(path, "rng"))
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.log.truncate(self.step)
        self._say(f"resuming {self.directory} after step {self.step} of {self.config.steps}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _load_data(config: TrainingConfig):
    from .data import load_images

    return load_images(config.data, image_size=config.image_size)


def _build(config: TrainingConfig) -> nn.Module:
    from .networks import build

    return build(config.network)


def _write_json(path: Path, values: dict) -> None:
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)
