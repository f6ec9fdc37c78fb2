"""Training of a denoiser: one configuration in, one run folder out.

    runs/x/
        config.json  stages.json    what was asked for
        log.jsonl  loss.png         what happened
        checkpoints/step-########   see checkpoints.py
        .lock                       see run_lock.py
        samples/step-########.png   if asked for

What a step sees is a function of the seed and the step's number alone: images, noise levels, noise and dropout come
from generators seeded with both. So a run that was killed and resumed ends, on the CPU, with the same bits as one that
was not; and several processes that share the batches do what one would, up to rounding and the draws of dropout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from multistage_diffusion.common.atomic_files import remove_abandoned, replacing, set_aside
from multistage_diffusion.common.streams import tell
from multistage_diffusion.networks.stage_network import Takes
from multistage_diffusion.networks.stage_order import StageOrder
from multistage_diffusion.noise.losses import loss_at
from multistage_diffusion.sampling.cuda_graphs import GraphedFunction
from multistage_diffusion.sampling.samplers import (
    class_labels,
    default_sampler,
    generate,
    sampler_config,
    schedule_of,
)
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.batches import TrainingBatches, derive_seed
from multistage_diffusion.training.config import TrainingConfig
from multistage_diffusion.training.configure import FolderWarning
from multistage_diffusion.training.data_parallel import Processes
from multistage_diffusion.training.ema import EMA
from multistage_diffusion.training.parameters import FlatGradients
from multistage_diffusion.training.run_lock import RunError, RunLock
from multistage_diffusion.training.run_log import LossWindow, Progress, RunLog, TrainingDiverged
from multistage_diffusion.training.state import TrainingState, find_not_finite

__all__ = [
    "FolderWarning",
    "OtherRunError",
    "PictureWarning",
    "RunError",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "train",
]


MAX_GRAPHS = 64  # mixes of stages that have a CUDA graph of their own


class PictureWarning(UserWarning):
    """A picture could not be drawn or written; training goes on without."""


class OtherRunError(RunError, checkpoints.CheckpointError):
    """A checkpoint is of a run of another configuration or of other images."""


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGHUP into a wish to stop after the step; a second SIGINT interrupts at once.

    A SIGHUP that is ignored, as under ``nohup``, stays so.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def stopping_signals() -> list[signal.Signals]:
    """The signals that stop a run after it has saved."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


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
        data: images, as ``multistage_diffusion.data.images.load_images`` returns them; default: loaded from
            ``config.data``.
        network: default: built from ``config.network``, with weights drawn from ``config.seed``.
        device: where to train.
        processes: those that share the run, each with a trainer of its own, of the same arguments but for the device;
            default: this one alone. The first one writes the run folder.
        cuda_graphs: replay forward and backward from CUDA graphs on a GPU: one graph for every mix of stages, which are
            few with ``stage_sampling="systematic"``; beyond ``MAX_GRAPHS`` mixes goes without.
        quiet: no progress.

    Raises:
        ValueError: the data does not fit the network; the processes do not share the batch evenly; CUDA graphs for a
            network that does not take a ``StageOrder``.
    """

    def __init__(
        self,
        config: TrainingConfig,
        directory: str | Path,
        *,
        data=None,
        network: nn.Module | None = None,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
        cuda_graphs: bool = False,
        quiet: bool = False,
    ):
        self.config, self.directory, self.device = config, Path(directory), torch.device(device)
        self.processes = processes or Processes()
        self.quiet = quiet or not self.processes.is_first
        self.data = data if data is not None else _load_data(config)
        torch.manual_seed(derive_seed(config.seed, "weights", 0))
        self.network = (network if network is not None else _build(config)).to(self.device).train()
        self._check_data_fits()
        self.denoiser = config.denoiser(self.network)
        self.ema = EMA(self.network, config.ema_halflife_images, config.ema_rampup_ratio)
        together = cuda_graphs or self.processes.size > 1
        self.gradients = FlatGradients(self.network) if together else None
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.state = TrainingState(self.network, self.ema.network, self.optimizer)
        self.batches = TrainingBatches(
            config, self.data, self.denoiser, self.device, self.processes.rank, self.processes.size
        )
        self._backward = self._forward_and_backward
        if cuda_graphs:
            self._backward = self._graphed()
        self.window = LossWindow(config.stages)
        self.log = RunLog(self.directory / "log.jsonl")
        self.step = 0
        self.seconds = 0.0

    @property
    def checkpoint_directory(self) -> Path:
        return self.directory / "checkpoints"

    def run(self, resume: bool = False) -> TrainingResult:
        """Trains to the last step, or until SIGTERM, SIGINT or SIGHUP, then saves.

        Args:
            resume: go on from the newest intact checkpoint of the folder (from the start if there is none).

        Raises:
            RunError: the folder holds a run already and ``resume`` is off, or holds another one, or another process
                trains there.
            TrainingDiverged: a loss or weight is not finite; the checkpoints stay as they were.
            CheckpointError: a checkpoint could not be written, or does not fit; nothing of it was loaded then.
            ProcessError: the processes of the run do not fit together.
        """
        self.processes.require_same(
            images=self.data.fingerprint, run_folder=str(self.directory), **self.config.to_json()
        )
        with RunLock(self.directory) as lock:
            self.processes.first_does(lock.acquire)
            self._begin(resume)
            return self._train()

    def _begin(self, resume: bool) -> None:
        """Comes to where training starts or goes on; writes to the folder only after everything has been checked."""
        self.processes.first_does(lambda: self._check_directory(resume))
        if resume:
            self._restore()
        self.processes.require_same(step=self.step)
        self.processes.first_does(self._clean_folder)
        self.processes.share(self.network)
        self.processes.share(self.ema.network)
        self.processes.first_does(self._write_configuration)

    def _train(self) -> TrainingResult:
        self._last_record_at = (time.monotonic(), self.step)
        progress = Progress(self.config.steps, self.step, self.quiet)
        try:
            with StopRequest() as stop:
                while self.step < self.config.steps and not self._stopped_by(stop):
                    self._train_step()
                    progress.advance()
                    self._after_step(progress)
                if len(self.window):
                    self._record(progress)
                path = self._save()
                progress.close()
                self.processes.first_does(lambda: self._draw("the loss curve", self._plot))
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}. {self._advice()}") from error
        finally:
            progress.close()
        ended_early = self.step < self.config.steps
        return TrainingResult(self.step, path, stop.signal if ended_early else None, self.seconds)

    def _stopped_by(self, stop: StopRequest) -> bool:
        """Whether a signal has reached any of the processes, which then all stop after the same step."""
        agreed = self.processes.largest(stop.signal or 0)
        if agreed:  # else one that came in the meantime is for the next step
            stop.signal = agreed
        return bool(agreed)

    # ------------------------------------------------------------------ one step

    def _train_step(self) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, f"dropout/{self.processes.rank}", self.step))
        levels, parts = self.batches.draw(self.step)
        losses = torch.zeros(config.batch_size, device=self.device)
        for part in parts:
            loss = self._backward(part.tensors, part.stage)
            losses[part.positions] = loss / part.tensors["y"][0].numel()
        self.step += 1
        self.window.add(self.step, levels, self.processes.sum(losses))
        if self.device.type == "cpu":
            self.window.check_last()  # elsewhere this would wait for the device; the log interval does it there
        self._update_weights(levels.counts)

    def _forward_and_backward(
        self, tensors: dict[str, torch.Tensor], stage: torch.Tensor | StageOrder
    ) -> torch.Tensor:
        """Adds the gradients of a micro-batch to the network's, and returns the loss of every sample."""
        conditioning = dict(tensors)
        y, noise, scalars, share = (conditioning.pop(name) for name in ("y", "noise", "scalars", "share"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = loss_at(self.denoiser, y, scalars, stage, noise=noise, **conditioning)
        (share * loss).sum().backward()
        return loss.detach()

    def _graphed(self) -> GraphedFunction:
        if not Takes.of(self.network).stage_order:
            raise ValueError(f"CUDA graphs need a StageNetwork, got {type(self.network).__name__}")
        return GraphedFunction(
            self._forward_and_backward,
            adds_to=[self.gradients.values],
            max_graphs=MAX_GRAPHS,
            replace=False,
        )

    def _update_weights(self, counts: Sequence[int]) -> None:
        """One optimizer step; a decoder whose stage had no sample stays as it is, its state included."""
        config = self.config
        if self.processes.size > 1:
            self.processes.sum(self.gradients.values)
        if self.gradients is not None:
            self.gradients.leave_absent(counts)
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step - 1)
        self.optimizer.step()
        (self.optimizer.zero_grad if self.gradients is None else self.gradients.clear)()
        self.ema.update(self.network, (self.step - 1) * config.batch_size, config.batch_size)

    # ------------------------------------------------------------------ between steps

    def _after_step(self, progress: Progress) -> None:
        """Log record, checkpoint and sample grid, where they are due."""
        config = self.config
        save = self.step % config.checkpoint_every == 0
        if save or self.step % config.log_every == 0:
            # With every checkpoint, so that a run resumed there writes the same records. One that a signal stops
            # between two records has one more.
            self._record(progress)
        if save:
            self._save()
        if config.sample_every is not None and self.step % config.sample_every == 0:
            self.processes.first_does(lambda: self._draw("the sample grid", self._sample_grid))

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
        self.processes.first_does(lambda: self.log.append(record))
        progress.report(record)

    def _save(self) -> Path:
        tensors, optimizer = self.state.tensors()
        if found := find_not_finite(tensors):  # that must not replace a good checkpoint
            raise TrainingDiverged(f"{found[0]} are not finite after step {self.step}, first {found[1]}")
        metadata = {
            "images": self.step * self.config.batch_size,
            "seconds": self.seconds,
            "config": self.config.to_json(),
            "optimizer": optimizer,
            "data_fingerprint": self.data.fingerprint,
        }
        arguments = (self.checkpoint_directory, self.step, tensors, metadata, self.config.keep_checkpoints)
        return self.processes.first_does(lambda: checkpoints.save_checkpoint(*arguments))

    def _advice(self) -> str:
        found = checkpoints.list_checkpoints(self.checkpoint_directory)
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return f"{kept}. Try a lower lr, a longer warm-up, gradient clipping or precision fp32"

    def _draw(self, what: str, draw: Callable[[], None]) -> None:
        """Draws a picture; one that cannot be drawn or written costs no training."""
        try:
            draw()
        except Exception as error:
            text = f"{what} after step {self.step} is missing: {type(error).__name__}: {error}"
            warnings.warn(text, PictureWarning, stacklevel=2)

    def _sample_grid(self) -> None:
        """Images of the averaged weights; of four channels the first three, without the fourth, which is alpha."""
        from multistage_diffusion.common.plots import save_sample_grid

        denoiser = self.config.denoiser(self.ema.network)
        shape = (self.network.in_channels, self.network.image_size, self.network.image_size)
        seeds = range(self.config.sample_count)
        labels = class_labels(self.network, seeds)
        sampler = sampler_config(default_sampler(denoiser), schedule_of(denoiser))
        samples = generate(denoiser, seeds, shape, sampler, dtype=torch.float32, **labels)
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        images = samples.images.float()
        visible = images[:, :3] if images.shape[1] == 4 else images
        save_sample_grid(visible, folder / f"step-{self.step:08d}.png")

    def _plot(self) -> None:
        from multistage_diffusion.training.loss_curves import plot_loss

        if self.log.path.exists():
            plot_loss(self.log.path, self.directory / "loss.png")

    # ------------------------------------------------------------------ start and resume

    def _check_data_fits(self) -> None:
        values = getattr(self.data, "values", "images")
        if values != self.config.values:
            raise ValueError(f"the data are {values}, the configuration says values={self.config.values!r}")
        given = (self.data.channels, self.data.image_size)
        needed = (self.network.in_channels, self.network.image_size)
        if given != needed:
            raise ValueError(
                f"the data has {given[0]} channel(s) at {given[1]} pixels, "
                f"the network takes {needed[0]} channel(s) at {needed[1]} pixels"
            )
        takes = Takes.of(self.network)
        label_dim = takes.class_labels
        if takes.context:
            raise ValueError(
                f"the network takes a context of {takes.context} channels; "
                "training here gives it classes (label_dim) or nothing"
            )
        if label_dim and self.data.labels is None:
            raise ValueError(f"the network takes one of {label_dim} classes, but the images have no labels")
        if label_dim and int(self.data.labels.max()) >= label_dim:
            raise ValueError(
                f"the network takes classes 0 to {label_dim - 1}, "
                f"the images have class {int(self.data.labels.max())}"
            )

    def _check_directory(self, resume: bool) -> None:
        """Raises RunError for a folder that holds another run, or any run that is not to be resumed.

        One in which no step has left anything, as after a start that ran out of memory, is as good as empty.
        """
        found = checkpoints.list_checkpoints(self.checkpoint_directory)
        parts = [self.checkpoint_directory.name] if found else []
        parts += [] if self.log.is_empty() else [self.log.path.name]
        if parts and not resume:
            raise RunError(
                f"{self.directory} holds a run already ({', '.join(parts)}); resume it, or choose another folder"
            )
        if os.path.lexists(self.checkpoint_directory) and not self.checkpoint_directory.is_dir():
            raise RunError(
                f"{self.checkpoint_directory} is no folder; move it away, or choose another run folder"
            )
        if parts and not found:  # else the checkpoint says what was trained
            path = self.directory / "config.json"
            with contextlib.suppress(FileNotFoundError, ValueError):  # lost or damaged
                self._require_configuration(TrainingConfig.read(path).to_json(), path, RunError)

    def _require_configuration(self, saved: dict, source: Path, error: type[RunError]) -> None:
        """Raises an error if the run that a file is of had another configuration than this one."""
        differences = self.config.differences(saved)
        if differences:
            raise error(
                f"{self.directory} holds a run of another configuration, says {source.relative_to(self.directory)}: "
                f"{'; '.join(differences)}"
            )

    def _write_configuration(self) -> None:
        for name, content in (
            ("config.json", self.config.to_json()),
            ("stages.json", self.config.stages.to_json()),
        ):
            path = self.directory / name
            if path.is_dir():
                text = f"{path} is a folder; it is kept as {set_aside(path)}"
                warnings.warn(text, FolderWarning, stacklevel=2)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n")

    def _restore(self) -> None:
        path = checkpoints.latest_checkpoint(self.checkpoint_directory)
        if path is None:
            self._say(f"no checkpoint in {self.checkpoint_directory} yet; starting from step 0")
            return
        metadata, source = checkpoints.read_metadata(path), path / checkpoints.METADATA
        self.state.check(path, metadata)
        try:
            TrainingConfig.from_json(metadata["config"])
        except (TypeError, ValueError) as error:
            raise checkpoints.CheckpointError(f"{source}: config: {error}") from error
        self._require_configuration(metadata["config"], source, OtherRunError)
        if metadata["data_fingerprint"] != self.data.fingerprint:
            raise OtherRunError(
                f"the images of {self.config.data} have changed since {path} was written "
                f"(data_fingerprint {metadata['data_fingerprint']}, now {self.data.fingerprint})"
            )
        tensors = self.state.read(path, metadata, self.config.lr)
        self.state.load(tensors, metadata)  # from here on nothing fails
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        if self.step < self.config.steps:
            self._say(f"resuming {self.directory} after step {self.step} of {self.config.steps}")
        else:
            self._say(
                f"{self.directory} has finished {self.step} steps, {self.config.steps} were asked for: "
                "nothing is left to train"
            )

    def _clean_folder(self) -> None:
        """Removes what a kill has left, and makes room for the records and checkpoints that will be written anew."""
        for folder in (self.directory, self.directory / "samples"):
            remove_abandoned(
                folder, earlier_names_after=0
            )  # the lock of the run tells: none of them is being written
        checkpoints.remove_leftovers(self.checkpoint_directory)
        self.log.truncate(self.step)
        for path in checkpoints.set_aside_after(self.checkpoint_directory, self.step):
            self._say(f"the damaged checkpoint is kept as {path}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.quiet = not tell(text, sys.stderr)


def train(
    config: TrainingConfig,
    data=None,
    directory: str | Path = "runs/model",
    *,
    resume: bool = False,
    **options,
) -> TrainingResult:
    """Trains a denoiser, or goes on with a run that was stopped: a :class:`Trainer` in one call.

    Args:
        config: what to do; ``configure`` makes one of a preset for these data.
        data, directory: see :class:`Trainer`.
        resume: see :meth:`Trainer.run`.
        **options: the other arguments of :class:`Trainer`.

    Raises:
        As :class:`Trainer` and :meth:`Trainer.run`.
    """
    return Trainer(config, directory, data=data, **options).run(resume)


def _load_data(config: TrainingConfig):
    from multistage_diffusion.data.images import load_images

    return load_images(config.data, image_size=config.image_size, values=config.values)


def _build(config: TrainingConfig) -> nn.Module:
    from multistage_diffusion.networks import build

    return build(config.network)
