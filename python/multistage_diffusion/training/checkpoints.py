"""Checkpoints: folders that are either complete or not there, and that execute nothing when loaded.

    runs/x/checkpoints/step-00001000/
        checkpoint.json          step, configuration, data fingerprint, scalars of the optimizer, checksums
        network.safetensors      weights in training
        ema.safetensors          averaged weights, the ones to sample with
        optimizer.safetensors    {parameter name}.exp_avg, ...

A save writes a hidden folder next to its destination, flushes it to the disk, and renames it. Whatever
interrupts that (a full disk, a kill, a power cut) leaves the checkpoints that were there as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from multistage_diffusion import networks
from multistage_diffusion.common.atomic_files import flush, make_folder, set_aside
from multistage_diffusion.common.checks import one_of
from multistage_diffusion.networks.network_limits import at_most
from multistage_diffusion.noise.preconditioning import Preconditioner, own_constants, precondition
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.training.checkpoint_schema import (
    CheckpointError,
    Kind,
    check_fields,
    check_finite,
    differences,
    in_16_bits,
    kinds,
    read_kinds,
)
from multistage_diffusion.training.config import TrainingConfig

FORMAT = 2
WITHOUT_OWN_CHECKSUM = 1  # the format before: no checksum of checkpoint.json
METADATA = "checkpoint.json"
_CHECKSUM = "sha256"
_NEEDED = ("step", "images", "seconds", "config", "optimizer", "data_fingerprint")
_NEEDED_FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"step-([0-9]{8,})")
_MAX_METADATA_BYTES = 1 << 26
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what other JSON leads to


class CheckpointSaveError(CheckpointError):
    """A checkpoint could not be written, for instance because the disk is full."""


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped because its content is damaged, or an old one could not be removed."""


# ------------------------------------------------------------------------ state of a run, as tensors and JSON


