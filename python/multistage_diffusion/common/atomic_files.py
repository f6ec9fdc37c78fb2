"""Files that are either complete or as they were before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what flock says of a lock that another process holds

_PREFIX = ".writing-"
_LOCK = ".writing"
_EARLIER_NAME = re.compile(r"\.writing-\d+-.+")  # of a file, with the writer's number, in earlier versions
_DAY = 24 * 60 * 60.0  # seconds; no file takes longer to write


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to; once the block has ended, its file takes the place of ``path`` in one step::

        with replacing("samples.npz") as temporary:
            np.savez(temporary, images=images)

    Whatever interrupts that, ``path`` stays as it was. The temporary file has the same name and lies in a hidden folder
    next to ``path``; an error removes it, and after a kill the next ``replacing`` in the same folder does. Missing
    folders are made. Where ``path`` is a symbolic link, the file that it leads to is replaced; the permissions of a
    file that was there are kept.

    Raises:
        OSError: the folder cannot be made or written, the disk is full, or ``path`` is a folder.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    with _locked_folder(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        flush(temporary)  # on the disk before it is under its name
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)


@contextmanager
def _locked_folder(parent: Path) -> Iterator[Path]:
    """A new hidden folder, removed at the end, with a file in it that is locked as long as its process lives."""
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            lock = _locked(folder / _LOCK)
        except OSError:
            folder.rmdir()
            raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(path: Path) -> int | None:
    """A descriptor of a new file with the lock on it; None where ``remove_abandoned`` was faster and it is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks, where age alone tells what is abandoned
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if path.exists():
        return descriptor
    os.close(descriptor)
    return None


def remove_abandoned(folder: Path, earlier_names_after: float = _DAY) -> None:
    """Removes what killed processes have left of ``replacing`` in a folder; what a process is writing stays.

    Args:
        earlier_names_after: age in seconds of the files of earlier versions, which no lock tells from those that are
            being written.
    """
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            age = time.time() - path.stat().st_mtime
            if path.is_dir():
                _remove_unless_locked(path, age)
            elif _EARLIER_NAME.fullmatch(path.name) and age >= earlier_names_after:
                path.unlink()


def _remove_unless_locked(folder: Path, age: float) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        if age > _DAY:
            folder.rmdir()  # killed before there was a lock; one that holds anything stays
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno not in LOCK_HELD and age > _DAY:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, so that it is on the disk with what will be written there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def set_aside(path: Path) -> Path:
    """Renames a file or folder to ``damaged-...``, where nothing reads or deletes it.

    Returns:
        Its new place: where there is something already, with -2, -3, ... behind.
    """
    free, number = path.with_name(f"damaged-{path.name}"), 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"damaged-{path.name}-{number}")
    return path.rename(free)


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
