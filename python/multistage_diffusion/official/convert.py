"""Reads the checkpoint files of the published models; what they become is saved and loaded by ``network_files``.

EDM's ``.pkl`` goes through a restricted unpickler (``official.pickles``), score SDE's ``.pth`` and latent diffusion's
``.ckpt`` through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import mmap
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from multistage_diffusion import networks, official
from multistage_diffusion.common.checks import one_of
from multistage_diffusion.official import denoisers, irregular
from multistage_diffusion.official.denoisers import ReferenceCheckpoint
from multistage_diffusion.official.network_files import load_denoiser, load_network, save_network
from multistage_diffusion.official.pickles import (
    CheckpointFileError,
    Record,
    read_pickle,
    record_tensors,
    screen_pickles,
)
from multistage_diffusion.presets import find

__all__ = [
    "CheckpointFileError",
    "ReferenceCheckpoint",
    "load_denoiser",
    "load_network",
    "network_of",
    "read",
    "save_network",
]

WEIGHTS = ("ema", "raw")
MOST_ITEMS = 500
LDM_PREFIX, LDM_EMA_PREFIX, LDM_CLASSES, LDM_BETAS = (
    "model.diffusion_model.",
    "model_ema.",
    "cond_stage_model.embedding.weight",
    "betas",
)
ZIP_START, PICKLE = b"PK\x03\x04", "data.pkl"
# Of the weights' bytes in relation to the file's: some layers are saved under several names.
MOST_COPIES, SLACK = 2, 1 << 20


def read(path: str | Path, weights: str = "ema") -> ReferenceCheckpoint:
    """Reads a checkpoint of EDM (``.pkl``), score SDE or U-ViT (``.pth``) or latent diffusion (``.ckpt``).

    Args:
        path: the file.
        weights: ``"ema"`` (averaged) or ``"raw"`` (as trained), where the file has both.

    Raises:
        CheckpointFileError: the file wants to run code (the message names what), is truncated, has no network in it, or
            would become far larger in memory than it is.
        ValueError: ``weights`` is neither, or the file lacks them.
        OSError: the file cannot be read.
    """
    path = Path(path)
    one_of("convert", "weights", weights, WEIGHTS)
    with path.open("rb") as file:  # here, so that a missing file is an OSError, whatever reads it then
        head = file.read(1024)
    _refuse_text(head, path)
    is_zip = head.startswith(ZIP_START) or zipfile.is_zipfile(path)
    found = _read(path, weights, is_zip)
    size, limit = sum(t.numel() * t.element_size() for t in found.tensors.values()), path.stat().st_size
    if size > MOST_COPIES * limit + SLACK:
        raise CheckpointFileError(
            f"{path}: the weights would take {size:,} bytes, the file has {limit:,}: many names share the same values"
        )
    return found


def _read(path: Path, weights: str, is_zip: bool) -> ReferenceCheckpoint:
    if path.suffix == ".pkl" and not is_zip:
        return _from_records(read_pickle(path), weights, path)
    _screened(path, is_zip)
    content = _load_tensors(path)
    if not isinstance(content, Mapping):
        raise CheckpointFileError(f"{path} holds no dictionary of weights, but a {type(content).__name__}")
    if "state_dict" in content:
        return _from_ldm(content["state_dict"], weights, path)
    if isinstance(content.get("model"), Mapping):
        return _from_score_sde(content, weights, path)
    if not any(isinstance(value, Tensor) for value in content.values()):
        names = (
            ", ".join(official.shown(name) for name in list(content)[:6] if isinstance(name, str))
            or "nothing"
        )
        raise CheckpointFileError(
            f"{path}: unknown layout; expected tensors by name, or one of the entries model and ema (score SDE), "
            f"state_dict (latent diffusion); got {names}"
        )
    tensors = _named_tensors(content, "the file", path)
    return ReferenceCheckpoint(_without_prefix(tensors, "module."), None, "the only ones")


def _refuse_text(head: bytes, path: Path) -> None:
    """Says what a file of text is that was taken for a checkpoint."""
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer, which stands for the file: fetch it with git lfs pull"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "a web page: download the file itself"
    elif not head:
        found = "empty: copy it again"
    elif not re.search(rb"[^\x09-\x0d\x20-\x7e]", head):
        found = "text: copy it again"
    else:
        return
    raise CheckpointFileError(f"{path} is no checkpoint, but {found}")


def _screened(path: Path, is_zip: bool) -> None:
    """Raises where what PyTorch is to read would become far larger than the file.

    Its zip files hold the records as they are: packed ones may be of any size. The pickles are screened, too: one in a
    zip file, and the fourth in a file of the format before, behind three that describe the format.
    """
    try:
        if not is_zip:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                screen_pickles(content, len(content), 4)
            return
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _require_unpacked(path, records)
            for record in records:
                if record.filename.lower().endswith(PICKLE):  # PyTorch finds it whatever its case
                    screen_pickles(io.BytesIO(archive.read(record)), record.file_size)
    except CheckpointFileError as error:
        raise CheckpointFileError(f"{path}: {error}") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        raise CheckpointFileError(
            f"{path} is truncated or no PyTorch checkpoint ({_reason(error)}); copy it again"
        ) from None


def _require_unpacked(path: Path, records: Sequence[zipfile.ZipInfo]) -> None:
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise CheckpointFileError(
            f"its record {official.shown(packed[0])} is compressed, which PyTorch's records are not; save the weights "
            "again with torch.save"
        )
    size, limit = sum(record.file_size for record in records), path.stat().st_size
    if size > limit:
        raise CheckpointFileError(f"its records claim {size:,} bytes, but the file has {limit:,}")


def _load_tensors(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)|Trying to (?:call reduce for|instantiate) .*?([\w.]+)", text)
        if refused is not None:
            raise CheckpointFileError(
                f"{path}: refused: the file asks for {refused[1] or refused[2]}, which is no builder of tensors or "
                "containers; nothing was run. Save its state dict alone if you trust it"
            ) from None
        raise CheckpointFileError(
            f"{path} is truncated or no PyTorch checkpoint ({_reason(error)}); copy it again"
        ) from None


def _reason(error: Exception) -> str:
    """PyTorch's reason in one line, without its advice to load what it refuses."""
    own = re.search(r"WeightsUnpickler error: (.*)", str(error))
    line = own[1] if own else next(iter(str(error).strip().splitlines()), "")
    return type(error).__name__ if not line or "weights" in line.lower() else line


