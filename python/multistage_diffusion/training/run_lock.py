"""One process at a time writes a run folder.

Not by ``filelock`` (4.3): where there is ``flock`` it does not say who has a lock, and where there is none it falls
back to a file that stays when its process is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from pathlib import Path

from multistage_diffusion.common.atomic_files import LOCK_HELD

__all__ = ["RunError", "RunLock"]


class RunError(RuntimeError):
    """A run cannot start or go on: the folder is taken, or does not fit the configuration."""


class RunLock:
    """Keeps a run folder for this process: ``flock`` on the file ``.lock`` in it.

    The operating system frees the folder when the process ends, however it ends; the file stays. As a context manager
    it releases at the end what was acquired inside.

    Args:
        directory: the run folder; made by ``acquire`` where it is missing.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory) / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the folder. On a file system without locks, and where the file cannot be opened, it only warns.

        Raises:
            RunError: another process has it; says which one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = self._open()
        except OSError as error:
            self._warn(error)
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in LOCK_HELD:
                raise RunError(
                    f"another process trains in {self.path.parent} ({holder or 'it does not say which'}); "
                    "wait for it to end, stop it, or choose another folder"
                ) from None
            self._warn(error)
            return
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's file, whose lock can be taken all the same
            return os.open(self.path, os.O_RDONLY)

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"cannot lock {self.path} ({error.strerror}): see to it that no other process trains there",
            stacklevel=3,
        )

    def release(self) -> None:
        """Lets others have the folder; nothing where it was not acquired."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error) -> None:
        self.release()
