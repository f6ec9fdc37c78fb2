"""Image files in folders and zip archives, decoded to one array of eight bits."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from multistage_diffusion.common.host_memory import physical_memory

T = TypeVar("T")
OpenFile = Callable[[str], tuple[AbstractContextManager[BinaryIO], int]]  # name -> file, its size in bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# What a file of this kind is read with; other readers that Pillow has may run other programs.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "GIF", "TIFF", "PPM")
LARGEST_FILE = 1 << 29
# What systems keep beside people's files; some of it are pictures.
SIDE_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


class DataError(ValueError):
    """The images given cannot be used; the message says which, why, and what would do."""


def read_folder(folder: Path, image_size: int | None) -> np.ndarray:
    """The images in a folder and below, sorted by path: `[N, C, H, W]` uint8; `data.load_images` says which.

    Raises:
        DataError: no images; a part that cannot be read or is no regular file; images that do not fit together.
    """
    return _decoded(
        folder,
        [*_files_below(folder)],
        lambda name: ((folder / name).open("rb"), (folder / name).stat().st_size),
        image_size,
    )


def read_zip(path: Path, image_size: int | None) -> np.ndarray:
    """The images in a zip file, as `read_folder` gives those of a folder."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(f"load_images: {path} cannot be read as a zip file: {error}") from error
    with archive:
        return _decoded(
            path,
            archive.namelist(),
            lambda name: (archive.open(name), archive.getinfo(name).file_size),
            image_size,
        )


def require_memory(size: int, what: str) -> None:
    """Raises DataError for something that needs more bytes than the machine has."""
    if size > (memory := physical_memory()):
        raise DataError(
            f"load_images: {what} would take {size / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} GiB; take "
            "fewer or smaller images, or one uncompressed .npy array, which stays on the disk"
        )


def _files_below(folder: Path) -> Iterator[str]:
    """Paths, relative to a folder, of the regular files in it and below; hidden ones are skipped.

    Links are followed, except those that lead back to a folder that they lie in: what is there comes anyway.
    """
    pending: list[tuple[str, frozenset]] = [("", frozenset())]
    while pending:
        parent, above = pending.pop()
        here, entries = _listed(folder, parent)
        if here in above:
            continue
        for name, is_folder in entries:
            if is_folder:
                pending.append((f"{name}/", above | {here}))
            else:
                yield name


def _listed(folder: Path, parent: str) -> tuple[tuple[int, int], list[tuple[str, bool]]]:
    """What tells a folder from all others, and its entries: their paths, and whether they are folders.

    Raises:
        DataError: it cannot be listed, or holds a broken link, or an image that is no regular file: opening a pipe
            would wait for ever.
    """
    entries = []
    try:
        status = (folder / parent).stat()
        for entry in os.scandir(folder / parent):
            name = f"{parent}{entry.name}"
            if _is_hidden(entry.name) or (
                entry.is_symlink() and _leads_nowhere(entry) and _is_side_file(name)
            ):
                continue
            if entry.is_dir() or entry.is_file():
                entries.append((name, entry.is_dir()))
            elif entry.is_symlink() or _is_image_name(name):
                raise DataError(
                    f"load_images: {name} in {folder} is a broken link or no regular file; "
                    "allowed are regular files and folders, and links to them: mend or remove it"
                )
    except OSError as error:
        raise DataError(
            f"load_images: {error.filename or parent}, a part of {folder}, cannot be read: {error.strerror}; "
            "make it readable, or remove it"
        ) from error
    return (status.st_dev, status.st_ino), entries


def _leads_nowhere(entry: os.DirEntry) -> bool:
    return not os.path.exists(entry.path)


def _is_side_file(name: str) -> bool:
    """Whether a name is that of a file that is no image, such as notes.txt."""
    return bool(re.search(r"\.[a-z][a-z0-9]{1,4}$", name.lower())) and not _is_image_name(name)


def _decoded(
    source: Path,
    names: list[str],
    open_file: OpenFile,
    image_size: int | None,
) -> np.ndarray:
    """The image files among `names`, decoded: one pass over the headers, then one over the pixels."""
    names = sorted(name for name in names if _is_image_name(name))
    if not names:
        raise DataError(
            f"load_images: {source} holds no images; allowed are {', '.join(IMAGE_SUFFIXES)} files"
        )
    headers = [_read_image(source, name, open_file, lambda image: (image.mode, image.size)) for name in names]
    size = _common_size(source, names, [size for _, size in headers], image_size)
    for name, (mode, _) in zip(names, headers, strict=True):
        if mode.startswith("I") or mode == "F":
            raise DataError(
                f"load_images: {name} in {source} has more than 8 bits per channel (mode {mode}); "
                "convert it to 8 bits, or give the images as a float .npy array"
            )
    color = "L" if all(mode in ("1", "L", "LA") for mode, _ in headers) else "RGB"
    require_memory(len(names) * len(color) * size * size, f"{len(names)} images of {size}x{size} in {source}")
    images = np.empty((len(names), len(color), size, size), np.uint8)
    for row, name in zip(images, names, strict=True):
        pixels = _read_image(source, name, open_file, lambda image: _pixels(image, color, size))
        row[:] = pixels.reshape(size, size, len(color)).transpose(2, 0, 1)
    return images


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not any(map(_is_hidden, name.split("/")))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in SIDE_FOLDERS


def _read_image(
    source: Path,
    name: str,
    open_file: OpenFile,
    read: Callable[[Image.Image], T],
) -> T:
    try:
        opened, size = open_file(name)
        with opened as file:
            if size > LARGEST_FILE:
                raise ValueError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
            with Image.open(file, formats=FORMATS) as image:
                return read(_bounded(image))
    except UnidentifiedImageError as error:
        raise DataError(f"load_images: {name} in {source} is corrupt or no image") from error
    except Exception as error:  # a damaged image can raise nearly anything, and so do archives
        raise DataError(f"load_images: {name} in {source} cannot be read: {error}") from error


def _bounded(image: Image.Image) -> Image.Image:
    """The image, of which only the header has been read, if it has no more pixels than Pillow warns of."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {most} in all")
    return image


def _pixels(image: Image.Image, color: str, size: int) -> np.ndarray:
    return np.asarray(resized(ImageOps.exif_transpose(image).convert(color), size))


def resized(
    image: Image.Image, size: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The image with sides of `size` pixels."""
    return image if image.size == (size, size) else image.resize((size, size), resampling)


def _common_size(source: Path, names: list[str], sizes: list[tuple[int, int]], image_size: int | None) -> int:
    """The side in pixels that all images have, or are to be resized to."""
    for name, (width, height) in zip(names, sizes, strict=True):
        if width != height:
            raise DataError(
                f"load_images: {name} in {source} is {width}x{height}; images must be square, crop it first"
            )
        if image_size is None and width != sizes[0][0]:
            raise DataError(
                f"load_images: images in {source} differ in size: {names[0]} is {sizes[0][0]}x{sizes[0][1]}, "
                f"{name} is {width}x{height}; give image_size to resize them all"
            )
    return sizes[0][0] if image_size is None else image_size
