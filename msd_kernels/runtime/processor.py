"""What this processor computes in: one table of the kinds of processors, which every choice asks.

oneDNN, the library behind PyTorch's products and convolutions, accepts bfloat16 wherever there is AVX-512; without
instructions for it, a convolution is 3.9 times and a linear layer 5.6 times slower than in float32. For a type that
oneDNN does not accept, PyTorch has loops of its own, ten times slower and, in convolutions, with sums in that type.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

CAP = "MSD_KERNELS_CPU_ISA"
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
QUERIES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        name: of the kind, that of its instructions.
        flag: the capability that makes a processor one of this kind.
        cap: the entry of ``MSD_KERNELS_CPU_ISA`` up to which it is taken, its place in the compiled kernels' order.
        bfloat16: convolutions, linear layers and products of bfloat16 are computed in it, not in float32.
        float16: the capabilities of which one makes the same true of float16.
        attention_float32: attention of a type without products of its own is computed in float32; elsewhere PyTorch's
            fused kernel, which reads 16 bits and sums in float32, serves it as it comes.
        evidence: "measured", or what it was inferred from.
    """

    name: str
    flag: str | None
    cap: str
    bfloat16: bool
    float16: tuple[str, ...]
    attention_float32: bool
    evidence: str


X86_FLOAT16, ARM_FLOAT16 = ("avx512_fp16", "amx_fp16"), ("fp16_arith",)
KINDS = (
    Kind("amx", "amx_bf16", "avx512bf16", True, X86_FLOAT16, False, "measured"),
    Kind("avx512_bf16", "avx512_bf16", "avx512bf16", True, X86_FLOAT16, False, "measured"),
    Kind(
        "avx512",
        "avx512_f",
        "avx512",
        False,
        X86_FLOAT16,
        True,
        "measured; attention: inferred from linear layers",
    ),
    Kind("avx2", "avx2", "avx2", False, (), False, "measured"),
    Kind("arm bf16", "bf16", "portable", True, ARM_FLOAT16, False, "inferred from avx512_bf16"),
    Kind("other", None, "portable", False, ARM_FLOAT16, False, "inferred from avx2"),
)
CAPS = ("portable", "avx2", "avx512", "avx512bf16")


@cache
def capabilities() -> frozenset[str]:
    """The instruction sets of this processor, in PyTorch's names."""
    found = getattr(torch.cpu, "get_capabilities", None)
    if found is not None:
        return frozenset(name for name, present in found().items() if present is True)
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        flags = []
    names = {"avx512f": "avx512_f", "asimdhp": "fp16_arith"}
    return frozenset(names.get(flag, flag) for flag in flags)


def kind() -> Kind:
    """The row of this processor, capped by ``MSD_KERNELS_CPU_ISA`` as the compiled kernels are."""
    cap = os.environ.get(CAP) or CAPS[-1]
    highest = CAPS.index(cap) if cap in CAPS else len(CAPS) - 1  # the compiled kernels refuse what is none
    return _kind(highest, capabilities())


@cache
def _kind(highest: int, found: frozenset[str]) -> Kind:
    return next(k for k in KINDS if (k.flag is None or k.flag in found) and CAPS.index(k.cap) <= highest)


def computes_in(dtype: torch.dtype) -> bool:
    """Whether convolutions and products of this type are computed in it here; else in float32, rounded once."""
    if dtype not in SIXTEEN_BITS:
        return True
    row = kind()
    present = row.bfloat16 if dtype == torch.bfloat16 else not capabilities().isdisjoint(row.float16)
    return present and onednn_accepts(dtype)


@cache
def onednn_accepts(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes this 16-bit type; False where PyTorch was built without it."""
    return hasattr(torch.ops.mkldnn, QUERIES[dtype]) and getattr(torch.ops.mkldnn, QUERIES[dtype])()


def attention_in_float32(dtype: torch.dtype) -> bool:
    """Whether attention of this type is computed in float32."""
    return kind().attention_float32 and not computes_in(dtype)


def why_float32(dtype: torch.dtype, op: str) -> str | None:
    """Why a convolution, linear layer or attention of this type is computed in float32; None where it is not."""
    if not (attention_in_float32(dtype) if op == "attention" else not computes_in(dtype)):
        return None
    x86 = "sse2" in capabilities()
    lacking = {
        torch.bfloat16: "avx512_bf16" if x86 else "bf16",
        torch.float16: "avx512_fp16" if x86 else "fp16",
    }[dtype]
    return f"this processor ({kind().name}) has no {lacking}: computed in float32"


def describe() -> str:
    """What this processor does with 16-bit types, in a line."""
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in SIXTEEN_BITS}
    own = " and ".join(["float32", *(names[dtype] for dtype in SIXTEEN_BITS if computes_in(dtype))])
    converted = " and ".join(names[dtype] for dtype in SIXTEEN_BITS if not computes_in(dtype))
    slow = f"; {converted} in float32, so that autocast to it saves no time" if converted else ""
    return f"{kind().name}: computes in {own}{slow}"
