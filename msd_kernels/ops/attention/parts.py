"""What the attention kernels share: finding a tile's head, reading blocks of it, and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl

from msd_kernels.layouts import AttentionLayout
from msd_kernels.ops.attention.plan import FIELDS, plan
from msd_kernels.runtime import tuned
from msd_kernels.runtime.compilation import ELEMENTS, ITEMSIZES, Compilation
from msd_kernels.runtime.table import find_problem, read_number, read_offset

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

KIND: tl.constexpr = tl.constexpr(FIELDS.index("kind"))
Q: tl.constexpr = tl.constexpr(FIELDS.index("q"))
K: tl.constexpr = tl.constexpr(FIELDS.index("k"))
V: tl.constexpr = tl.constexpr(FIELDS.index("v"))
Y: tl.constexpr = tl.constexpr(FIELDS.index("y"))
_BLOCKS: tl.constexpr = tl.constexpr(FIELDS.index("blocks"))
_HEADS: tl.constexpr = tl.constexpr(FIELDS.index("heads"))
_HEAD_DIM: tl.constexpr = tl.constexpr(FIELDS.index("head_dim"))
_SCALE: tl.constexpr = tl.constexpr(FIELDS.index("scale"))
_ROWS: tl.constexpr = tl.constexpr(FIELDS.index("rows"))


@triton.jit
def find_tile(table, tokens, PROBLEMS: tl.constexpr):
    """The stage, sample, head and block of this program, and its head's first entry in log_sum."""
    problem, tile = find_problem(table, tl.program_id(0), PROBLEMS)
    blocks, heads = read_number(problem, _BLOCKS, PROBLEMS), read_number(problem, _HEADS, PROBLEMS)
    head = tile // blocks
    rows = read_offset(problem, _ROWS, PROBLEMS) + head.to(tl.int64) * tokens
    return problem, head // heads, head % heads, tile % blocks, rows


@triton.jit
def lengths(tokens, context, PLANAR: tl.constexpr, ALIGN: tl.constexpr):
    """Both numbers of tokens. Where tokens lie side by side, they are multiples of ALIGN, which makes loads wide."""
    MULTIPLE: tl.constexpr = ALIGN if PLANAR else 1
    return tokens // MULTIPLE * MULTIPLE, context // MULTIPLE * MULTIPLE


@triton.jit
def find_size(problem, PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, ALIGN: tl.constexpr):
    """The head dimension of a stage, and the factor on its scores."""
    head_dim = read_number(problem, _HEAD_DIM, PROBLEMS, 1 if PLANAR else ALIGN)
    scale = tl.load(problem + _SCALE * PROBLEMS).to(tl.float64, bitcast=True).to(tl.float32)
    return head_dim, scale


@triton.jit
def find_head(
    tensor, problem, sample, head,
    FIRST: tl.constexpr, LIKE: tl.constexpr, PROBLEMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The first element of a head, and the distance between its tokens (planar: along the head dimension).

    ``FIRST`` is the field of the tensor's first element, ``LIKE`` that of the tensor whose distances are its own.
    """
    start = read_offset(problem, FIRST, PROBLEMS, ALIGN)
    start += sample * read_offset(problem, LIKE + 1, PROBLEMS, ALIGN)
    start += head * read_offset(problem, LIKE + 2, PROBLEMS, ALIGN)
    return tensor + start, read_number(problem, LIKE + 3, PROBLEMS, ALIGN)


@triton.jit
def places(token, d, step, PLANAR: tl.constexpr, PARTS: tl.constexpr):
    """The offsets of ``[token, d]`` in a head."""
    return (token * (1 if PLANAR else step))[:, None] + (d * (step if PLANAR else PARTS))[None, :]


@triton.jit
def load(head, token, d, step, tokens, head_dim, PLANAR: tl.constexpr, PARTS: tl.constexpr):
    """``[token, d]`` of a head, zero outside of it."""
    live = (token < tokens)[:, None] & (d < head_dim)[None, :]
    return tl.load(head + places(token, d, step, PLANAR, PARTS), mask=live, other=0.0)


@triton.jit
def store(head, token, d, step, value, tokens, head_dim, PLANAR: tl.constexpr, PARTS: tl.constexpr):
    """Writes ``[token, d]`` of a head."""
    live = (token < tokens)[:, None] & (d < head_dim)[None, :]
    tl.store(head + places(token, d, step, PLANAR, PARTS), value.to(head.dtype.element_ty), mask=live)


@triton.jit
def products(
    a, a_token, a_step, a_tokens, b, b_token, b_step, b_tokens, head_dim,
    PLANAR: tl.constexpr, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``a @ b.T`` of tokens of two heads, float32, by slices of BLOCK_D of the head dimension."""
    total = tl.zeros([a_token.shape[0], b_token.shape[0]], tl.float32)
    for first in tl.range(0, head_dim, BLOCK_D, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_D)
        left = load(a, a_token, d, a_step, a_tokens, head_dim, PLANAR, A_PARTS)
        right = load(b, b_token, d, b_step, b_tokens, head_dim, PLANAR, B_PARTS)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def log_sum_of(top, total):
    """The log-sum-exp of scores from the largest, in units of log(2), and the sum relative to it.

    From 2^24 on float32 has no fractions, so that exp(score - log_sum) would be any number: NaN instead.
    """
    log_sum = (top + tl.log2(total)) * LN_2
    return tl.where(tl.abs(log_sum) < 16777216.0, log_sum, float("nan"))


# The launches that count: head dimensions per stage, tokens, memory order.
_HALF = {
    "EDM": ((384, 256, 32), 256, "nthd"),
    "EDM interleaved": ((384, 256, 32), 256, "nthdp"),
    "ragged": ((384, 160, 40), 250, "nthpd"),
    "LDM": ((32,), 1024, "nthpd"),
    "EDM 32x32": ((384, 256, 32), 1024, "nthd"),
}
_FLOAT32 = {"EDM": _HALF["EDM"]}
CASES = {"half": _HALF, "tf32": _FLOAT32, "float32": _FLOAT32}


def compilations(architecture: int, kernels: Mapping[tuple[str, bool], object]) -> Iterator[Compilation]:
    """The launches that count for each of ``kernels``, which are keyed as a module's KERNELS."""
    scalars = {
        "log_sum": "fp32",
        "delta": "fp32",
        "table": "i64",
        "tokens": "scalar i32",
        "context": "scalar i32",
    }
    for arithmetic, cases in CASES.items():
        element = ELEMENTS[arithmetic]
        for name, (head_dims, tokens, order) in cases.items():
            layout = AttentionLayout(*[(1,) * len(head_dims)] * 2, head_dims, tokens, tokens, order, None)
            for (which, streams), kernel in kernels.items():
                parameters = tuned.attention(architecture, arithmetic, which)
                found = plan(layout, which, parameters, arithmetic, ITEMSIZES[element], torch.device("cpu"))
                if found.streams != streams:
                    continue
                yield Compilation(
                    kernel,
                    f"{arithmetic} {name}",
                    {n: scalars.get(n, element) for n in kernel.arg_names if n not in found.constants},
                    found.constants,
                    {"num_warps": found.warps},
                    tensor_cores=arithmetic != "float32",
                )
