"""What a training run tells: its JSONL log, its progress, and the losses in between."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from .atomic_files import replacing
from .noise_levels import NoiseLevels
from .stages import Stages
from .streams import silence, tell


class TrainingDiverged(RuntimeError):
    """A loss or a weight is NaN or infinite; the message says where."""


class LossWindow:
    """Losses since the last log record; they stay on the device until somebody asks.

    Args:
        stages: for the losses per stage.
    """

    def __init__(self, stages: Stages):
        self.stages = stages
        self.clear()

    def clear(self) -> None:
        self._entries: list[tuple[int, NoiseLevels, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, step: int, levels: NoiseLevels, losses: torch.Tensor) -> None:
        """Remembers the per-sample losses ``[B]`` of a step without reading them."""
        self._entries.append((step, levels, losses.detach()))

    def check_last(self) -> None:
        """Raises TrainingDiverged if a loss of the last step is not finite. Waits for the device."""
        _check_finite(*self._entries[-1])

    def summary(self) -> dict:
        """Mean losses of all remembered steps; one transfer from the device.

        Returns:
            "loss": the objective (importance weights included), "loss_stage": plain mean per stage or
            ``None`` where a stage had no sample, "samples_stage": samples per stage.

        Raises:
            TrainingDiverged: a loss is not finite.
        """
        losses = torch.stack([losses for _, _, losses in self._entries]).cpu().double()
        for (step, levels, _), row in zip(self._entries, losses, strict=True):
            _check_finite(step, levels, row)
        stage = torch.stack([levels.stage for _, levels, _ in self._entries]).flatten()
        weight = torch.stack([levels.weight for _, levels, _ in self._entries])
        counts = torch.bincount(stage, minlength=len(self.stages))
        sums = torch.zeros(len(self.stages), dtype=torch.float64).index_add_(0, stage, losses.flatten())
        per_stage = [s / c if c else None for s, c in zip(sums.tolist(), counts.tolist(), strict=True)]
        return {
            "loss": float((weight * losses).mean()),
            "loss_stage": per_stage,
            "samples_stage": counts.tolist(),
        }


def _check_finite(step: int, levels: NoiseLevels, losses: torch.Tensor) -> None:
    bad = ~torch.isfinite(losses).cpu()
    if not bool(bad.any()):
        return
    sigma, stage = levels.sigma[bad], levels.stage[bad].unique().tolist()
    raise TrainingDiverged(
        f"the loss of {int(bad.sum())} of {bad.numel()} samples is {float(losses[bad][0])} at step {step}: "
        f"stage {', '.join(map(str, stage))}, sigma {float(sigma.min()):.6g} to {float(sigma.max()):.6g}"
    )


class RunLog:
    """``log.jsonl``: one JSON record per line, in the order of steps."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def append(self, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate(self, step: int) -> None:
        """Drops the records after ``step`` and a torn last line, atomically."""
        if not self.path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in self.read() if record["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept))

    def read(self) -> list[dict]:
        """All complete records."""
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the line that was being written when the run was killed
                break
        return records


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds; nothing more once stderr takes no more.

    Args:
        total, done: steps of the whole run, and those already finished.
        quiet: show nothing.
        seconds_between_lines: where there is no terminal.
    """

    def __init__(self, total: int, done: int, quiet: bool = False, seconds_between_lines: float = 10.0):
        self.total, self.done, self.quiet = total, done, quiet
        self.seconds_between_lines = seconds_between_lines
        self._last_line = -math.inf
        self._bar = None
        if not quiet and sys.stderr is not None and sys.stderr.isatty():
            with self._quiet_once_lost():
                self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        self.done += 1
        if self._bar is not None:
            with self._quiet_once_lost():
                self._bar.update(1)

    def report(self, record: dict) -> None:
        """Shows a log record."""
        text = describe_record(record)
        if self._bar is not None:
            with self._quiet_once_lost():
                self._bar.set_postfix_str(text)
        elif not self.quiet and self._line_is_due():
            self.quiet = not tell(f"step {self.done}/{self.total}  {text}", sys.stderr)

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        if self.done < self.total and now - self._last_line < self.seconds_between_lines:
            return False
        self._last_line = now
        return True

    def close(self) -> None:
        if self._bar is not None:
            with self._quiet_once_lost():
                self._bar.close()

    @contextmanager
    def _quiet_once_lost(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # the terminal is gone: no reason to stop training
            silence(sys.stderr)
            self._bar, self.quiet = None, True


def describe_record(record: dict) -> str:
    """A log record in one line."""
    per_stage = " ".join("-" if v is None else f"{v:.4f}" for v in record["loss_stage"])
    return (
        f"loss {record['loss']:.4f}  stages [{per_stage}]  {record['images_per_second']:.0f} images/s  "
        f"lr {record['lr']:.2e}"
    )
