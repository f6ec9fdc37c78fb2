"""Reads pickles and runs nothing of them; one made to crash its reader crashes it: convert that in a child process.

EDM pickles whole networks, together with the source code of their classes, which unpickling would execute. Here
Python's unpickler finds inert builders alone: tensors are made of the file's own bytes, networks become records
without behaviour, their source stays unread, arrays too, and every other global is refused by name.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["CheckpointFileError", "Record", "read_pickle", "record_tensors", "screen_pickles", "shown"]

# What calls may hand over beyond twice the length of the file (protocol 2 hands over what it has encoded once more):
# strings and empty containers that many of them share.
SLACK = 1 << 20
SIZED = (str, bytes, bytearray, tuple, list, dict, set, frozenset)
# More than any network has. A pickle may name one module in many places, and even inside of itself.
MOST_NAMES, LONGEST_NAME = 100_000, 1000
TOO_MANY = "a module contains itself, or the network has far more modules or longer names than a network has"


class CheckpointFileError(ValueError):
    """A checkpoint file cannot be read: it is truncated, holds something else, or wants to run code."""


def shown(name: str) -> str:
    """A name of a file for a message: what cannot be printed escaped, and not too long."""
    printable = name if name.isprintable() else ascii(name)
    return printable if len(printable) <= 100 else f"{printable[:100]}..."


def refused(reason: str) -> CheckpointFileError:
    """The error of a pickle that asks for what inert data does not need."""
    return CheckpointFileError(f"refused: {reason}; nothing was run")


# ------------------------------------------------------------------ the unpickler


class Inert:
    """What a pickle may build besides plain containers; the pickle can call nothing of it but ``__setstate__``."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise refused(f"the pickle changes a {type(self).__name__}")


class InertUnpickler(pickle.Unpickler):
    """Python's unpickler, which finds nothing but builders of inert objects.

    Args:
        file: where the pickle begins; it is left behind the pickle's end.
        size: of the pickle in bytes. What the calls hand over in all may not exceed it by far: else a short file could
            let them copy one long object again and again.
        find: the global of a full name: a function that makes an object of the arguments, whose types it checks, or a
            value; None for what may be named, but not called; raises KeyError for what is refused.
        persistent: makes an object of a persistent id; by default they are refused.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        find: Callable[[str], object],
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        super().__init__(file)
        self.left = 2 * size + SLACK
        self.find, self.persistent = find, persistent
        self.found: dict[str, object] = {}

    def find_class(self, module: str, name: str) -> object:
        full_name = f"{module}.{name}"
        if full_name not in self.found:
            try:
                made = self.find(full_name)
            except KeyError:
                raise refused(
                    f"the pickle asks for {shown(full_name)}, which is no builder of tensors or containers"
                ) from None
            called = made is None or callable(made)
            self.found[full_name] = self._builder(full_name, made) if called else made
        return self.found[full_name]

    def persistent_load(self, description: object) -> object:
        if self.persistent is None:
            raise refused("the pickle refers to something outside of it")
        return self.persistent(description)

    def _builder(self, full_name: str, function: Callable | None) -> type:
        """A class that makes nothing of its own: some opcodes call classes alone."""

        def build(_, *arguments: object) -> object:
            if function is None:
                raise refused(f"the pickle calls {full_name}, which it may only name")
            self.account(arguments)
            built = function(*arguments)
            if isinstance(built, Record):
                built.account = self.account
            return built

        return type("Builder", (Inert,), {"__new__": build})

    def account(self, handed: tuple) -> None:
        """Raises once calls and states have been given more than the file holds."""
        self.left -= 1 + len(handed) + sum(len(item) for item in handed if isinstance(item, SIZED))
        if self.left < 0:
            raise refused("the pickle builds more than it holds")


def read_pickle(path: str | Path) -> object:
    """The content of a pickle made of tensors, plain containers and networks, the latter as :class:`Record`.

    Whatever else is in it, arrays for instance, is a :class:`Record` without attributes.

    Raises:
        CheckpointFileError: a global or an object that is not allowed (named); the file is truncated or no pickle.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        found = InertUnpickler(io.BytesIO(content), len(content), FUNCTIONS.__getitem__).load()
    except CheckpointFileError as error:
        raise CheckpointFileError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointFileError(
            f"{path} is truncated or no pickle ({type(error).__name__}: {error}); copy it again"
        ) from error
    return _plain(found) if isinstance(found, dict) else found


def screen_pickles(file: BinaryIO, size: int, count: int = 1) -> None:
    """Raises where pickles that PyTorch is to read would take far more memory than they have.

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
            InertUnpickler(file, size, _inert, Anything).load()
    except CheckpointFileError:
        raise
    except Exception:  # PyTorch says what is wrong with a damaged pickle
        return


class Anything(dict):
    """An object of which nothing is known: it takes every state, and is filled as any container."""

    __hash__ = object.__hash__

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    add = append


def _inert(name: str) -> Callable | None:
    """A global without what it does."""
    if name.endswith(("Storage", "Tensor")):
        return None
    return _bytes if name.endswith(".bytearray") else Anything


def _bytes(*arguments: object) -> Anything:
    if any(isinstance(argument, int) for argument in arguments):
        raise refused("the pickle builds bytes of a number")
    return Anything()


# ------------------------------------------------------------------ networks


class Record(Inert):
    """An object of the pickle without behaviour.

    Attributes:
        class_name: of its class.
        state: its attributes by name.
    """

    __slots__ = ("account", "class_name", "state")

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.state: dict = {}

    def __setstate__(self, state: object) -> None:
        self.account(state if isinstance(state, tuple) else (state,))
        if isinstance(state, dict):
            self.state = state

    def entries(self, name: str) -> dict:
        """An attribute that is a dictionary; empty where there is none."""
        found = self.state.get(name)
        return _plain(found) if isinstance(found, dict) else {}


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


def _persistent_object(meta: dict) -> Record:
    """What EDM's persistence makes of a class that it stores with its source: here its state alone."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise refused("the pickle builds a persistent object of something other than its description")
    record = Record(meta["class_name"])
    record.state = meta["state"] if isinstance(meta.get("state"), dict) else {}
    return record


