"""Networks in one file each, together with how they become denoisers; reading one executes nothing.

A file holds the weights and, as text in its header, the network's configuration and the denoiser's description: its
preconditioning, constants and stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multistage_diffusion import networks
from multistage_diffusion.common.atomic_files import replacing
from multistage_diffusion.networks.network_limits import at_most
from multistage_diffusion.noise.preconditioning import (
    EDMPreconditioner,
    Preconditioner,
    as_json,
    differences,
    from_json,
    precondition,
    require_known,
    said_of,
    stages_in_sigma,
)
from multistage_diffusion.noise.stages import Stages
from multistage_diffusion.official import summary
from multistage_diffusion.official.pickles import CheckpointFileError
from multistage_diffusion.training import checkpoints
from multistage_diffusion.training.checkpoints import write_tensors

__all__ = ["CheckpointFileError", "load_denoiser", "load_network", "read_descriptions", "save_network"]

FORMAT = "multistage_diffusion.network"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names the types that a network's weights have


def save_network(
    path: str | Path, model: nn.Module | Preconditioner, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a network to one ``.safetensors`` file; see :func:`load_network` and :func:`load_denoiser`.

    Missing folders are made. An error leaves a file that was there as it was.

    Args:
        path: of the file.
        model: a denoiser, whose preconditioning and stages are written, too; or a network alone. One that was read
            from a file keeps what that file said.
        notes: more texts for the file's header, by name.

    Raises:
        OSError: the disk is full, or the folder cannot be made or written.
    """
    network = model.network if isinstance(model, Preconditioner) else model
    description = model.to_json() if isinstance(model, Preconditioner) else said_of(network)
    metadata = {"format": FORMAT, "config": json.dumps(network.config), **(notes or {})}
    if description is not None:
        metadata["denoiser"] = json.dumps(description)
    with replacing(path) as temporary:
        write_tensors(temporary, network.state_dict(), metadata)


def load_network(path: str | Path, weights: str = "ema") -> nn.Module:
    """The network of a file that ``msd convert`` wrote, or of a run of ``msd train``, on the CPU, in evaluation mode.

    It is told the noise as its own denoiser tells it, which :func:`load_denoiser` gives. Another preconditioner around
    it is refused, unless you set ``network.preconditioning = None``.

    Args:
        path: a ``.safetensors`` file; or the folder of a run or of a checkpoint, or a file of weights in the latter.
        weights: of a folder: ``"ema"`` (averaged) or ``"network"`` (as trained).

    Raises:
        CheckpointFileError: the file is truncated, was written by something else, or its configuration does not fit
            its tensors. Nothing larger than the file is built before they are compared.
        CheckpointError: the run has no intact checkpoint.
        OSError: the file cannot be read.
    """
    run = _checkpoint_of(Path(path), weights)
    return _read(Path(path))[0] if run is None else _denoiser_of_run(*run).network


def load_denoiser(
    path: str | Path,
    *,
    weights: str = "ema",
    preconditioning: str | None = None,
    stages: Stages | None = None,
    **constants: object,
) -> Preconditioner:
    """D(x; sigma) of a file that ``msd convert`` wrote, or of a run of ``msd train``, in evaluation mode.

    Called as ``denoiser(x, sigma, stage=None, **conditioning)``; see ``Preconditioner``. Preconditioning, constants and
    stages are the file's own.

    Args:
        path, weights: as of :func:`load_network`.
        preconditioning, stages, constants: as ``precondition`` takes them, for a file that an earlier version wrote
            without them; with another file they must agree with what it says.

    Raises:
        ValueError: the file says nothing of its denoiser and the arguments do not, or they contradict it.
        CheckpointFileError: (a ValueError) as of :func:`load_network`.
        CheckpointError, OSError: as of :func:`load_network`.
    """
    path = Path(path)
    asked = as_json({"schedule": preconditioning, **constants})
    asked = {name: value for name, value in asked.items() if value is not None}
    run = _checkpoint_of(path, weights)
    if run is not None:
        denoiser = _denoiser_of_run(*run)
        _require_agreement(path, denoiser.to_json(), asked, stages, denoiser)
        return denoiser
    network, said = _read(path)
    if said is not None:
        denoiser = _described(network, said, path)
        _require_agreement(path, said, asked, stages, denoiser)
        return denoiser.eval()
    if preconditioning is None or (stages is None and network.num_stages > 1):
        raise ValueError(
            f"load_denoiser: {path} does not say how its network becomes a denoiser: an earlier version wrote it, or "
            "nothing was known. Convert the original file again, or give preconditioning= (and its constants) and, "
            f"for a network of {network.num_stages} stage(s), stages="
        )
    require_known("load_denoiser", preconditioning, constants)
    return precondition(network, stages or Stages.single(), preconditioning, **constants).eval()