def _named(found: object, where: str, path: Path) -> Mapping[str, object]:
    """Checks that something is a dictionary by name."""
    if not isinstance(found, Mapping):
        raise CheckpointFileError(
            f"{path}: {where} is of the type {type(found).__name__}, not tensors by name"
        )
    for name in found:
        if not isinstance(name, str):
            raise CheckpointFileError(
                f"{path}: {where} has a name of the type {type(name).__name__}, not text"
            )
    return found


def _named_tensors(found: object, where: str, path: Path) -> dict[str, Tensor]:
    """Checks that something is a dictionary of dense tensors by name."""
    for name, tensor in _named(found, where, path).items():
        if reason := irregular(tensor):
            raise CheckpointFileError(
                f"{path}: {official.shown(name)} in {where} {reason}; weights are dense floating point tensors"
            )
    return dict(found)


def _from_records(content: object, weights: str, path: Path) -> ReferenceCheckpoint:
    """EDM's snapshots are ``{"ema": network, ...}``, a network being a preconditioner around the U-Net."""
    key = "ema" if weights == "ema" else "net"
    if isinstance(content, Mapping) and isinstance(content.get(key), Record):
        record = content[key]
    elif isinstance(content, Mapping) and any(isinstance(content.get(k), Record) for k in ("ema", "net")):
        raise ValueError(f"{path} has no {weights} weights; choose the other of {', '.join(WEIGHTS)}")
    elif isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        return ReferenceCheckpoint(_named_tensors(content, "the file", path), None, "the only ones")
    else:
        raise CheckpointFileError(f"{path} holds no network: expected an EDM snapshot with the entry {key}")
    inner = record.entries("_modules").get("model")
    said, unknown = None, None
    if isinstance(inner, Record):
        try:
            said = denoisers.of_record(record)
        except ValueError as error:
            raise CheckpointFileError(f"{path}: {error}") from None
        unknown = None if said else f"a preconditioner of the class {official.shown(record.class_name)}"
        record = inner
    config = record.entries("_init_kwargs")
    _require_plain(config, path)
    tensors = _named_tensors(dict(record_tensors(record)), f"the network {key}", path)
    return ReferenceCheckpoint(tensors, dict(config) or None, weights, said, unknown)


def _require_plain(config: Mapping, path: Path) -> None:
    """Raises unless a network's arguments are few and plain: a pickle can hold lists that no memory could show."""
    left = MOST_ITEMS
    for name, value in _named(config, "the network's arguments", path).items():
        left = _left_after(value, left - 1)
        if left < 0:
            raise CheckpointFileError(
                f"{path}: the network's argument {official.shown(name)} is neither a number nor short text or a "
                "short list"
            )


def _left_after(value: object, left: int, depth: int = 3) -> int:
    """How many more items may come after a plain value, if ``left`` may; negative for anything else."""
    if isinstance(value, (list, tuple)) and depth > 0:
        for item in value:
            if left < 0:
                break
            left = _left_after(item, left - 1, depth - 1)
        return left
    small = isinstance(value, int) and abs(value) < 2**63
    plain = small or isinstance(value, (float, type(None))) or (isinstance(value, str) and len(value) <= 1000)
    return left if plain else -1


