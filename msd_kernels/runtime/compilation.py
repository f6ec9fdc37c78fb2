"""What a module of Triton kernels says about compiling them with no GPU at hand.

A module ``msd_kernels/triton/*_kernels.py`` defines ``compilations(architecture)``, which yields one
:class:`Compilation` per kernel and launch configuration of the committed tables::

    def compilations(architecture: int) -> Iterator[Compilation]:
        for dtype in ("bf16", "fp32"):
            yield Compilation(_resample2d_forward_kernel, dtype, {"x": dtype, "y": dtype, "n": "i32"}, {"BLOCK": 256})

``python -m msd_kernels.aot`` finds the modules by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The type of a tensor's elements for each entry of :data:`msd_kernels.runtime.tuned.ARITHMETICS`.
ELEMENTS = {"half": "bf16", "tf32": "fp32", "float32": "fp32"}
ITEMSIZES = {"bf16": 2, "fp32": 4}
# Compiler options of every launch; said aloud because Triton's default changes with its versions.
OPTIONS = {"enable_fp_fusion": True}
REGISTERS_PER_MULTIPROCESSOR = 64 * 1024
REGISTERS_PER_THREAD = 255
THREADS_PER_WARP = 32


def register_options(warps: int, programs_per_multiprocessor: int) -> dict[str, int]:
    """Compiler options of a grid that walks its tiles, for :func:`msd_kernels.runtime.launch.programs`.

    A program that has a multiprocessor to itself gets all registers. Unless told, ptxas spills values to make room for
    a second program.
    """
    if programs_per_multiprocessor > 1:
        return {}
    threads = warps * THREADS_PER_WARP
    return {"maxnreg": min(REGISTERS_PER_THREAD, REGISTERS_PER_MULTIPROCESSOR // threads)}


@dataclass(frozen=True)
class Compilation:
    """One kernel with everything that its machine code depends on.

    Attributes:
        kernel: the ``triton.jit`` function.
        configuration: what tells this compilation from the kernel's others, for the table.
        arguments: per run-time argument its type: that of a tensor's elements ("bf16", "fp32", ...), prefixed with
            "scalar " for a number ("scalar i32"), or None for an absent tensor. Tensors are 16-byte aligned.
        constants: the ``tl.constexpr`` arguments.
        options: ``num_warps`` and what else a launch passes to the compiler.
        tensor_cores: whether each innermost loop that multiplies must do it on the tensor cores.
    """

    kernel: Any
    configuration: str
    arguments: Mapping[str, str | None]
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    tensor_cores: bool = False

    def signature(self) -> dict[str, str]:
        """The types of all arguments, in Triton's notation."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> str:
        kind = self.arguments.get(name)
        if kind is None:
            return "constexpr"
        return kind.removeprefix("scalar ") if kind.startswith("scalar ") else f"*{kind}"

    def constexprs(self) -> dict[tuple[int], Any]:
        """The values of the arguments that are known at compile time, by position."""
        values = {name: None for name, kind in self.arguments.items() if kind is None} | dict(self.constants)
        return {(self.kernel.arg_names.index(name),): value for name, value in values.items()}

    def attributes(self) -> dict[tuple[int], list]:
        """The alignment of tensors, as a real launch would find it."""
        names = self.kernel.arg_names
        types = self.signature()
        return {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")
        }
