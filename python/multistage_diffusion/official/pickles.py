"""Reads pickled EDM snapshots without running anything that they contain.

EDM pickles whole networks, together with the source code of their classes, which unpickling would execute. Here the
pickle's opcodes are interpreted (``unpickling``): tensors are made of the file's own bytes, networks become inert
records, their source stays unread, arrays too, and every other global is refused by name.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from multistage_diffusion.official.unpickling import (
    Builder,
    CheckpointFileError,
    Filled,
    checked_key,
    interpret,
    refused,
)

__all__ = ["CheckpointFileError", "Record", "read_pickle", "record_tensors", "screen_pickles"]

# More than any network has. A pickle may name one module in many places, and even inside of itself.
MOST_NAMES, LONGEST_NAME = 100_000, 1000
TOO_MANY = "a module contains itself, or the network has far more modules or longer names than a network has"


class Record(Filled):
    """An object of the pickle without behaviour.

    Attributes:
        class_name: of its class.
        state: its attributes by name.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.state: dict = {}

    def fill(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state

    def entries(self, name: str) -> dict:
        """An attribute that is a dictionary; empty where there is none."""
        found = self.state.get(name)
        return found if isinstance(found, dict) else {}


def read_pickle(path: str | Path) -> object:
    """The content of a pickle made of tensors, plain containers and networks, the latter as :class:`Record`.

    Whatever else is in it, arrays for instance, is a :class:`Record` without attributes.

    Raises:
        CheckpointFileError: a global or an opcode that is not allowed (named); the file is truncated or no pickle.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()  # in memory no read gets, or allocates, more than there is
    try:
        return interpret(io.BytesIO(content), len(content), GLOBALS)
    except CheckpointFileError as error:
        raise CheckpointFileError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointFileError(
            f"{path} is truncated or no pickle ({type(error).__name__}: {error}); copy it again"
        ) from error


def screen_pickles(file: BinaryIO, size: int, count: int = 1) -> None:
    """Raises where pickles that PyTorch is to read would take far more memory than they have, or exhaust the stack.

    Which globals may be called is left to ``torch.load(weights_only=True)``; here all are inert. But that allows types,
    such as bytearray and the storages, that make objects of any size out of one number, and copies of one long object.

    Args:
        file: in memory or mapped; begins with them.
        size: of the file in bytes.
        count: how many there are, one behind the other.

    Raises:
        CheckpointFileError: one asks for that, and nothing else is wrong with it; what is damaged is left to PyTorch.
    """
    try:
        for _ in range(count):
            interpret(file, size, _INERT, lambda _: Record("storage"))
    except CheckpointFileError:
        raise
    except Exception:  # PyTorch says what is wrong with a damaged pickle
        return


class _InertGlobals(dict):
    """Every global by its full name, without what it does: PyTorch decides which there are."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Builder:
        if name.endswith(("Storage", "Tensor")):
            return Builder(name, None)
        if name.startswith("collections."):
            return Builder(name, lambda *_: {})
        if name.endswith((".set", ".frozenset")):
            return Builder(name, lambda *_: set())
        if name.endswith(".bytearray"):
            return Builder(name, _bytes)
        return Builder(name, lambda *_: Record(name))


_INERT = _InertGlobals()


def _bytes(*arguments: object) -> Record:
    if any(isinstance(argument, int) for argument in arguments):
        raise refused("the pickle builds bytes of a number")
    return Record("bytearray")


def record_tensors(record: Record) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a recorded network, as its ``state_dict`` would have them.

    Raises:
        CheckpointFileError: a module contains itself, or there are more or longer names than any network has.
    """
    pending, names = [("", record)], 0
    while pending:
        prefix, module = pending.pop()
        transient = module.state.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else ()
        tensors = [module.entries("_parameters"), module.entries("_buffers")]
        children = module.entries("_modules")
        names += 1 + sum(map(len, (*tensors, children)))
        if names > MOST_NAMES:
            raise CheckpointFileError(TOO_MANY)
        for name, tensor in (item for found in tensors for item in found.items()):
            if isinstance(tensor, Tensor) and name not in transient:
                yield _full_name(prefix, name), tensor
        inner = [(name, child) for name, child in children.items() if isinstance(child, Record)]
        pending.extend((f"{_full_name(prefix, name)}.", child) for name, child in reversed(inner))


def _full_name(prefix: str, name: object) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > LONGEST_NAME:
        raise CheckpointFileError(TOO_MANY)
    return prefix + name


@dataclass(frozen=True)
class _Storage:
    """A tensor's memory."""

    values: Tensor


@dataclass(frozen=True)
class _StorageID:
    """What PyTorch writes in place of a tensor's memory, which lies behind the pickle."""

    dtype: torch.dtype
    key: str


class _DType(Filled):
    """The type of a numpy scalar."""

    __slots__ = ("dtype",)

    def __init__(self, code: object, *flags: object) -> None:
        if not isinstance(code, str) or code not in SCALARS:
            raise refused("the pickle builds an array's type other than a plain number")
        self.dtype = np.dtype(code)

    def fill(self, state: object) -> None:
        """Checks that the state is that of a plain number in this machine's byte order."""
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", "|", "=")):
            raise refused("the pickle changes a number's type by more than its byte order")


def _scalar(kind: _DType, content: bytes) -> complex:
    """The number, as Python's own."""
    if not isinstance(kind, _DType) or not isinstance(content, bytes) or len(content) != kind.dtype.itemsize:
        raise refused("the pickle builds a number of something other than its bytes")
    return np.frombuffer(content, kind.dtype)[0].item()


def _array(*_: object) -> Record:
    return Record("numpy.ndarray")


def _persistent_object(meta: dict) -> Record:
    """What EDM's persistence makes of a class that it stores with its source: here its state alone."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise refused("the pickle builds a persistent object of something other than its description")
    record = Record(meta["class_name"])
    record.fill(meta.get("state"))
    return record


def _storage(content: bytes) -> _Storage:
    """A tensor's memory, which PyTorch pickles as a file of its own in the format it had before 1.6.

    That is: four pickles (a magic number, the format's version, facts about the machine, and the storage's identity),
    the list of the storages that follow, and of each its number of elements as int64, and the elements.
    """
    if not isinstance(content, bytes):
        raise refused("the pickle builds a tensor's memory of something other than bytes")
    file = io.BytesIO(content)
    header = [interpret(file, len(content), STORAGE_GLOBALS, _storage_id) for _ in range(5)]
    magic, version, machine, storage, keys = header
    little_endian = isinstance(machine, dict) and machine.get("little_endian") is True
    if (magic, version) != (MAGIC_NUMBER, FORMAT_VERSION) or not little_endian:
        raise refused("a tensor's memory is in another format than PyTorch's, little-endian")
    if not isinstance(storage, _StorageID) or not isinstance(keys, list) or keys != [storage.key]:
        raise refused("a tensor's memory is in another file")
    (size,) = struct.unpack("<q", file.read(8))
    start = file.tell()
    if size * storage.dtype.itemsize != len(content) - start:
        raise refused("a tensor's memory is of another size than its bytes")
    if not size:
        return _Storage(torch.empty(0, dtype=storage.dtype))
    return _Storage(torch.frombuffer(bytearray(memoryview(content)[start:]), dtype=storage.dtype))


def _storage_id(description: object) -> _StorageID:
    if isinstance(description, tuple) and len(description) == 6 and description[5] is None:
        kind, dtype, key = description[:3]
        if kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str):
            return _StorageID(dtype, key)
    raise refused("a tensor's memory is described in another way than PyTorch's")


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: object) -> Tensor:
    """A view of the memory, inside of it, that shows no element twice."""
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise refused("the pickle builds a tensor of something other than its memory")
    size, stride = _size(size), _size(stride)
    if len(size) != len(stride):
        raise refused(f"the pickle builds a tensor of {len(size)} dimensions with {len(stride)} strides")
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if elements > len(storage.values) or (elements and last >= len(storage.values)):
        raise refused("the pickle builds a tensor that reaches beyond its memory")
    return storage.values.as_strided(size, stride, offset) if elements else storage.values.new_empty(size)


def _size(numbers: object = ()) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > MOST_DIMENSIONS:
        raise refused("the pickle builds a shape of something other than a few numbers")
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise refused("the pickle builds a shape of something other than whole numbers")
    return numbers


def _parameter(data: Tensor, *rest: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise refused("the pickle builds a parameter of something other than a tensor")
    return data


def _encoded(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise refused("the pickle encodes something other than latin1 text")
    return text.encode("latin1")


def _dictionary(*items: object) -> dict:
    if items:
        raise refused("the pickle builds a dictionary in one call")
    return {}


def _set(items: object = ()) -> set:
    if not isinstance(items, (list, tuple)):
        raise refused("the pickle builds a set of something other than a list")
    return set(map(checked_key, items))


MAGIC_NUMBER, FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001
MOST_DIMENSIONS = 8
SCALARS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"}
STORAGE_GLOBALS = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
}
FUNCTIONS: dict[str, Callable[..., object] | None] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": _size,
    "_codecs.encode": _encoded,
    "numpy.ndarray": None,
    "numpy.dtype": _DType,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **dict.fromkeys(("collections.OrderedDict", "dnnlib.util.EasyDict"), _dictionary),
    **dict.fromkeys(("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"), _set),
    **{
        f"torch.nn.modules.{name}": lambda *_, name=name: Record(name.rpartition(".")[2])
        for name in ("container.ModuleDict", "container.ModuleList", "container.Sequential", "module.Module")
    },
}
GLOBALS = {name: Builder(name, function) for name, function in FUNCTIONS.items()}