def _from_ldm(state: Mapping[str, Tensor], weights: str, path: Path) -> ReferenceCheckpoint:
    """Averaged weights are named as the raw ones, but without their dots."""
    state = _named(state, "state_dict", path)
    raw = {name[len(LDM_PREFIX) :]: name for name in state if name.startswith(LDM_PREFIX)}
    if not raw:
        raise CheckpointFileError(f"{path} holds no U-Net: no name begins with {LDM_PREFIX}")
    if weights == "ema":
        raw = {own: LDM_EMA_PREFIX + name[len("model.") :].replace(".", "") for own, name in raw.items()}
        if not all(name in state for name in raw.values()):
            raise ValueError(f"{path} has no averaged weights for every parameter; choose the raw weights")
    found = {own: state[name] for own, name in raw.items()}
    if LDM_CLASSES in state:
        found[LDM_CLASSES] = state[LDM_CLASSES]
    said = denoisers.of_betas(state[LDM_BETAS]) if LDM_BETAS in state else None
    unknown = "betas that are not all between 0 and 1" if said is None and LDM_BETAS in state else None
    return ReferenceCheckpoint(_named_tensors(found, "state_dict", path), None, weights, said, unknown)


def _from_score_sde(content: Mapping, weights: str, path: Path) -> ReferenceCheckpoint:
    """Averaged weights are a list in the order of the model's parameters, those of shared modules once."""
    found = _without_prefix(_named_tensors(content["model"], "model", path), "module.")
    if weights == "raw":
        return ReferenceCheckpoint(found, None, weights)
    averaged = content.get("ema")
    averaged = averaged.get("shadow_params") if isinstance(averaged, Mapping) else None
    if averaged is None:
        raise ValueError(f"{path} has no averaged weights (ema.shadow_params); choose the raw weights")
    if not isinstance(averaged, (list, tuple)) or any(map(irregular, averaged)):
        raise CheckpointFileError(f"{path}: ema.shadow_params is no list of dense floating point tensors")
    owners: dict[int, list[str]] = {}
    for name, tensor in found.items():
        if name != "sigmas":
            owners.setdefault(tensor.data_ptr(), []).append(name)
    shapes = [found[names[0]].shape for names in owners.values()]
    if shapes != [tensor.shape for tensor in averaged]:
        raise CheckpointFileError(
            f"{path}: its {len(averaged)} averaged tensors do not match its {len(shapes)} parameters; "
            "choose the raw weights"
        )
    for names, tensor in zip(owners.values(), averaged, strict=True):
        found |= dict.fromkeys(names, tensor)
    return ReferenceCheckpoint(found, None, weights)


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What ``torch.nn.DataParallel`` puts before every name is cut off."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def network_of(
    checkpoint: ReferenceCheckpoint,
    family: str,
    config: Mapping[str, object] | None,
    preset: str | None = None,
) -> nn.Module:
    """Builds and fills the network of a reference checkpoint.

    Args:
        family: of the checkpoint.
        config: the reference constructor's arguments; default: those in the file.
        preset: a published configuration instead, which must be of the same family.

    Raises:
        ValueError: neither the file nor the caller knows the configuration, or it does not fit the parameters.
    """
    if preset is not None:
        own = _preset_config(preset, family, checkpoint.tensors)
        return official.made(lambda: networks.build(own), checkpoint.tensors)
    config = config or checkpoint.config
    if config is None:
        raise ValueError(
            "convert: the file does not say how its network was built; give --config with the reference's "
            "constructor arguments as JSON, or --preset"
        )
    outside = official.FAMILIES[family].outside if family in official.FAMILIES else {}
    shown = {
        name: _size_of(checkpoint.tensors, *at) for name, at in outside.items() if at[0] in checkpoint.tensors
    }
    return official.load(checkpoint.tensors, family, {**shown, **config})


def _size_of(tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    """The size of a matrix in one dimension; 0 without such a matrix."""
    matrix = tensors.get(name)
    return matrix.shape[dim] if matrix is not None and matrix.dim() == 2 else 0


def _preset_config(name: str, family: str, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The preset as the reference builds it: unified where the names show one decoder."""
    preset = find(name)
    if preset.network["family"] != family:
        raise ValueError(f"convert: preset {name} is of the family {preset.network['family']}, not {family}")
    stages = {int(match[1]) for key in tensors if (match := re.match(r"(?:decs|de_modules)\.(\d+)\.", key))}
    sizes = official.FAMILIES[family].sizes
    changes = {**preset.reference, **{name: _size_of(tensors, *at) for name, at in sizes.items()}}
    if any(key.startswith(("dec.", "all_modules.")) for key in tensors):  # the original EDM or score SDE
        changes["max_groups"] = 32
    return preset.config("multistage" if len(stages) > 1 else "unified", **changes)
