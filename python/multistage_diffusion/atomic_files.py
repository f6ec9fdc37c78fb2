"""Files that are either complete or as they were before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to; once the block has ended, its file takes the place of ``path`` in one step::

        with replacing("samples.npz") as temporary:
            np.savez(temporary, images=images)

    Whatever interrupts that, ``path`` stays as it was. The temporary file lies in the same folder, is hidden, and has
    the same suffix; an error removes it. Missing folders are made. Where ``path`` is a symbolic link, the file that it
    leads to is replaced; the permissions of a file that was there are kept.

    Raises:
        OSError: the folder cannot be made or written, the disk is full, or ``path`` is a folder.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        yield temporary
        flush(temporary)  # on the disk before it is under its name
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_replaceable(path: str | os.PathLike, name: str) -> None:
    """Raises ValueError, in the name of an argument, where ``replacing(path)`` would fail; writes nothing.

    That is: something other than a file is there, or the nearest folder that exists cannot be written. A file that is
    write-protected is refused, too, although it could be replaced.
    """
    target = Path(path).resolve()
    if os.path.lexists(target):
        if not target.is_file():
            kind = "a folder" if target.is_dir() else "no regular file"
            raise ValueError(f"{name} {path}: is {kind}; give the name of a file")
        if not os.access(target, os.W_OK):
            raise ValueError(f"{name} {path}: the file there is write-protected; give another name")
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise ValueError(f"{name} {path}: {folder} is no folder; give a file in one")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {path}: the folder {folder} cannot be written; give a file in another one")
