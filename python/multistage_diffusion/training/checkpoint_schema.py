"""What a checkpoint must hold, compared with the live objects before anything of it is loaded.

Checksums tell that a checkpoint is what was written; this tells that it fits what it is loaded into. PyTorch's fused
optimizers, for one, trust the sizes of their state and would read and write beyond it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from multistage_diffusion.common.checks import is_number

__all__ = ["CheckpointError", "Kind", "kinds"]

_SHOWN = 4
_BELOW = 2**63
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_HALVES = (torch.bfloat16, torch.float16)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or does not fit; the message says which and what to do."""


# ---------------------------------------------------------------------------- tensors


class Kind(NamedTuple):
    """What is known of a tensor without its values; ``dtype`` is a safetensors name where PyTorch has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, Kind]:
    """Shapes and dtypes by name."""
    return {name: Kind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def read_kinds(path: Path) -> dict[str, Kind]:
    """Shapes and dtypes of a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is missing, truncated or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {
                name: Kind(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def differences(found: Mapping[str, Kind], expected: Mapping[str, Kind], owner: str) -> list[str]:
    """What differs, one entry per way to differ: how many tensors, and the first few by name.

    Args:
        owner: what ``expected`` belongs to, such as "network".
    """
    common = [name for name in expected if name in found]
    shapes = [
        f"{name} is {list(found[name].shape)} in the checkpoint and {list(expected[name].shape)} in the {owner}"
        for name in common
        if found[name].shape != expected[name].shape
    ]
    dtypes = [
        f"{name} is {found[name]} in the checkpoint and {expected[name]} in the {owner}"
        for name in common
        if found[name].shape == expected[name].shape and found[name].dtype != expected[name].dtype
    ]
    groups = (
        (shapes, "of another shape"),
        (dtypes, "of another dtype"),
        ([name for name in expected if name not in found], "missing from the checkpoint"),
        ([name for name in found if name not in expected], f"unknown to the {owner}"),
    )
    return [f"{len(group)} {what}: {_first(group)}" for group, what in groups if group]


def check_finite(tensors: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Raises CheckpointError where a tensor holds NaN or Inf."""
    if bad := not_finite(tensors):
        raise CheckpointError(f"{source}: {len(bad)} of {len(tensors)} tensors are not finite: {_first(bad)}")


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf; waits for their device once."""
    named = {n: t.detach() for n, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    if not named:
        return []
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in named.values()]).tolist()
    return [name for name, ok in zip(named, finite, strict=True) if not ok]


def _first(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"


def in_16_bits(expected: Mapping[str, Kind], found: Mapping[str, Kind]) -> dict[str, Kind]:
    """What is expected of a file whose floating-point tensors all have the same 16-bit dtype.

    Weights of a network in 16 bits, whose values a network in float32 takes as they are. Others: ``expected`` itself.
    """
    dtypes = {
        kind.dtype
        for kind in found.values()
        if kind.dtype in _DTYPES.values() and kind.dtype.is_floating_point
    }
    if len(dtypes) != 1 or not dtypes <= set(_HALVES):
        return dict(expected)
    (dtype,) = dtypes
    return {
        name: kind._replace(dtype=dtype) if kind.dtype is torch.float32 else kind
        for name, kind in expected.items()
    }


# ---------------------------------------------------------------------------- the optimizer


def optimizer_kinds(
    named: Iterable[tuple[str, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Kind]]:
    """What an optimizer of one group keeps of each parameter, by its name: the tensors by the names of the entries.

    Taken from a step that an optimizer of the same class and settings makes with a small parameter of the same dtype:
    its entries are scalars, or have the shape of their parameter.
    """
    made: dict[tuple, dict[str, torch.Tensor]] = {}
    result = {}
    for name, parameter in named:
        key = (parameter.dtype, parameter.device)
        if key not in made:
            made[key] = _state_of_a_step(optimizer, parameter)
        result[name] = {
            entry: Kind(tuple(parameter.shape) if tensor.dim() else (), tensor.dtype)
            for entry, tensor in made[key].items()
        }
    return result


def _state_of_a_step(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    probe = nn.Parameter(parameter.detach().new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    other = type(optimizer)([probe])
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    other.param_groups[0].update(settings)
    other.step()
    return {entry: tensor for entry, tensor in other.state[probe].items() if torch.is_tensor(tensor)}


def check_optimizer(
    found: Mapping[str, Kind],
    expected: Mapping[str, Mapping[str, Kind]],
    saved_of: Collection[str] | None,
    source: str | Path,
) -> None:
    """Compares the tensors ``{parameter}.{entry}`` of an optimizer's state with what the optimizer keeps.

    Args:
        expected: as ``optimizer_kinds`` returns it.
        saved_of: the parameters that had a state when it was saved; None where that is not known. One that was never
            stepped has none.

    Raises:
        CheckpointError: names what is missing, unknown, or of another shape or dtype.
    """
    present = {name.rpartition(".")[0] for name in found} if saved_of is None else set(saved_of)
    wanted = {
        f"{name}.{entry}": kind
        for name, entries in expected.items()
        if name in present
        for entry, kind in entries.items()
    }
    if problems := differences(found, wanted, "optimizer"):
        raise CheckpointError(f"{source}: the optimizer state does not fit: {'; '.join(problems)}")


def check_optimizer_values(tensors: Mapping[str, torch.Tensor], step: int, source: str | Path) -> None:
    """Raises CheckpointError for numbers that no run of so many steps can have: they are finite, squares are not
    negative, and a parameter was stepped once to ``step`` times."""
    check_finite(tensors, source)
    for name, tensor in tensors.items():
        entry = name.rpartition(".")[2]
        if entry == "exp_avg_sq" and bool((tensor < 0).any()):
            raise CheckpointError(f"{source}: {name}, a mean of squares, is negative")
        if entry == "step" and not (1 <= float(tensor) <= step and float(tensor).is_integer()):
            raise CheckpointError(f"{source}: {name} is {float(tensor)}, of a run of {step} steps")


# ---------------------------------------------------------------------------- checkpoint.json


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _BELOW


def _is_amount(value: object) -> bool:
    return is_number(value) and 0 <= value <= sys.float_info.max


FIELDS = {
    "step": (_is_count, "a whole number from 0 to 2^63 - 1"),
    "images": (_is_count, "a whole number from 0 to 2^63 - 1"),
    "seconds": (_is_amount, "a finite number >= 0"),
    "config": (lambda value: isinstance(value, dict), "an object"),
    "optimizer": (lambda value: isinstance(value, dict), "an object"),
    "data_fingerprint": (lambda value: isinstance(value, str), "a string"),
}
ABOUT_THE_FILES = ("format", "files", "sha256")


def check_fields(
    metadata: dict, needed: Collection[str], files: Collection[str], source: str | Path, others: bool = True
) -> None:
    """Checks types and ranges of what checkpoint.json says.

    Args:
        needed: fields that may not be missing.
        files: those whose checksums it must have.
        others: whether there may be fields that this version does not know.

    Raises:
        CheckpointError: names the field.
    """
    missing = [name for name in needed if name not in metadata]
    missing += [name for name in files if name not in metadata["files"]]
    if missing:
        raise CheckpointError(f"{source} says nothing of {_first(missing)}")
    for name, (allowed, description) in FIELDS.items():
        if name in metadata and not allowed(metadata[name]):
            raise CheckpointError(f"{source}: {name} is {_shown(metadata[name])}, not {description}")
    unknown = [name for name in metadata if name not in FIELDS and name not in ABOUT_THE_FILES]
    if unknown and not others:
        raise CheckpointError(f"{source}: this version does not know the field(s) {_first(unknown)}")
    batch = metadata.get("config", {}).get("batch_size")
    if type(batch) is int and "images" in metadata and metadata["images"] != metadata["step"] * batch:
        raise CheckpointError(
            f"{source}: images is {metadata['images']}, not step {metadata['step']} times config.batch_size {batch}"
        )


def check_group(
    saved: dict,
    live: Mapping[str, object],
    names: Sequence[Collection[str]],
    highest_lr: float,
    source: str | Path,
) -> None:
    """Compares the settings of a saved optimizer with those of the live one, which are the configuration's.

    Args:
        saved: what checkpoint.json says of the optimizer: ``{"param_groups": [settings], "state": names}``; earlier
            versions wrote no ``state``.
        live: the live optimizer's only group.
        names: the names that its parameters may have.
        highest_lr: of the run.

    Raises:
        CheckpointError: names the setting.
    """
    groups = saved.get("param_groups")
    if not (isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)):
        raise CheckpointError(
            f"{source}: optimizer.param_groups is {_shown(groups)}, not a list of one object"
        )
    where = f"{source}: optimizer.param_groups[0]"
    group, unknown = groups[0], [name for name in saved if name not in ("param_groups", "state")]
    if unknown:
        raise CheckpointError(f"{source}: optimizer has the unknown entries {_first(unknown)}")
    if missing := [name for name in live if name not in group]:
        raise CheckpointError(f"{where} lacks {_first(missing)}")
    if surplus := [name for name in group if name not in live]:
        raise CheckpointError(f"{where} has the unknown settings {_first(surplus)}")
    if not any(_are_names(group["params"], allowed) for allowed in names):
        raise CheckpointError(f"{where}.params are not the names of the network's parameters")
    if not (is_number(group["lr"]) and 0 <= group["lr"] <= highest_lr):
        raise CheckpointError(f"{where}.lr is {_shown(group['lr'])}, not a number from 0 to {highest_lr}")
    for name, value in live.items():
        if name not in ("params", "lr") and not same(group[name], value) and not _without_effect(name, group):
            raise CheckpointError(f"{where}.{name} is {_shown(group[name])}, the configuration has {value!r}")
    if "state" in saved and not _are_names(saved["state"], group["params"], all_of_them=False):
        raise CheckpointError(
            f"{source}: optimizer.state is no list of names in optimizer.param_groups[0].params"
        )


def _are_names(value: object, allowed: Collection[str], all_of_them: bool = True) -> bool:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return False
    given = set(value)
    return len(given) == len(value) and (given == set(allowed) if all_of_them else given <= set(allowed))


def _without_effect(name: str, group: dict) -> bool:
    """Whether a setting changes nothing: how weights decay, in an optimizer of before they did."""
    decay = group.get("weight_decay")
    return (
        name == "decoupled_weight_decay" and isinstance(group[name], bool) and is_number(decay) and decay == 0
    )


def same(saved: object, live: object) -> bool:
    """Whether JSON says what a live value is, whose tuples it has as lists; 1 is not True."""
    if isinstance(live, list | tuple):
        is_list = isinstance(saved, list) and len(saved) == len(live)
        return is_list and all(same(a, b) for a, b in zip(saved, live, strict=True))
    return isinstance(saved, bool) == isinstance(live, bool) and saved == live


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