def optimizer_tensors(names: Sequence[str], optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """The state of an optimizer of one group: tensors named ``{parameter}.{entry}``, and its scalars as JSON.

    Args:
        names: of the optimizer's parameters, in its order.
    """
    state = optimizer.state_dict()
    tensors = {f"{names[i]}.{key}": v for i, entries in state["state"].items() for key, v in entries.items()}
    groups = []
    for group in state["param_groups"]:
        values = {k: v for k, v in group.items() if k != "params"}
        groups.append({**values, "params": [names[i] for i in group["params"]]})
    return tensors, {"param_groups": groups, "state": [names[i] for i in state["state"]]}


def restore_optimizer(
    names: Sequence[str], optimizer: torch.optim.Optimizer, tensors: dict, scalars: dict
) -> None:
    """The inverse of ``optimizer_tensors``, for an optimizer of one group of parameters and the same settings.

    Takes the tensors as they are: ``checkpoint_schema.check_optimizer`` tells whether they fit.

    Raises:
        CheckpointError: a parameter is unknown.
    """
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in index:
            raise CheckpointError(f"the optimizer state names {name!r}, which the network does not have")
        state.setdefault(index[name], {})[key] = value.clone()  # a read tensor's memory is the file
    (group,) = optimizer.state_dict()["param_groups"]
    group["lr"] = scalars["param_groups"][0]["lr"]
    optimizer.load_state_dict({"state": state, "param_groups": [group]})


# ---------------------------------------------------------------------------- writing


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes one safetensors file; the tensors may share memory and live anywhere."""
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file(own, path, metadata)
    except SafetensorError as error:  # it wraps what the operating system said
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(permissions)  # safetensors lets nobody else read its files


def save_checkpoint(
    directory: str | Path, step: int, tensors: dict[str, dict], metadata: dict, keep: int | None = 2
) -> Path:
    """Writes ``directory/step-########`` atomically.

    Args:
        directory: the checkpoints folder of a run; made if missing.
        step: finished training steps.
        tensors: per file ("network", "ema", ...) the tensors by name.
        metadata: JSON-able; goes into checkpoint.json.
        keep: number of newest checkpoints to keep; ``None``: all. Older ones go after the new one is
            complete; the new one stays, whatever its number.

    Returns:
        The folder. A valid checkpoint of that step which exists already is kept and returned.

    Raises:
        CheckpointSaveError: the disk is full or the folder cannot be written; older ones are untouched.
    """
    directory = Path(directory)
    final = directory / f"step-{step:08d}"
    temporary = directory / f".writing-{final.name}"
    try:
        make_folder(directory)
        remove_leftovers(directory)
        if final.exists():
            if not damage(final):
                return final
            final.rename(directory / f".damaged-{final.name}")
        temporary.mkdir()
        files = {}
        for name, group in tensors.items():
            path = temporary / f"{name}.safetensors"
            write_tensors(path, group)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            flush(path)
        content = {"format": FORMAT, "step": step, **metadata, "files": files}
        content[_CHECKSUM] = _checksum(content)
        (temporary / METADATA).write_text(json.dumps(content, indent=2) + "\n")
        flush(temporary / METADATA)
        flush(temporary)
        temporary.rename(final)
        flush(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = [path.name for path in list_checkpoints(directory)]
        newest = f"the newest checkpoint is still {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise CheckpointSaveError(f"could not save {final}: {error}; {newest}") from error
    if keep is not None:
        _prune(directory, keep, final)
    return final


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(content: dict) -> str:
    """SHA-256, in hex, of what checkpoint.json says, its own checksum left out."""
    said = json.loads(json.dumps(content))  # as a reader finds it
    said.pop(_CHECKSUM, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed process has left of checkpoints that it was writing or removing."""
    for pattern in (".writing-*", ".damaged-*", ".old-*"):
        for path in directory.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def _prune(directory: Path, keep: int, written: Path) -> None:
    for path in list_checkpoints(directory)[: -max(keep, 1)]:
        if path == written:
            continue  # the newer ones were there before: nobody has looked whether they are intact
        hidden = path.with_name(f".old-{path.name}")
        try:  # first out of sight, in one step: a kill leaves no half checkpoint under its name
            path.rename(hidden)
        except OSError as error:
            text = f"the old checkpoint {path} could not be removed: {error.strerror or error}"
            warnings.warn(text, CheckpointWarning, stacklevel=3)
        shutil.rmtree(hidden, ignore_errors=True)


def set_aside_after(directory: str | Path, step: int) -> list[Path]:
    """Renames the checkpoints after ``step`` to ``damaged-step-########``, where nothing reads or deletes them.

    For a run that goes on from ``step`` because those are damaged.

    Returns:
        Their new places.
    """
    return [set_aside(path) for path in list_checkpoints(directory) if _step_of(path) > step]


# ---------------------------------------------------------------------------- reading


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, not validated."""
    found = [p for p in Path(directory).glob("step-*") if _step_of(p) is not None and p.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int | None:
    """The step that a folder's name says; None where it is not the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint folder: a file missing, truncated or altered, checkpoint.json included, or a
    folder renamed to another step; ``None`` if intact."""
    path = Path(path)
    try:
        metadata = _description(path)
        if problem := _damage_of_metadata(metadata, _step_of(path)):
            return problem
        for name, expected in metadata["files"].items():
            if Path(name).name != name or not stat.S_ISREG((path / name).stat().st_mode):
                return f"{name} is no file of the checkpoint"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, {expected['bytes']} were written"
            if _sha256(path / name) != expected["sha256"]:
                return f"the content of {name} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror or error}"
    except _MALFORMED as error:
        return f"{METADATA} is not a checkpoint description ({type(error).__name__}: {error})"
    return None


def _damage_of_metadata(metadata: dict, step: int | None) -> str | None:
    """What is wrong with the content of checkpoint.json in a folder named after a step, or otherwise."""
    if isinstance(metadata["format"], bool):
        return f"format is {metadata['format']}, no number"
    if metadata["format"] == WITHOUT_OWN_CHECKSUM:
        missing = [key for key in _NEEDED if key not in metadata]
        missing += [name for name in _NEEDED_FILES if name not in metadata["files"]]
        if missing:
            return f"{METADATA} says nothing of {', '.join(missing)}"
    elif metadata["format"] != FORMAT:
        return f"format {metadata['format']} is neither {WITHOUT_OWN_CHECKSUM} nor {FORMAT}, which this version reads"
    elif metadata[_CHECKSUM] != _checksum(metadata):
        return f"the content of {METADATA} has changed since it was written"
    if step is not None and (isinstance(metadata["step"], bool) or metadata["step"] != step):
        return f"{METADATA} is of step {metadata['step']}, the folder is named after step {step}"
    return None


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest intact checkpoint of a folder, or ``None``. Warns of each damaged one it passes over.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    problems = []
    for path in reversed(list_checkpoints(directory)):
        problem = damage(path)
        if problem is None:
            return path
        problems.append(f"{path.name}: {problem}")
        warnings.warn(f"skipping the checkpoint {path}: {problem}", CheckpointWarning, stacklevel=2)
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoint(s) in {directory} is intact; the newest, {problems[0]}"
        )
    return None


def latest_config(directory: str | Path) -> dict | None:
    """The configuration of the newest checkpoint whose description is intact, whatever its tensors are; or ``None``."""
    for path in reversed(list_checkpoints(directory)):
        try:
            metadata = _description(path)
            if _damage_of_metadata(metadata, _step_of(path)) is None and isinstance(metadata["config"], dict):
                return metadata["config"]
        except (OSError, *_MALFORMED):
            continue
    return None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a run folder, a checkpoints folder, or a checkpoint folder itself."""
    path = Path(path)
    if (path / METADATA).is_file():
        problem = damage(path)
        if problem:
            raise CheckpointError(f"the checkpoint {path} is damaged: {problem}")
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}")
    nested = path / "checkpoints"
    found = latest_checkpoint(nested if nested.is_dir() else path)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint (expected {path}/checkpoints/step-*)")
    return found


