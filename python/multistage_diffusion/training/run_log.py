"""What a training run tells: its JSONL log, its progress, and the losses in between."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from multistage_diffusion.common.atomic_files import replacing, set_aside
from multistage_diffusion.common.streams import silence, tell
from multistage_diffusion.noise.noise_levels import NoiseLevels
from multistage_diffusion.noise.stages import Stages


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


class LogWarning(UserWarning):
    """A log has lines that are no records, cannot be read, or cannot be written; training goes on."""


class RunLog:
    """``log.jsonl``: one JSON record per line, in the order of steps.

    The log is a diagnostic: nothing that is wrong with it ends a run, and no line of it is lost but one that a killed
    process was writing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._unwritten: list[str] = []

    def append(self, record: dict) -> None:
        """Writes a record on a line of its own. One that cannot be written goes with the next; a warning says so."""
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            self._write("".join(self._unwritten).encode())
        except OSError as error:
            text = f"{self.path}: {len(self._unwritten)} record(s) could not be written yet: {error.strerror or error}"
            warnings.warn(text, LogWarning, stacklevel=2)
        else:
            self._unwritten.clear()

    def _write(self, lines: bytes) -> None:
        """Appends lines, all of them or nothing."""
        with self.path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                lines = lines if file.read(1) == b"\n" else b"\n" + lines
            try:
                while lines:
                    lines = lines[file.write(lines) :]
            except OSError:
                file.truncate(end)
                raise

    def truncate(self, step: int) -> None:
        """Drops the records after ``step`` and a torn last line, atomically; all other lines stay as they are.

        Warns of lines that are no records. A log that cannot be read is set aside, with a warning, too.

        Raises:
            OSError: the disk is full; the log is as it was.
        """
        if not os.path.lexists(self.path):
            return
        try:
            lines = self._lines()
        except OSError as error:
            text = f"{self.path} cannot be read ({error.strerror or error}); it is kept as {set_aside(self.path)}"
            warnings.warn(text, LogWarning, stacklevel=2)
            return
        kept = [line for line in lines if not _is_after(line, step)]
        if kept and not kept[-1].endswith(b"\n"):
            if parsed(kept[-1]) is None:
                kept.pop()
            else:
                kept[-1] += b"\n"
        if bad := sum(bool(line.strip()) and parsed(line) is None for line in kept):
            text = f"{self.path}: {bad} line(s) are no records; they are left as they are"
            warnings.warn(text, LogWarning, stacklevel=2)
        if kept != lines:
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))

    def read(self) -> list[dict]:
        """All records; lines that are none, such as one that was being written at a kill, are left out.

        Raises:
            OSError: the log cannot be read.
        """
        return [record for record in map(parsed, self._lines()) if record is not None]

    def is_empty(self) -> bool:
        """Whether nothing would be lost with the log: it is missing, or holds a torn line at most."""
        try:
            return all(not line.strip() for line in self._lines() if line.endswith(b"\n") or parsed(line))
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def _lines(self) -> list[bytes]:
        """With their ends."""
        if self.path.exists() and not self.path.is_file():  # reading a pipe would wait for its writer
            raise OSError(errno.EINVAL, "it is no file")
        with self.path.open("rb") as file:
            return file.readlines()


def parsed(line: bytes) -> dict | None:
    """The record on a line of a log; None where there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_after(line: bytes, step: int) -> bool:
    number = (parsed(line) or {}).get("step")
    return isinstance(number, int | float) and number > step


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
