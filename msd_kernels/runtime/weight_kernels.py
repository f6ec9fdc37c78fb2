"""The kernel that brings the weights of all stages into one buffer, and their gradients out of one.

Triton reads the types of arguments from annotations, which must be objects for that and no strings.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.runtime.compilation import Compilation
from msd_kernels.runtime.weight_buffers import BLOCK, STAGES_AT_ONCE

KINDS = ("address", "elements", "channels", "start")
NUMBERS = tuple(f"{kind}{stage}" for stage in range(STAGES_AT_ONCE) for kind in KINDS)


# fmt: off
@triton.jit(do_not_specialize=NUMBERS)
def _weights_kernel(
    buffer, example,
    address0: tl.int64, elements0: tl.int64, channels0: tl.int64, start0: tl.int64,
    address1: tl.int64, elements1: tl.int64, channels1: tl.int64, start1: tl.int64,
    address2: tl.int64, elements2: tl.int64, channels2: tl.int64, start2: tl.int64,
    address3: tl.int64, elements3: tl.int64, channels3: tl.int64, start3: tl.int64,
    address4: tl.int64, elements4: tl.int64, channels4: tl.int64, start4: tl.int64,
    address5: tl.int64, elements5: tl.int64, channels5: tl.int64, start5: tl.int64,
    address6: tl.int64, elements6: tl.int64, channels6: tl.int64, start6: tl.int64,
    address7: tl.int64, elements7: tl.int64, channels7: tl.int64, start7: tl.int64,
    TAPS: tl.constexpr, UNPACK: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one stage's weight, read once and written once where they lie one after another.

    At ``start`` the buffer holds a weight as ``[O, taps, C]``; its own memory, at ``address``, holds it as
    ``[O, C, taps]``. Elements are converted on the way. ``example`` tells the type of the weights' elements.
    """
    addresses = (address0, address1, address2, address3, address4, address5, address6, address7)
    sizes = (elements0, elements1, elements2, elements3, elements4, elements5, elements6, elements7)
    widths = (channels0, channels1, channels2, channels3, channels4, channels5, channels6, channels7)
    starts = (start0, start1, start2, start3, start4, start5, start6, start7)
    index = tl.program_id(0)
    tile, first = index.to(tl.int64), index.to(tl.int64) * 0
    address, elements, channels, start = address0, elements0, channels0, start0
    for stage in tl.static_range(8):
        here = index >= first
        address = tl.where(here, addresses[stage], address)
        elements = tl.where(here, sizes[stage], elements)
        channels = tl.where(here, widths[stage], channels)
        start = tl.where(here, starts[stage], start)
        tile = tl.where(here, index - first, tile)
        first += tl.cdiv(sizes[stage], BLOCK)
    written = tile.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    width = channels.to(tl.int32)
    row, place = written // (width * TAPS), written % (width * TAPS)
    weight = address.to(example.dtype)
    if UNPACK:
        read = (row * TAPS + place % TAPS) * width + place // TAPS
        value = tl.load(buffer + start + read, mask=written < elements)
        tl.store(weight + written, value, mask=written < elements)
    else:
        read = (row * width + place % width) * TAPS + place // width
        value = tl.load(weight + read, mask=written < elements)
        tl.store(buffer + start + written, value, mask=written < elements)
# fmt: on


def compilations(architecture: int) -> Iterator[Compilation]:
    numbers = dict.fromkeys(NUMBERS, "scalar i64")
    for buffer, example, unpack in (("bf16", "fp32", False), ("fp32", "fp32", False), ("fp32", "fp32", True)):
        for taps in (1, 9):
            yield Compilation(
                _weights_kernel,
                f"{example} {'from' if unpack else 'to'} {buffer}, {taps} taps",
                {"buffer": buffer, "example": example, **numbers},
                {"TAPS": taps, "UNPACK": unpack, "BLOCK": BLOCK},
            )