def read_metadata(path: str | Path) -> dict:
    """The checkpoint.json of a checkpoint folder. Raises CheckpointError if it cannot be read."""
    try:
        return _description(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{Path(path) / METADATA} cannot be read: {error}") from error


def _description(path: Path) -> dict:
    size = (path / METADATA).stat().st_size
    if size > _MAX_METADATA_BYTES:
        raise ValueError(f"{size} bytes; at most {_MAX_METADATA_BYTES} are read")
    return json.loads((path / METADATA).read_text())


def read_tensors(
    path: str | Path, name: str, expected: Mapping[str, Kind] | None = None
) -> dict[str, torch.Tensor]:
    """One file of a checkpoint.

    Args:
        name: "network", "ema" or "optimizer".
        expected: for weights: what their network has; compared before anything but the file's header is read.

    Raises:
        CheckpointError: the file is missing or something else; weights that are not those expected, or not finite.
    """
    file = Path(path) / f"{name}.safetensors"
    if not file.is_file():
        raise CheckpointError(f"the checkpoint {path} has no {file.name}")
    if expected is not None:
        require_weights(read_kinds(file), expected, file)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if expected is not None:
        check_finite(tensors, file)
    return tensors


def require_weights(found: Mapping[str, Kind], expected: Mapping[str, Kind], source: str | Path) -> None:
    """Raises CheckpointError if weights differ from a network's in names, shapes or dtypes.

    It says how many do, and shows the first few.
    """
    if problems := differences(found, expected, "network"):
        raise CheckpointError(
            f"{source} was made by another network; of {len(expected)} parameters and buffers "
            f"{'; '.join(problems)}. Build the network from the checkpoint's own config: "
            f"config.network in its {METADATA}"
        )


def _expected_of(network: nn.Module, file: Path) -> dict[str, Kind]:
    """What a file of a network's weights must hold; one in float32 takes those of one in 16 bits, too."""
    return in_16_bits(kinds(network.state_dict()), read_kinds(file))


@dataclass
class LoadedModel:
    """A model ready to sample.

    Attributes:
        denoiser: D(x; sigma), in eval mode.
        step, images: how long it was trained.
        metadata: the whole checkpoint.json.
        path: the checkpoint folder.
    """

    denoiser: Preconditioner
    step: int
    images: int
    metadata: dict
    path: Path


def load_model(
    path: str | Path, weights: str = "ema", device: torch.device | str = "cpu", build=None
) -> LoadedModel:
    """The trained denoiser of a run or checkpoint folder.

    Args:
        path: a run folder (its newest intact checkpoint is taken) or a checkpoint folder.
        weights: ``"ema"`` (averaged) or ``"network"`` (as trained).
        device: where to put it.
        build: makes a network from its config; default ``multistage_diffusion.networks.build``.

    Raises:
        CheckpointError: no intact checkpoint, or one that does not fit its own configuration.
    """
    one_of("load_model", "weights", weights, ("ema", "network"))
    build = build or networks.build
    path = find_checkpoint(path)
    metadata = read_metadata(path)
    file = path / f"{weights}.safetensors"
    check_fields(metadata, ("step", "images", "config"), (file.name,), path / METADATA)
    config = metadata["config"]
    try:
        TrainingConfig.check_json(config)
        stages = Stages.from_json(config["stages"])
        arguments = networks.in_effect(config["network"])
        if build is networks.build:
            found = read_kinds(file)
            with torch.device("meta"), at_most(len(found)):  # what the weights do not fit takes no memory
                require_weights(found, _expected_of(build(arguments), file), file)
        network = build(arguments)
        schedule = config.get("schedule", "edm")  # a run of an earlier version has some of its constants only
        denoiser = precondition(network, stages, schedule, **own_constants(schedule, config))
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / METADATA}: config: {type(error).__name__}: {error}") from error
    network.load_state_dict(read_tensors(path, weights, _expected_of(network, file)))
    denoiser = denoiser.to(device).eval()
    return LoadedModel(denoiser, metadata["step"], metadata["images"], metadata, path)
