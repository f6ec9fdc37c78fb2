"""Interprets the part of the pickle language that inert data needs, without Python's unpickler.

A pickle is a program for a stack machine. This machine knows the opcodes that push literals, fill plain containers, and
call functions of a given table. No class is instantiated, no attribute set, and nothing is compared or shown, because
data that contains itself, or is nested very deep, would exhaust the memory or the stack there.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import BinaryIO

__all__ = ["Builder", "CheckpointFileError", "Filled", "checked_key", "interpret", "refused", "shown"]

# What calls may hand over beyond twice the length of the file (protocol 2 hands over what it has encoded once more):
# strings and empty containers that many of them share.
SLACK = 1 << 20
# Their hash takes no recursion.
KEYS = (str, bytes, int, float, bool, type(None))
LONGEST_KEY = 16
# Beyond this, many integers may have one hash.
LARGEST_KEY = 1 << 31
SIZED = (str, bytes, bytearray, tuple, list, dict, set, frozenset)


class CheckpointFileError(ValueError):
    """A checkpoint file cannot be read: it is truncated, holds something else, or wants to run code."""


def shown(name: str) -> str:
    """A name of a file for a message: what cannot be printed escaped, and not too long."""
    printable = name if name.isprintable() else ascii(name)
    return printable if len(printable) <= 100 else f"{printable[:100]}..."


def refused(reason: str) -> CheckpointFileError:
    """The error of a pickle that asks for what inert data does not need."""
    return CheckpointFileError(f"refused: {reason}; nothing was run")


class Builder:
    """A global of the pickle, which only the machine calls.

    Args:
        name: the global's full name.
        function: makes an object of the arguments, whose types it checks; None where nothing may be made.
    """

    __slots__ = ("function", "name")

    def __init__(self, name: str, function: Callable[..., object] | None) -> None:
        self.name, self.function = name, function


class Filled:
    """The base of what a pickle may give a state to (opcode BUILD) after it has been made."""

    __slots__ = ()

    def fill(self, state: object) -> None:
        """Takes the state, which may be of any type."""
        raise NotImplementedError


def interpret(
    file: BinaryIO,
    size: int,
    find: Mapping[str, object],
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The object that a pickle describes; the file is left behind the pickle's end.

    Args:
        file: where the pickle begins.
        size: of the pickle in bytes. What the calls hand over in all may not exceed it by far: else a short file could
            let them copy one long object again and again.
        find: the globals by their full names: a :class:`Builder`, or a value.
        persistent: makes an object of a persistent id; by default they are refused.

    Raises:
        CheckpointFileError: something that is not allowed, named.
        Exception: nearly any, for a damaged pickle.
    """
    machine = _Machine(size, find, persistent)
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in LITERALS:
            machine.stack.append(argument)
        elif opcode.name in CONSTANTS:
            machine.stack.append(CONSTANTS[opcode.name])
        elif opcode.name in STEPS:
            STEPS[opcode.name](machine, argument)
        elif opcode.name not in IGNORED:
            raise refused(f"the pickle uses the opcode {opcode.name}")
    (result,) = machine.stack
    return result


class _Machine:
    """The stack, what lies below each mark, and the memo."""

    def __init__(self, size: int, find: Mapping[str, object], persistent: Callable | None) -> None:
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict[int, object] = {}
        self.left = 2 * size + SLACK
        self.globals, self.persistent = find, persistent

    def mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list:
        """What lies above the last mark, which goes."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self, _=None) -> object:
        return self.stack.pop()

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def push_tuple(self, _) -> None:
        items = self.marked()
        self.stack.append(tuple(items))

    def push_short_tuple(self, length: int) -> None:
        items = self.stack[-length:]
        if len(items) < length:
            raise IndexError("the stack is empty")
        del self.stack[-length:]
        self.stack.append(tuple(items))

    def push_frozenset(self, _) -> None:
        items = self.marked()
        self.stack.append(frozenset(map(checked_key, items)))

    def append(self, _) -> None:
        item = self.pop()
        self.top(list).append(item)

    def appends(self, _) -> None:
        items = self.marked()
        self.top(list).extend(items)

    def set_item(self, _) -> None:
        value, key = self.pop(), self.pop()
        self.top(dict)[checked_key(key)] = value

    def set_items(self, _) -> None:
        items = self.marked()
        self.top(dict).update(zip(map(checked_key, items[::2]), items[1::2], strict=True))

    def add_items(self, _) -> None:
        items = self.marked()
        self.top(set).update(map(checked_key, items))

    def top(self, kind: type) -> object:
        """The object on top, to be filled."""
        found = self.stack[-1]
        if not isinstance(found, kind):
            raise refused(f"the pickle fills a {type(found).__name__} as if it were a {kind.__name__}")
        return found

    def find_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push_global(module, name)

    def find_stack_global(self, _) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise refused("the pickle names a global by something other than text")
        self.push_global(module, name)

    def push_global(self, module: str, name: str) -> None:
        full_name = f"{module}.{name}"
        if full_name not in self.globals:
            raise refused(
                f"the pickle asks for {shown(full_name)}, which is no builder of tensors or containers"
            )
        self.stack.append(self.globals[full_name])

    def call(self, _) -> None:
        arguments, builder = self.pop(), self.pop()
        if not isinstance(builder, Builder) or not isinstance(arguments, tuple):
            raise refused("the pickle calls what is no function")
        if builder.function is None:
            raise refused(f"the pickle calls {builder.name}, which it may only name")
        self.account(arguments)
        self.stack.append(builder.function(*arguments))

    def build(self, _) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Filled):
            self.account(state if isinstance(state, tuple) else (state,))
            target.fill(state)
        elif not isinstance(target, dict):  # a dictionary's attributes are of no use
            raise refused(f"the pickle changes a {type(target).__name__}")

    def account(self, arguments: tuple) -> None:
        """Raises once the calls have been given more than the file holds."""
        self.left -= 1 + len(arguments) + sum(len(item) for item in arguments if isinstance(item, SIZED))
        if self.left < 0:
            raise refused("the pickle builds more than it holds")

    def persistent_id(self, _) -> None:
        if self.persistent is None:
            raise refused("the pickle refers to something outside of it")
        self.stack.append(self.persistent(self.pop()))


def checked_key(key: object) -> object:
    """A key of a dictionary or an element of a set, if it is a plain value, a few of them, or an inert object."""
    if isinstance(key, Filled | Builder):  # known by its identity
        return key
    if type(key) is tuple and len(key) <= LONGEST_KEY and not any(type(part) is tuple for part in key):
        return tuple(map(checked_key, key))
    if type(key) not in KEYS:
        raise refused(f"the pickle uses a {type(key).__name__} as a key")
    if isinstance(key, int) and abs(key) > LARGEST_KEY:
        raise refused("the pickle uses a huge number as a key")
    return key


IGNORED = {"PROTO", "FRAME", "STOP"}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *(
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINSTRING",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
STEPS: dict[str, Callable[[_Machine, object], object]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.marked(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append(set()),
    "TUPLE": _Machine.push_tuple,
    "TUPLE1": lambda machine, _: machine.push_short_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_short_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_short_tuple(3),
    "FROZENSET": _Machine.push_frozenset,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.find_global,
    "STACK_GLOBAL": _Machine.find_stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}