def _require_agreement(
    path: Path, said: Mapping, asked: Mapping, stages: Stages | None, denoiser: Preconditioner
) -> None:
    """Raises ValueError where the caller says something else than the file."""
    wrong = differences(said, {"schedule": said["schedule"], **asked})
    unknown = [name for name in asked if name not in said]
    wrong += [f"the file's {said['schedule']} has no {name}" for name in unknown]
    if stages is not None:
        own = (
            stages if isinstance(denoiser, EDMPreconditioner) else stages_in_sigma(stages, denoiser.schedule)
        )
        if own != denoiser.stages:
            wrong.append(f"the file says {denoiser.stages!r}, not {own!r}")
    if wrong:
        raise ValueError(f"load_denoiser: {path}: {'; '.join(wrong)}; leave out what the file knows")


def _checkpoint_of(path: Path, weights: str) -> tuple[Path, str] | None:
    """The folder and the weights that a path into a run stands for; None for a file of its own."""
    if path.is_dir():
        return path, weights
    if path.suffix == ".safetensors" and (path.parent / checkpoints.METADATA).is_file():
        return path.parent, path.stem
    return None


def _denoiser_of_run(folder: Path, weights: str) -> Preconditioner:
    denoiser = checkpoints.load_model(folder, weights).denoiser
    denoiser.network.preconditioning = denoiser.to_json()
    return denoiser


def _read(path: Path) -> tuple[nn.Module, dict | None]:
    """The network of a file, and the description of its denoiser, where it has one."""
    with _opened(path) as file:
        config, said = _descriptions(file, path)
        names = list(file.keys())
        _require_fit(config, {name: file.get_slice(name) for name in names}, path)
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    network = networks.build(config)
    network.load_state_dict(tensors)
    if said is not None:
        _described(network, said, path)
    network.preconditioning = said
    return network.eval(), said


@contextmanager
def _opened(path: Path) -> Iterator:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointFileError(f"{path} is truncated or no safetensors file: {error}") from error


def _descriptions(file, path: Path) -> tuple[dict, dict | None]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointFileError(f"{path} was not written by msd convert: it has no {FORMAT} metadata")
    said = _json_of(metadata, "denoiser", path) if "denoiser" in metadata else None
    return networks.in_effect(_json_of(metadata, "config", path)), said


def read_descriptions(path: str | Path) -> tuple[dict, dict | None]:
    """What a file that ``msd convert`` wrote says of its network and of its denoiser (None: nothing); reads no weights.

    Raises:
        CheckpointFileError: the file is truncated or was written by something else.
        OSError: the file cannot be read.
    """
    with _opened(Path(path)) as file:
        return _descriptions(file, Path(path))


def _require_fit(config: dict, slices: Mapping[str, object], path: Path) -> None:
    """Raises unless a configuration builds a network of just these tensors; takes no memory for its weights."""
    try:
        with torch.device("meta"), at_most(len(slices)):
            own = {name: list(tensor.shape) for name, tensor in networks.build(config).state_dict().items()}
    except Exception as error:  # a configuration from a file can raise nearly anything
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointFileError(
            f"{path}: its configuration builds no network of its {len(slices)} tensors: "
            f"{reason or type(error).__name__}"
        ) from None
    wrong = {
        "missing": [name for name in own if name not in slices],
        "unexpected": [name for name in slices if name not in own],
        "of another shape": [
            name for name, s in slices.items() if own.get(name, s.get_shape()) != s.get_shape()
        ],
        "of another type": [name for name, s in slices.items() if s.get_dtype() not in FLOATS],
    }
    if any(wrong.values()):
        found = "; ".join(summary(kind, names) for kind, names in wrong.items() if names)
        raise CheckpointFileError(f"{path}: its tensors are not those of its configuration: {found}")


def _json_of(metadata: Mapping[str, str], name: str, path: Path) -> dict:
    """The dictionary in a text of the header."""
    try:
        found = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointFileError(
            f"{path}: its {name} is missing or no JSON ({type(error).__name__})"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointFileError(f"{path}: its {name} is of the type {type(found).__name__}, not an object")
    return found


def _described(network: nn.Module, said: Mapping[str, object], path: Path) -> Preconditioner:
    try:
        return from_json(network, said)
    except ValueError as error:
        raise CheckpointFileError(f"{path}: its denoiser's description does not fit: {error}") from None