class Dictionary(dict):
    """A dictionary whose attributes are of no use."""

    def __init__(self, *items: object) -> None:
        if items:
            raise refused("the pickle builds a dictionary in one call")
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def _set(items: object = ()) -> set:
    if not isinstance(items, (list, tuple)):
        raise refused("the pickle builds a set of something other than a list")
    return set(items)


def _encoded(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise refused("the pickle encodes something other than latin1 text")
    return text.encode("latin1")


# ------------------------------------------------------------------ tensors and numbers


@dataclass(frozen=True, eq=False)
class _Built(Inert):
    """A tensor, or its memory as one of one dimension: PyTorch's own take states."""

    values: Tensor


@dataclass(frozen=True)
class _StorageID(Inert):
    """What PyTorch writes in place of a tensor's memory, which lies behind the pickle."""

    dtype: torch.dtype
    key: str


class _DType(Inert):
    """The type of a numpy scalar."""

    __slots__ = ("dtype",)

    def __init__(self, code: object, *flags: object) -> None:
        if not isinstance(code, str) or code not in SCALARS:
            raise refused("the pickle builds an array's type other than a plain number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        """Checks that the state is that of a plain number in this machine's byte order."""
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", "|", "=")):
            raise refused("the pickle changes a number's type by more than its byte order")


def _plain(found: dict) -> dict:
    """A dictionary with its tensors as PyTorch has them."""
    return {name: value.values if isinstance(value, _Built) else value for name, value in found.items()}


def _scalar(kind: _DType, content: bytes) -> complex:
    """The number, as Python's own."""
    if not isinstance(kind, _DType) or not isinstance(content, bytes) or len(content) != kind.dtype.itemsize:
        raise refused("the pickle builds a number of something other than its bytes")
    return np.frombuffer(content, kind.dtype)[0].item()


def _array(*_: object) -> Record:
    return Record("numpy.ndarray")


def _storage(content: bytes) -> _Built:
    """A tensor's memory, which PyTorch pickles as a file of its own in the format it had before 1.6.

    That is: four pickles (a magic number, the format's version, facts about the machine, and the storage's identity),
    the list of the storages that follow, and of each its number of elements as int64, and the elements.
    """
    if not isinstance(content, bytes):
        raise refused("the pickle builds a tensor's memory of something other than bytes")
    file = io.BytesIO(content)
    header = [InertUnpickler(file, len(content), STORAGES.__getitem__, _storage_id).load() for _ in range(5)]
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
        return _Built(torch.empty(0, dtype=storage.dtype))
    return _Built(torch.frombuffer(bytearray(memoryview(content)[start:]), dtype=storage.dtype))


def _storage_id(description: object) -> _StorageID:
    if isinstance(description, tuple) and len(description) == 6 and description[5] is None:
        kind, dtype, key = description[:3]
        if kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str):
            return _StorageID(dtype, key)
    raise refused("a tensor's memory is described in another way than PyTorch's")


def _tensor(storage: _Built, offset: int, size: tuple, stride: tuple, *rest: object) -> _Built:
    """A view of the memory, inside of it, that shows no element twice."""
    if not isinstance(storage, _Built) or type(offset) is not int or offset < 0:
        raise refused("the pickle builds a tensor of something other than its memory")
    size, stride, memory = _size(size), _size(stride), storage.values
    if len(size) != len(stride):
        raise refused(f"the pickle builds a tensor of {len(size)} dimensions with {len(stride)} strides")
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if elements > memory.numel() or (elements and last >= memory.numel()):
        raise refused("the pickle builds a tensor that reaches beyond its memory")
    return _Built(memory.as_strided(size, stride, offset) if elements else memory.new_empty(size))


def _size(numbers: object = ()) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > MOST_DIMENSIONS:
        raise refused("the pickle builds a shape of something other than a few numbers")
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise refused("the pickle builds a shape of something other than whole numbers")
    return numbers


def _parameter(data: _Built, *rest: object) -> _Built:
    if not isinstance(data, _Built):
        raise refused("the pickle builds a parameter of something other than a tensor")
    return data


MAGIC_NUMBER, FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001
MOST_DIMENSIONS = 8
SCALARS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"}
STORAGES = {
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
    **dict.fromkeys(("collections.OrderedDict", "dnnlib.util.EasyDict"), Dictionary),
    **dict.fromkeys(("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"), _set),
    **{
        f"torch.nn.modules.{name}": lambda *_, name=name: Record(name.rpartition(".")[2])
        for name in ("container.ModuleDict", "container.ModuleList", "container.Sequential", "module.Module")
    },
}
