"""Images to train on: the digits shipped with scikit-learn, image folders, zip files, and NumPy arrays.

`load_images` returns an `ImageData`, which keeps the images as they are stored (eight bits, or a
memory-mapped file) and hands out batches in the range [-1, 1] that the networks expect. An autoencoder's
latents, for latent diffusion, are arrays of any range and channel count, handed out as they are.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from multistage_diffusion.data.image_files import DataError, read_folder, read_zip, require_memory, resized

CHANNELS = (1, 3, 4)
VALUES = ("images", "latents")
DIGITS_IMAGE_SIZE = 16

_SCAN_BYTES = 1 << 26  # a pass over a memory-mapped file holds this much of it at a time
# Zeros deflate to a thousandth, images do not: a small archive may not fill the memory.
_LARGE_ARRAY, _MOST_DEFLATED = 1 << 30, 100


class ImageData:
    """A set of square images of one size, or of an autoencoder's latents.

    Args:
        images: `[N, C, H, W]` with H = W, kept as it is, without a copy.
            Images: uint8 in 0..255 or float32, C one of 1, 3, 4. Floats are in [-1, 1] or [0, 1], told apart
            as `load_images` says.
            Latents: float32, any finite values, any C.
        labels: `[N]` integer class labels, none below 0, or None.
        name: what messages and logs call this set.
        values: `"images"` or `"latents"`.

    Attributes:
        value_range: the lowest and highest value that an image may have: (0, 255), (0, 1) or (-1, 1); None for
            latents, which have no bounds.

    Raises:
        DataError: wrong rank, dtype, shape or range; values that are not finite; labels that do not fit; an
            unknown kind of values.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        name: str = "images",
        values: str = "images",
    ):
        _check_values(values, "ImageData")
        self.name, self.values = name, values
        self._stored = _checked_images(images, name, values)
        self._labels = _checked_labels(labels, len(images), name)
        self._index: torch.Tensor | None = None
        self.value_range = _value_range(images, name, values)

    @property
    def images(self) -> torch.Tensor:
        """`[N, C, H, W]`, uint8 or float32, as stored: `value_range` tells the range.

        A part made by `split` gathers its images here, which copies them; `sample` copies only a batch.
        """
        return self._stored if self._index is None else self._stored[self._index]

    @property
    def labels(self) -> torch.Tensor | None:
        """`[N]` int64 class labels, or None."""
        if self._labels is None or self._index is None:
            return self._labels
        return self._labels[self._index]

    @property
    def num_images(self) -> int:
        return len(self._stored) if self._index is None else len(self._index)

    @property
    def channels(self) -> int:
        return self._stored.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width, in pixels."""
        return self._stored.shape[2]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of shape, dtype, range, pixels (in NCHW order) and labels; the name plays no part.

        The first access reads every image.
        """
        shape = (self.num_images, *self._stored.shape[1:])
        digest = hashlib.sha256(repr((shape, str(self._stored.dtype), self.value_range)).encode())
        for start in range(0, self.num_images, self._chunk):
            index = torch.arange(start, min(start + self._chunk, self.num_images))
            digest.update(self._gather(index).contiguous().numpy())
        if self.labels is not None:
            digest.update(b"labels")
            digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()

    def sample(self, indices: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        """The images at `indices`, ready for a network.

        Args:
            indices: `[B]` integers in 0..N-1, in any order; repeats are allowed.

        Returns:
            `[B, C, H, W]` float32, contiguous. Images are in [-1, 1], eight-bit values become
            `value / 127.5 - 1`; latents are as they were given.

        Raises:
            TypeError: indices that are not integers.
            DataError: indices of another rank, or outside 0..N-1.
        """
        index = torch.as_tensor(indices)
        if index.numel() == 0:
            index = index.to(torch.int64)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"ImageData.sample: indices of {self.name} must be integers, got {index.dtype}")
        if index.ndim != 1:
            raise DataError(f"ImageData.sample: indices must be [B], got shape {list(index.shape)}")
        index = index.to("cpu", torch.int64)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.num_images):
            raise DataError(
                f"ImageData.sample: {self.name} has images 0..{self.num_images - 1}, "
                f"got indices {int(index.min())}..{int(index.max())}"
            )
        batch = self._gather(index).to(torch.float32, memory_format=torch.contiguous_format)
        if self.value_range in (None, (-1.0, 1.0)):
            return batch
        return batch.div_(self.value_range[1] / 2).sub_(1)

    def split(self, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
        """Two disjoint parts, drawn at random: `round(fraction * N)` images, and the rest. Copies no image.

        Args:
            fraction: share of the first part, strictly between 0 and 1.
            seed: the same seed gives the same parts; it leaves PyTorch's global generator alone.

        Raises:
            DataError: a fraction outside (0, 1), or one that leaves a part empty.
        """
        count = round(fraction * self.num_images) if 0 < fraction < 1 else 0
        if not 0 < count < self.num_images:
            raise DataError(
                f"ImageData.split: fraction={fraction} of the {self.num_images} images of {self.name} "
                "must leave at least one image in each part"
            )
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed))
        return self._part(order[:count]), self._part(order[count:])

    def __len__(self) -> int:
        return self.num_images

    def __repr__(self) -> str:
        size = f"{self.channels}x{self.image_size}x{self.image_size}"
        return f"ImageData({self.name!r}, {self.num_images} {self.values} {size}, {self._stored.dtype})"

    @property
    def _chunk(self) -> int:
        return _images_per_chunk(self._stored)

    def _gather(self, index: torch.Tensor) -> torch.Tensor:
        return self._stored[index if self._index is None else self._index[index]]

    def _part(self, index: torch.Tensor) -> ImageData:
        part = object.__new__(ImageData)
        part.name, part.values, part.value_range = self.name, self.values, self.value_range
        part._stored, part._labels = self._stored, self._labels
        part._index = (index if self._index is None else self._index[index]).sort().values
        return part


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], as `ImageData.sample` gives them, in eight bits; what lies beyond is clipped."""
    return (images * 127.5 + 128).clamp(0, 255).byte()


def load_images(
    source: str | os.PathLike, *, image_size: int | None = None, values: str = "images"
) -> ImageData:
    """Load a set of square images of one size, or of latents.

    Args:
        source: one of
            `"digits"`: the 1,797 handwritten digits inside scikit-learn (8x8, resized to 16x16 unless
                `image_size` says otherwise), one channel, with labels. A folder of that name is `"./digits"`.
            a folder: its png, jpg, jpeg, bmp and webp files, found recursively, sorted by path. Links are
                followed, but for those back to a folder that they lie in.
            a `.zip` file: the same, read without unpacking.
            a `.npy` file: one array, memory-mapped.
            a `.npz` file: the array `images`, or the only array; and optionally `labels`, `[N]` integers,
                none below 0.
        image_size: height and width in pixels. Images in folders and zip files are resized to it (Lanczos,
            image by image), and so are the digits (bicubic); arrays are not, and must have this size.
        values: `"images"`, or `"latents"`: what an autoencoder made of images, in a `.npy` or `.npz` file.

    Images in folders and zip files become uint8: one channel where every file is greyscale, otherwise RGB.
    Alpha is dropped, EXIF orientation applied; hidden files are skipped, and so is what systems keep beside people's
    files (`image_files.SIDE_FOLDERS`). Other files are not opened, whatever is wrong with them.

    Arrays are `[N, C, H, W]` or `[N, H, W, C]` with H = W and C one of 1, 3, 4. The channel axis is the one
    that leaves two equal axes; where both readings are possible (`[N, 3, 3, 3]`), the array is refused.
    Arrays are uint8 in 0..255, or floating point: in [0, 1] where no value is negative, in [-1, 1] where the
    lowest is below -0.5; one whose lowest value lies between is refused, for it may be a [0, 1] array that
    overshoots. uint8 and float32 are used in place; other floating-point types are converted to float32,
    which copies them.

    Latents are floating-point arrays `[N, C, H, W]`, channels first, with H = W and any C; the array of an
    `.npz` file is `latents`, or the only one besides `labels`. Their values are any finite numbers and stay
    as they are, so scale them before to the standard deviation that the network is made for.

    Raises:
        DataError: the source is missing, empty, corrupt or of an unknown kind; a part of a folder cannot be
            read, is a broken link or no regular file; images are not square or differ in size; labels are no
            classes; an array has another dtype, rank or range, is not finite, or holds Python objects (pickles
            are never loaded); an image has more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, a set more bytes than
            the machine has memory, an archive's array a hundred times more than the archive and over 1 GiB.
        TypeError: a source that is no path, or an `image_size` that is no integer.
        ImportError: `"digits"` without scikit-learn.
    """
    _check_image_size(image_size)
    _check_values(values, "load_images")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f'load_images: source must be "digits" or a path, got {type(source).__name__}')
    array_loader = {".npy": _load_npy, ".npz": _load_npz}.get(Path(source).suffix.lower())
    if values == "latents" and array_loader is None:
        raise DataError(
            f"load_images: latents are floating-point arrays in a .npy or .npz file, got {os.fspath(source)!r}"
        )
    if source in LOADERS:
        return LOADERS[source](image_size)
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"load_images: {path} does not exist; "
            'allowed are "digits", a folder of images, and .zip, .npy and .npz files'
        )
    if path.is_dir():
        return _of_files(path, read_folder(path, image_size))
    if not path.is_file():
        raise DataError(f"load_images: {path} is neither a folder nor a regular file")
    if array_loader is not None:
        return array_loader(path, image_size, values)
    if path.suffix.lower() != ".zip":
        raise DataError(
            f"load_images: {path} is a {path.suffix or 'suffix-less'} file; "
            'allowed are "digits", a folder of images, and .zip, .npy and .npz files'
        )
    return _of_files(path, read_zip(path, image_size))


def _of_files(path: Path, images: np.ndarray) -> ImageData:
    return ImageData(torch.from_numpy(images), name=path.stem)


def _load_digits(image_size: int | None) -> ImageData:
    image_size = DIGITS_IMAGE_SIZE if image_size is None else image_size
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'load_images: "digits" needs scikit-learn; install the extra: pip install "msd-kernels[digits]"'
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # Lanczos would leave ripples around the strokes: the digits are usually enlarged.
    enlarged = [resized(Image.fromarray(image), image_size, Image.Resampling.BICUBIC) for image in pixels]
    images = np.stack([np.asarray(image) for image in enlarged])
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return ImageData(torch.from_numpy(images[:, None]), labels, name="digits")


# Data sets by name, as ``source``; each is made for an image size, or its own where that is None.
LOADERS: dict[str, Callable[[int | None], ImageData]] = {"digits": _load_digits}


def _load_npy(path: Path, image_size: int | None, values: str) -> ImageData:
    try:
        # Copy on write: PyTorch wants writable memory, and the file is never written.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # a damaged file can raise nearly anything
        raise _array_error(path, error) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"load_images: {path} is an .npz archive; rename it to .npz")
    return _image_data(array, None, path, image_size, values)


def _load_npz(path: Path, image_size: int | None, values: str) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as archive:
            key = _array_key(archive.files, path, values)
            names = [name for name in (key, "labels") if name in archive.files]
            _require_room(path, names)
            images, labels = archive[key], archive["labels"] if "labels" in names else None
    except DataError:
        raise
    except Exception as error:  # as above; and an .npy under this name has no `files`
        raise _array_error(path, error) from error
    return _image_data(images, labels, path, image_size, values)


def _require_room(path: Path, names: list[str]) -> None:
    """Raises DataError for arrays of an archive that would not fit into memory, or are far larger than their file."""
    with zipfile.ZipFile(path) as archive:
        found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    for name in names:
        size, packed = found[name].file_size, found[name].compress_size
        require_memory(size, f"the array {name} of {path}")
        if size > _LARGE_ARRAY and size > _MOST_DEFLATED * packed:
            raise DataError(
                f"load_images: the array {name} of {path} is of {size:,} bytes, deflated to {packed:,}, as no images "
                "are; save it with numpy.savez, or as .npy, if it is meant so"
            )


def _array_key(names: list[str], path: Path, values: str) -> str:
    others = [name for name in names if name != "labels"]
    if values in others:
        return values
    if len(others) != 1:
        raise DataError(
            f"load_images: {path} must hold an array `{values}`, or one array besides `labels`; "
            f"it holds {names}"
        )
    return others[0]


def _array_error(path: Path, error: Exception) -> DataError:
    return DataError(
        f"load_images: {path} cannot be read as a {path.suffix} file of plain numbers: {error} "
        "(pickles and object arrays are never loaded)"
    )


def _image_data(
    array: np.ndarray, labels: np.ndarray | None, path: Path, image_size: int | None, values: str
) -> ImageData:
    array = _supported_dtype(array, path, values)
    array = _to_nchw(array, path) if values == "images" else _checked_latents(array, path)
    size = array.shape[-1]
    if image_size is not None and size != image_size:
        raise DataError(
            f"load_images: {path} holds {values} of {size}x{size}, given image_size={image_size}; "
            "arrays are not resized"
        )
    if labels is not None:
        if labels.dtype.kind not in "iu":
            raise DataError(f"load_images: labels in {path} must be integers, got {labels.dtype}")
        labels = torch.from_numpy(labels.astype(labels.dtype.newbyteorder("=")))
    return ImageData(torch.from_numpy(array), labels, name=path.stem, values=values)


def _supported_dtype(array: np.ndarray, path: Path, values: str) -> np.ndarray:
    """Images in uint8 and float32 arrays as they are, other floating-point ones as float32."""
    if array.dtype == np.float32 or (array.dtype == np.uint8 and values == "images"):
        return array
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    allowed = "uint8 in 0..255, and floating point in [0, 1] or [-1, 1]"
    if values == "latents":
        allowed = "floating point, for latents"
    raise DataError(f"load_images: {path} holds {array.dtype} values; allowed are {allowed}")


def _checked_latents(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim != 4 or array.shape[2] != array.shape[3]:
        raise DataError(
            f"load_images: {path} has shape {list(array.shape)}; allowed for latents is [N, C, H, W], channels first, "
            "with H = W"
        )
    return array


def _to_nchw(array: np.ndarray, path: Path) -> np.ndarray:
    """View `[N, C, H, W]` or `[N, H, W, C]` as `[N, C, H, W]`; refuse what is neither, or could be both."""
    if array.ndim != 4:
        raise DataError(
            f"load_images: {path} must hold a 4-dimensional array, [N, C, H, W] or [N, H, W, C]; "
            f"got shape {list(array.shape)}"
        )
    _, first, second, third = array.shape
    channels_first = first in CHANNELS and second == third
    channels_last = third in CHANNELS and first == second
    if channels_first and channels_last:
        raise DataError(
            f"load_images: {path} of shape {list(array.shape)} could be [N, C, H, W] or [N, H, W, C]; "
            "use images of another size"
        )
    if not channels_first and not channels_last:
        raise DataError(
            f"load_images: {path} has shape {list(array.shape)}; allowed are [N, C, H, W] and [N, H, W, C] "
            f"with square images (H = W) and C one of {CHANNELS}"
        )
    return array if channels_first else array.transpose(0, 3, 1, 2)


def _check_image_size(image_size: int | None) -> None:
    if image_size is None:
        return
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise TypeError(f"load_images: image_size must be an integer, got {image_size!r}")
    if image_size < 1:
        raise DataError(f"load_images: image_size must be at least 1, got {image_size}")


def _check_values(values: str, caller: str) -> None:
    if values not in VALUES:
        raise DataError(f"{caller}: values must be one of {', '.join(VALUES)}, got {values!r}")


def _checked_images(images: torch.Tensor, name: str, values: str) -> torch.Tensor:
    latents = values == "latents"
    dtypes = (torch.float32,) if latents else (torch.uint8, torch.float32)
    if images.dtype not in dtypes:
        allowed = "float32, for latents" if latents else "uint8 or float32"
        raise DataError(f"ImageData: {name} must be {allowed}, got {images.dtype}")
    square = images.ndim == 4 and images.shape[2] == images.shape[3]
    if not square or (images.shape[1] not in CHANNELS and not latents):
        allowed = "H = W" if latents else f"H = W and C one of {CHANNELS}"
        raise DataError(
            f"ImageData: {name} must be [N, C, H, W] with {allowed}, got shape {list(images.shape)}"
        )
    if images.numel() == 0:
        raise DataError(f"ImageData: {name} holds no {values}, its shape is {list(images.shape)}")
    return images


def _checked_labels(labels: torch.Tensor | None, num_images: int, name: str) -> torch.Tensor | None:
    if labels is None:
        return None
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (num_images,):
        raise DataError(
            f"ImageData: labels of {name} must be {num_images} integers, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    classes = labels.to(torch.int64)
    bad = (classes < 0).nonzero()
    if len(bad):
        first = int(bad[0])
        raise DataError(
            f"ImageData: {len(bad)} of the labels of {name} are no classes, label {first} is {labels.numpy()[first]}; "
            "allowed are 0 to 2^63 - 1, so leave unlabelled images out, or all labels"
        )
    return classes


def _images_per_chunk(images: torch.Tensor) -> int:
    return max(1, _SCAN_BYTES // (images[0].numel() * images.element_size()))


def _value_range(images: torch.Tensor, name: str, values: str) -> tuple[float, float] | None:
    """(0, 255) for uint8; for floats (0, 1) or (-1, 1), as `load_images` tells them apart; None for latents."""
    if images.dtype == torch.uint8:
        return 0.0, 255.0
    low, high = _finite_extremes(images, name, values.removesuffix("s"))
    if values == "latents":
        return None
    if low < -1 or high > 1:
        raise DataError(
            f"ImageData: floats of {name} must lie in [0, 1] or [-1, 1], got {low:.6g} to {high:.6g}"
        )
    if -0.5 <= low < 0:
        raise DataError(
            f"ImageData: the lowest value of {name} is {low:.6g}, which fits neither [0, 1] nor [-1, 1]; "
            "clip the values at 0, or scale them to [-1, 1]"
        )
    return (-1.0, 1.0) if low < 0 else (0.0, 1.0)


def _finite_extremes(images: torch.Tensor, name: str, what: str) -> tuple[float, float]:
    """The lowest and the highest value; raises DataError for one that is not finite."""
    low, high = np.inf, -np.inf
    step = _images_per_chunk(images)
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        chunk_low, chunk_high = (float(value) for value in torch.aminmax(chunk))
        if not np.isfinite(chunk_low) or not np.isfinite(chunk_high):
            bad = int((~chunk.isfinite()).flatten(1).any(1).nonzero()[0])
            raise DataError(f"ImageData: {what} {start + bad} of {name} has a value that is NaN or infinite")
        low, high = min(low, chunk_low), max(high, chunk_high)
    return low, high
