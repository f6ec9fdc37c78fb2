"""What a GPU's memory checker would find, found in Triton's interpreter.

Installed in the interpreter's processes, this raises for

- a load or a store outside of the storages of the tensors that the kernel was given;
- a race: two programs of one launch touch one address, and one of them writes;
- two lanes of one store that write different values to one address;
- a number that is not the multiple that ``tl.multiple_of`` promises the compiler;
- atomics, which it does not know.

The interpreter runs one program after the other and ignores the promises, so that tests of values pass all the same.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from msd_kernels.runtime import plan_cache, weight_buffers

NOBODY, SEVERAL = -1, -2


class KernelFault(AssertionError):
    """A kernel does what has no defined result on a GPU."""


class _Storage:
    """One allocation during a launch: who reads and who writes each of its bytes' addresses.

    Attributes:
        base, size: address and bytes.
        writer, reader: per byte the program that touched an element there, NOBODY or SEVERAL.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.base, self.size = storage.data_ptr(), storage.nbytes()
        self.writer = np.full(self.size, NOBODY, np.int32)
        self.reader = np.full(self.size, NOBODY, np.int32)


class Sanitizer:
    """The storages of the launch that is being interpreted."""

    def __init__(self) -> None:
        self.addressed: list[torch.Tensor] = []  # those of the next launch whose addresses it takes by value
        self._storages: list[_Storage] = []
        self._bases = np.empty(0, np.uint64)

    def launch(self, arguments) -> None:
        """Forgets the last launch; these are the arguments of the next."""
        found = {}
        for argument in (*arguments, *self.addressed):
            if isinstance(argument, torch.Tensor):
                storage = argument.untyped_storage()
                found[storage.data_ptr()] = storage
        self._storages = [_Storage(found[base]) for base in sorted(found)]
        self._bases = np.array(sorted(found), np.uint64)
        self.addressed.clear()

    def load(self, addresses: np.ndarray, mask: np.ndarray, item: int, program: int) -> None:
        for storage, offsets in self._located(addresses[mask], item, "load"):
            self._require(storage.writer[offsets], program, offsets, "reads what program {} writes")
            readers = storage.reader[offsets]
            storage.reader[offsets] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray, program: int) -> None:
        item = values.dtype.itemsize
        written, values = addresses[mask], np.broadcast_to(values, addresses.shape)[mask]
        order = np.argsort(written, kind="stable")
        same = written[order][1:] == written[order][:-1]
        bits = values[order].view(f"u{item}")
        if (same & (bits[1:] != bits[:-1])).any():
            raise KernelFault(f"program {program} stores different values to one address in one store")
        for storage, offsets in self._located(written, item, "store"):
            self._require(storage.writer[offsets], program, offsets, "writes what program {} writes")
            self._require(storage.reader[offsets], program, offsets, "writes what program {} reads")
            storage.writer[offsets] = program

    def _located(self, addresses: np.ndarray, item: int, action: str):
        """The storages that addresses fall into, with the offsets; raises for an address in none."""
        addresses = addresses.astype(np.uint64).ravel()
        index = np.searchsorted(self._bases, addresses, side="right").astype(np.int64) - 1
        for number in np.unique(index):
            here = addresses[index == number]
            if number < 0:
                raise KernelFault(f"{action} at {int(here[0]):#x}, before all tensors of the kernel")
            storage = self._storages[number]
            offsets = (here - np.uint64(storage.base)).astype(np.int64)
            if offsets.max() + item > storage.size:
                raise KernelFault(
                    f"{action} of {item} bytes at byte {offsets.max()} of a tensor's storage of {storage.size} bytes"
                )
            yield storage, offsets

    @staticmethod
    def _require(owners: np.ndarray, program: int, offsets: np.ndarray, message: str) -> None:
        wrong = (owners != NOBODY) & (owners != program)
        if wrong.any():
            owner = int(owners[wrong][0])
            other = "several" if owner == SEVERAL else owner
            raise KernelFault(f"race at byte {offsets[wrong][0]}: program {program} {message.format(other)}")


def check_promise(name: str, values: np.ndarray, numbers) -> None:
    """Raises unless a scalar is the multiple that the compiler is told it is."""
    if name == "tt.divisibility" and values.size == 1 and int(values.reshape(-1)[0]) % numbers[0]:
        raise KernelFault(f"tl.multiple_of({int(values.reshape(-1)[0])}, {numbers[0]})")


@functools.cache
def install() -> Sanitizer:
    """Puts the checks between the interpreter and its memory, for the rest of the process."""
    from triton.runtime import interpreter

    sanitizer = Sanitizer()
    native, builder = interpreter._interpreter, interpreter.interpreter_builder
    prepare, set_attr = interpreter.GridExecutor._init_args_hst, interpreter.TensorHandle.set_attr

    def program() -> int:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return (x * height + y) * depth + z

    class CheckedMemory:
        """Triton's native module, with checked loads and stores."""

        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, pointers, mask, other, dtype):
            sanitizer.load(pointers, mask, np.dtype(dtype).itemsize, program())
            return native.load(pointers, mask, other, dtype)

        def atomic_rmw(self, *arguments):
            raise KernelFault("atomics are not checked")

        atomic_cas = atomic_rmw

        def store(self, pointers, values, mask):
            sanitizer.store(pointers, values, mask, program())
            return native.store(pointers, values, mask)

    def prepare_and_watch(self, args_dev, kwargs):
        arguments, keywords = prepare(self, args_dev, kwargs)
        sanitizer.launch([*arguments, *keywords.values()])
        return arguments, keywords

    def check_and_set_attr(self, name, numbers):
        check_promise(name, self.data, numbers)
        set_attr(self, name, numbers)

    # Tables share allocations; a copy of its own shows what reads behind the end of one.
    table = plan_cache.Table
    plan_cache.Table = lambda values, *others: table(values.clone(), *others)
    address = weight_buffers.address
    weight_buffers.address = lambda tensor: sanitizer.addressed.append(tensor) or address(tensor)
    interpreter._interpreter = CheckedMemory()
    interpreter.GridExecutor._init_args_hst = prepare_and_watch
    interpreter.TensorHandle.set_attr = check_and_set_attr
    return sanitizer
