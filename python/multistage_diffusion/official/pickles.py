"""Reads pickled EDM snapshots without running anything that they contain.

EDM pickles whole networks, together with the source code of their classes, which unpickling would execute. The reader
here knows the few globals that build tensors and plain containers. It replaces networks by inert records, leaves their
source unread, and refuses every other global by name.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["CheckpointFileError", "Record", "read_pickle", "record_tensors"]


class CheckpointFileError(ValueError):
    """A checkpoint file cannot be read: it is truncated, holds something else, or wants to run code."""


class Record:
    """An object of the pickle: its class's name and its attributes, without behaviour."""

    def __init__(self, *args: object) -> None:
        self.class_name = type(self).__name__

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({name: value for name, value in state.items() if isinstance(name, str)})


class _Builder:
    """A callable that a pickle can call and cannot change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable) -> None:
        object.__setattr__(self, "function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set")

    def __call__(self, *args):
        return self.function(*args)


def read_pickle(path: str | Path) -> object:
    """The content of a pickle made of tensors, arrays, plain containers and networks, the latter as :class:`Record`.

    Raises:
        CheckpointFileError: a global that is not allowed (named), or a file that is truncated or no pickle.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        try:
            return _Unpickler(file).load()
        except CheckpointFileError as error:
            raise CheckpointFileError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise CheckpointFileError(
                f"{path} is truncated or no pickle ({type(error).__name__}: {error}); copy it again"
            ) from error


def record_tensors(record: Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a recorded network, as its ``state_dict`` would have them."""
    transient = getattr(record, "_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(record, kind, {}).items():
            if isinstance(tensor, Tensor) and name not in transient:
                yield f"{prefix}{name}", tensor
    for name, child in getattr(record, "_modules", {}).items():
        if isinstance(child, Record):
            yield from record_tensors(child, f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file) -> None:
        super().__init__(file)
        self.builders = {name: _Builder(function) for name, function in BUILDERS.items()}

    def find_class(self, module: str, name: str):
        full_name = f"{module}.{name}"
        if full_name in self.builders:
            return self.builders[full_name]
        if full_name in CONTAINERS:
            return CONTAINERS[full_name]
        if full_name in RECORDS:
            return type(name, (Record,), {})  # a new class, so that no pickle changes another one's
        raise CheckpointFileError(
            f"refused: the pickle asks for {full_name}, which is no builder of tensors or containers; nothing was run"
        )

    def persistent_load(self, key: object):
        raise CheckpointFileError(f"refused: the pickle refers to something outside of it ({key!r})")


def _persistent_object(meta: dict) -> Record:
    """What EDM's persistence makes of a class that it stores with its source: here its state alone."""
    record = Record()
    record.__setstate__(meta["state"])
    record.class_name = str(meta["class_name"])
    return record


def _storage(content: bytes):
    """A tensor's memory, which PyTorch pickles as a file of its own."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage, offset: int, size, stride, *rest: object) -> Tensor:
    tensor = torch.empty(0, dtype=storage.dtype)
    return tensor.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


def _parameter(data: Tensor, *rest: object) -> Tensor:
    return data


def _array(kind: object, shape: object, type_code: object) -> np.ndarray:
    """An empty array, which the pickle then fills through ``__setstate__``."""
    return np.ndarray((0,), "b")


def _scalar(dtype: np.dtype, content: bytes):
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise CheckpointFileError(f"refused: a scalar of type {dtype!r}")
    return np.frombuffer(content, dtype)[0]


def _encoded(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise CheckpointFileError(f"refused: text in the encoding {encoding!r}")
    return text.encode("latin1")


BUILDERS: dict[str, Callable] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "_codecs.encode": _encoded,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}


class _EasyDict(dict):
    """A dictionary whose attributes a pickle may set, to no effect."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)


CONTAINERS: dict[str, type] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.set": set,
    "dnnlib.util.EasyDict": _EasyDict,
    "torch.Size": torch.Size,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}
RECORDS = {
    f"torch.nn.modules.{name}"
    for name in ("container.ModuleDict", "container.ModuleList", "container.Sequential", "module.Module")
}
