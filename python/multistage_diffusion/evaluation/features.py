"""Features of images: any function of a batch, a network in a file, or Inception for the FID that papers report."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from multistage_diffusion.data.images import ImageData

Features = Callable[[Tensor], Tensor]
Images = Tensor | ImageData | Iterable[Tensor]
Progress = Callable[[int], None]

FORMS = (
    "inception, inception:WEIGHTS.pth, a TorchScript file .pt, .ts or .jit, an exported program .pt2, or "
    "MODULE:NAME, a function or a module class of Python, with NAME@WEIGHTS.safetensors its weights"
)


@torch.no_grad()
def extract(
    images: Images,
    features: Features,
    *,
    name: str = "images",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Tensor:
    """The features of all images, ``[N, D]`` on the CPU; images stay where they are, a batch at a time.

    Args:
        images: ``[N, C, H, W]``, an :class:`ImageData`, whose images are given as they are stored, or an iterable of
            batches ``[n, C, H, W]``.
        features: maps a batch, as given, to ``[n, D]`` floating point, or to what flattens to that.
        name: what errors call the images.
        batch_size: images at a time, where they are one tensor.
        progress: called with the number of images done so far.

    Raises:
        TypeError: images or features of a wrong kind or dtype.
        ValueError: no images, images of another rank or of several sizes, values or features that are NaN or infinite,
            features of another shape.
    """
    found: list[Tensor] = []
    shape, done = None, 0
    for batch in _batches(images, name, batch_size):
        shape = _checked_batch(batch, shape, name, done)
        found.append(_checked_features(features(batch), len(batch), found[0] if found else None, name, done))
        done += len(batch)
        if progress is not None:
            progress(done)
    if not found:
        raise ValueError(f"evaluate: {name} must hold at least one image, got none")
    return torch.cat(found)


def _batches(images: Images, name: str, size: int) -> Iterator[Tensor]:
    if isinstance(images, ImageData):
        images = images.images
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise ValueError(f"evaluate: {name} must be [N, C, H, W], got shape {list(images.shape)}")
        yield from (batch for batch in images.split(size) if len(batch))
    elif isinstance(images, Iterable) and not isinstance(images, str | bytes | dict):
        yield from images
    else:
        raise TypeError(
            f"evaluate: {name} must be a tensor, ImageData or an iterable of batches, got {type(images).__name__}"
        )


def _checked_batch(batch: Tensor, shape: torch.Size | None, name: str, done: int) -> torch.Size:
    if not isinstance(batch, Tensor):
        raise TypeError(f"evaluate: the batches of {name} must be tensors, got {type(batch).__name__}")
    if batch.dim() != 4 or not len(batch):
        raise ValueError(f"evaluate: the batches of {name} must be [n, C, H, W], got {list(batch.shape)}")
    if shape is not None and batch.shape[1:] != shape:
        raise ValueError(
            f"evaluate: {name} must all be of one size, got {list(shape)} and, from image {done} on, "
            f"{list(batch.shape[1:])}"
        )
    if batch.is_floating_point():
        bad = (~batch.flatten(1).isfinite().all(1)).nonzero()
        if len(bad):
            raise ValueError(
                f"evaluate: image {done + int(bad[0])} of {name} has a value that is NaN or infinite"
            )
    return batch.shape[1:]


def _checked_features(found: Tensor, count: int, first: Tensor | None, name: str, done: int) -> Tensor:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"evaluate: features must return floating-point tensors, got {what}")
    if found.dim() < 2 or len(found) != count or not found[0].numel():
        raise ValueError(
            f"evaluate: features must return [{count}, D] for {count} images of {name}, got {list(found.shape)}"
        )
    found = found.detach().flatten(1).cpu()
    if first is not None and found.shape[1] != first.shape[1]:
        raise ValueError(
            f"evaluate: features must be equally many for all images, got {first.shape[1]} and {found.shape[1]}"
        )
    bad = (~found.isfinite().all(1)).nonzero()
    if len(bad):
        raise ValueError(
            f"evaluate: the features of image {done + int(bad[0])} of {name} are NaN or infinite"
        )
    return found


def load_features(source: str | PathLike, device: torch.device | str = "cpu") -> Features:
    """A function of uint8 batches ``[n, C, H, W]`` by its name.

    Args:
        source: ``"inception"``, whose weights torch-fidelity looks for in PyTorch's cache of downloads, or
            ``"inception:FILE"``; a TorchScript file (``.pt``, ``.ts``, ``.jit``) or an exported program (``.pt2``);
            ``"package.module:name"``, a function, or a class of modules that takes no arguments, with
            ``"package.module:name@FILE.safetensors"`` its weights.
        device: where it runs.

    Raises:
        ImportError: what it needs is not installed.
        ValueError: a name that is none of these, or what it names cannot be loaded.
    """
    text = str(source)
    if text.partition(":")[0] == "inception":
        return _inception(text.partition(":")[2], device)
    suffix = Path(text).suffix
    if suffix in (".pt", ".ts", ".jit", ".pt2"):
        return _on(_of_file(Path(text)), device)
    if ":" in text:
        return _of_python(text, device)
    raise ValueError(f"features: unknown {text!r}; allowed are {FORMS}")


def _of_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"features: {path} is no file")
    try:
        return torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path).eval()
    except Exception as error:  # a damaged archive can raise nearly anything
        kind = "exported program" if path.suffix == ".pt2" else "TorchScript file"
        raise ValueError(f"features: {path} cannot be read as {kind}: {error}") from error


def _of_python(text: str, device: torch.device | str) -> Features:
    where, _, weights = text.partition("@")
    module_name, _, name = where.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {where!r} cannot be imported: {error}") from error
    if isinstance(found, type) and issubclass(found, nn.Module):
        found = found()
    if weights and not isinstance(found, nn.Module):
        raise ValueError(f"features: only a module takes weights, and {where!r} is a {type(found).__name__}")
    if not callable(found):
        raise ValueError(f"features: {where!r} must be a function or a module, got {type(found).__name__}")
    if weights:
        _load_weights(found, Path(weights))
    return _on(found.eval(), device) if isinstance(found, nn.Module) else found


def _load_weights(network: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(path))
    except Exception as error:  # of the file, or keys and shapes that do not fit
        raise ValueError(f"features: {path} does not fit {type(network).__name__}: {error}") from error


def _on(network: nn.Module, device: torch.device | str) -> Features:
    network = network.to(device)
    return lambda batch: network(batch.to(device))


def _inception(weights: str, device: torch.device | str) -> Features:
    """The 2,048 features of TensorFlow's InceptionV3, by torch-fidelity, with its own resizing."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ImportError(
            'features: inception needs torch-fidelity; install the extra: pip install "msd-kernels[evaluation]"'
        ) from error
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name))
    if not path.is_file():
        raise ValueError(
            f"features: the weights of Inception are not at {path}; fetch them from {URL_INCEPTION_V3} and put them "
            "there, or name them by inception:FILE"
        )
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    network = network.to(device).eval()

    def features(batch: Tensor) -> Tensor:
        if batch.dtype != torch.uint8:
            raise TypeError(f"features: inception takes uint8 images, got {batch.dtype}")
        rgb = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch[:, :3]
        return network(rgb.to(device))[0]

    return features
