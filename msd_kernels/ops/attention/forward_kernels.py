"""Attention, forward pass: all stages in one launch, with whole rows of scores or with a stream of them."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from msd_kernels.ops.attention import parts as attention_parts
from msd_kernels.ops.attention.parts import (
    KIND,
    LOG2_E,
    K,
    Q,
    V,
    Y,
    find_head,
    find_size,
    find_tile,
    lengths,
    load,
    log_sum_of,
    products,
    store,
)
from msd_kernels.runtime.compilation import Compilation
from msd_kernels.runtime.table import read_number


@triton.jit(do_not_specialize=["tokens", "context"])
def _attention_row_forward_kernel(
    q, k, v, y, log_sum, table, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns OWN queries of one head, writes their outputs and log-sum-exps once.

    It reads its queries, all keys and all values once, a slice of the head dimension at a time, so that the registers
    hold the scores whatever the head dimension is. The whole row of scores is there: nothing is rescaled.
    """
    tokens, context = lengths(tokens, context, PLANAR, ALIGN)
    problem, sample, head, block, rows = find_tile(table, tokens, PROBLEMS)
    head_dim, scale = find_size(problem, PROBLEMS, PLANAR, ALIGN)
    q, q_step = find_head(q, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
    k, k_step = find_head(k, problem, sample, head, K, K, PROBLEMS, ALIGN)
    v, _ = find_head(v, problem, sample, head, V, K, PROBLEMS, ALIGN)
    y, y_step = find_head(y, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    row = block * OWN + tl.arange(0, OWN)
    column = tl.arange(0, OTHER)
    scores = products(
        q, row, q_step, tokens, k, column, k_step, context,
        head_dim, PLANAR, PARTS, PARTS, PRECISION, DEPTH, STAGES,
    )  # fmt: skip
    scores *= scale * LOG2_E
    if RAGGED:
        scores = tl.where((column < context)[None, :], scores, -float("inf"))
    top = tl.max(scores, axis=1)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, axis=1)
    tl.store(log_sum + rows + row, log_sum_of(top, total), mask=row < tokens)
    p = p.to(q.dtype.element_ty)
    share = 1.0 / total
    for first in tl.range(0, head_dim, DEPTH, num_stages=STAGES):
        d = first + tl.arange(0, DEPTH)
        values = load(v, column, d, k_step, context, head_dim, PLANAR, PARTS)
        out = tl.dot(p, values, input_precision=PRECISION) * share[:, None]
        store(y, row, d, y_step, out, tokens, head_dim, PLANAR, 1)


@triton.jit
def _stream_forward_tile(
    q, k, v, y, log_sum, problem, sample, head, block, rows, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RAGGED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OWN queries of a head whose dimension is cut into LOW and HIGH elements, HIGH = 0 for one piece."""
    head_dim, scale = find_size(problem, PROBLEMS, PLANAR, ALIGN)
    q, q_step = find_head(q, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
    k, k_step = find_head(k, problem, sample, head, K, K, PROBLEMS, ALIGN)
    v, _ = find_head(v, problem, sample, head, V, K, PROBLEMS, ALIGN)
    y, y_step = find_head(y, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    row = block * OWN + tl.arange(0, OWN)
    low = tl.arange(0, LOW)
    q_low = load(q, row, low, q_step, tokens, head_dim, PLANAR, PARTS)
    sum_low = tl.zeros([OWN, LOW], tl.float32)
    if HIGH > 0:
        high = LOW + tl.arange(0, HIGH)
        q_high = load(q, row, high, q_step, tokens, head_dim, PLANAR, PARTS)
        sum_high = tl.zeros([OWN, HIGH], tl.float32)
    top = tl.full([OWN], -float("inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    for first in tl.range(0, context, OTHER, num_stages=STAGES):
        column = first + tl.arange(0, OTHER)
        keys = load(k, column, low, k_step, context, head_dim, PLANAR, PARTS)
        scores = tl.dot(q_low, tl.trans(keys), input_precision=PRECISION)
        if HIGH > 0:
            keys = load(k, column, high, k_step, context, head_dim, PLANAR, PARTS)
            scores = tl.dot(q_high, tl.trans(keys), scores, input_precision=PRECISION)
        scores *= scale * LOG2_E
        if RAGGED:
            scores = tl.where((column < context)[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        top = new_top
        p = p.to(q.dtype.element_ty)
        values = load(v, column, low, k_step, context, head_dim, PLANAR, PARTS)
        sum_low = tl.dot(p, values, sum_low * rescale[:, None], input_precision=PRECISION)
        if HIGH > 0:
            values = load(v, column, high, k_step, context, head_dim, PLANAR, PARTS)
            sum_high = tl.dot(p, values, sum_high * rescale[:, None], input_precision=PRECISION)
    tl.store(log_sum + rows + row, log_sum_of(top, total), mask=row < tokens)
    share = 1.0 / total
    store(y, row, low, y_step, sum_low * share[:, None], tokens, head_dim, PLANAR, 1)
    if HIGH > 0:
        store(y, row, high, y_step, sum_high * share[:, None], tokens, head_dim, PLANAR, 1)


@triton.jit(do_not_specialize=["tokens", "context"])
def _attention_stream_forward_kernel(
    q, k, v, y, log_sum, table, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """A program owns some queries of one head, writes their outputs and log-sum-exps once.

    It reads its queries once and streams blocks of keys and values past them: sums so far are rescaled whenever a
    larger score comes. Each kind of head has a body of its own.
    """
    tokens, context = lengths(tokens, context, PLANAR, ALIGN)
    problem, sample, head, block, rows = find_tile(table, tokens, PROBLEMS)
    kind = read_number(problem, KIND, PROBLEMS)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _stream_forward_tile(
                q, k, v, y, log_sum, problem, sample, head, block, rows, tokens, context,
                PROBLEMS, PLANAR, PARTS, ALIGN, PRECISION, RAGGED,
                KINDS[i][0], KINDS[i][1], KINDS[i][2], KINDS[i][3], KINDS[i][4],
            )  # fmt: skip


KERNELS = {
    ("forward", False): _attention_row_forward_kernel,
    ("forward", True): _attention_stream_forward_kernel,
}


def compilations(architecture: int) -> Iterator[Compilation]:
    """The launches that count, see :mod:`msd_kernels.ops.attention.parts`."""
    return attention_parts.compilations(architecture, KERNELS)
