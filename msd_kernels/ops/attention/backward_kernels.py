"""Attention, backward pass: one launch owns the gradients of queries, one those of keys and values.

With p = softmax(s) taken again from the log-sum-exp, and dp = dy @ v.T::

    ds = p * (dp - delta),  delta = sum(p * dp) = sum(dy * y)
    dq = scale * ds @ k,    dk = scale * ds.T @ q,    dv = p.T @ dy

Every sum is one program's, in a fixed order: no atomics. The first launch leaves delta for the second one.
"""

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
    products,
    store,
)
from msd_kernels.runtime.compilation import Compilation
from msd_kernels.runtime.table import read_number


@triton.jit(do_not_specialize=["tokens", "context"])
def _attention_row_dq_kernel(
    dy, q, k, v, log_sum, dq, delta, table, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns OWN queries of one head, writes delta = sum(p * dp) and their gradients once.

    It reads its queries and cotangents and all values once and all keys twice, a slice of the head dimension at a time.
    """
    tokens, context = lengths(tokens, context, PLANAR, ALIGN)
    problem, sample, head, block, rows = find_tile(table, tokens, PROBLEMS)
    head_dim, scale = find_size(problem, PROBLEMS, PLANAR, ALIGN)
    dy, y_step = find_head(dy, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    q, q_step = find_head(q, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
    k, k_step = find_head(k, problem, sample, head, K, K, PROBLEMS, ALIGN)
    v, _ = find_head(v, problem, sample, head, V, K, PROBLEMS, ALIGN)
    row = block * OWN + tl.arange(0, OWN)
    column = tl.arange(0, OTHER)
    live = row < tokens
    scores = products(
        q, row, q_step, tokens, k, column, k_step, context,
        head_dim, PLANAR, PARTS, PARTS, PRECISION, DEPTH, STAGES,
    )  # fmt: skip
    log_sums = tl.load(log_sum + rows + row, mask=live, other=0.0) * LOG2_E
    p = tl.exp2(scores * (scale * LOG2_E) - log_sums[:, None])
    if RAGGED:
        p = tl.where((column < context)[None, :], p, 0.0)
    dp = products(
        dy, row, y_step, tokens, v, column, k_step, context,
        head_dim, PLANAR, 1, PARTS, PRECISION, DEPTH, STAGES,
    )  # fmt: skip
    deltas = tl.sum(p * dp, axis=1)
    if delta is not None:
        tl.store(delta + rows + row, deltas, mask=live)
    if dq is not None:
        dq, _ = find_head(dq, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
        ds = (p * (dp - deltas[:, None])).to(q.dtype.element_ty)
        for first in tl.range(0, head_dim, DEPTH, num_stages=STAGES):
            d = first + tl.arange(0, DEPTH)
            keys = load(k, column, d, k_step, context, head_dim, PLANAR, PARTS)
            gradient = tl.dot(ds, keys, input_precision=PRECISION) * scale
            store(dq, row, d, q_step, gradient, tokens, head_dim, PLANAR, PARTS)


@triton.jit(do_not_specialize=["tokens", "context"])
def _attention_row_dkv_kernel(
    dy, q, k, v, log_sum, delta, dk, dv, table, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns OWN context tokens of one head and writes the gradients of their keys and values once.

    It reads its keys and values once and all queries and cotangents twice, a slice of the head dimension at a time.
    """
    tokens, context = lengths(tokens, context, PLANAR, ALIGN)
    problem, sample, head, block, rows = find_tile(table, tokens, PROBLEMS)
    head_dim, scale = find_size(problem, PROBLEMS, PLANAR, ALIGN)
    dy, y_step = find_head(dy, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    q, q_step = find_head(q, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
    k, k_step = find_head(k, problem, sample, head, K, K, PROBLEMS, ALIGN)
    v, _ = find_head(v, problem, sample, head, V, K, PROBLEMS, ALIGN)
    row = block * OWN + tl.arange(0, OWN)
    column = tl.arange(0, OTHER)
    live = column < tokens
    scores = products(
        k, row, k_step, context, q, column, q_step, tokens,
        head_dim, PLANAR, PARTS, PARTS, PRECISION, DEPTH, STAGES,
    )  # fmt: skip
    log_sums = tl.load(log_sum + rows + column, mask=live, other=float("inf")) * LOG2_E
    p = tl.exp2(scores * (scale * LOG2_E) - log_sums[None, :])
    if dv is not None:
        dv, _ = find_head(dv, problem, sample, head, V, K, PROBLEMS, ALIGN)
        rounded = p.to(q.dtype.element_ty)
        for first in tl.range(0, head_dim, DEPTH, num_stages=STAGES):
            d = first + tl.arange(0, DEPTH)
            cotangents = load(dy, column, d, y_step, tokens, head_dim, PLANAR, 1)
            gradient = tl.dot(rounded, cotangents, input_precision=PRECISION)
            store(dv, row, d, k_step, gradient, context, head_dim, PLANAR, PARTS)
    if dk is not None:
        dk, _ = find_head(dk, problem, sample, head, K, K, PROBLEMS, ALIGN)
        dp = products(
            v, row, k_step, context, dy, column, y_step, tokens,
            head_dim, PLANAR, PARTS, 1, PRECISION, DEPTH, STAGES,
        )  # fmt: skip
        deltas = tl.load(delta + rows + column, mask=live, other=0.0)
        ds = (p * (dp - deltas[None, :])).to(q.dtype.element_ty)
        for first in tl.range(0, head_dim, DEPTH, num_stages=STAGES):
            d = first + tl.arange(0, DEPTH)
            queries = load(q, column, d, q_step, tokens, head_dim, PLANAR, PARTS)
            gradient = tl.dot(ds, queries, input_precision=PRECISION) * scale
            store(dk, row, d, k_step, gradient, context, head_dim, PLANAR, PARTS)


@triton.jit
def _stream_dq_tile(
    dy, q, k, v, y, log_sum, dq, delta, problem, sample, head, block, rows, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RAGGED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OWN queries of a head whose dimension is cut into LOW and HIGH elements, HIGH = 0 for one piece."""
    head_dim, scale = find_size(problem, PROBLEMS, PLANAR, ALIGN)
    dy, y_step = find_head(dy, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    y, _ = find_head(y, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    row = block * OWN + tl.arange(0, OWN)
    live = row < tokens
    low = tl.arange(0, LOW)
    dy_low = load(dy, row, low, y_step, tokens, head_dim, PLANAR, 1)
    y_part = load(y, row, low, y_step, tokens, head_dim, PLANAR, 1)
    deltas = tl.sum(dy_low.to(tl.float32) * y_part.to(tl.float32), axis=1)
    if HIGH > 0:
        high = LOW + tl.arange(0, HIGH)
        dy_high = load(dy, row, high, y_step, tokens, head_dim, PLANAR, 1)
        y_part = load(y, row, high, y_step, tokens, head_dim, PLANAR, 1)
        deltas += tl.sum(dy_high.to(tl.float32) * y_part.to(tl.float32), axis=1)
    if delta is not None:
        tl.store(delta + rows + row, deltas, mask=live)
    if dq is not None:
        q, q_step = find_head(q, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
        k, k_step = find_head(k, problem, sample, head, K, K, PROBLEMS, ALIGN)
        v, _ = find_head(v, problem, sample, head, V, K, PROBLEMS, ALIGN)
        dq, _ = find_head(dq, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
        log_sums = tl.load(log_sum + rows + row, mask=live, other=0.0) * LOG2_E
        q_low = load(q, row, low, q_step, tokens, head_dim, PLANAR, PARTS)
        sum_low = tl.zeros([OWN, LOW], tl.float32)
        if HIGH > 0:
            q_high = load(q, row, high, q_step, tokens, head_dim, PLANAR, PARTS)
            sum_high = tl.zeros([OWN, HIGH], tl.float32)
        for first in tl.range(0, context, OTHER, num_stages=STAGES):
            column = first + tl.arange(0, OTHER)
            keys_low = load(k, column, low, k_step, context, head_dim, PLANAR, PARTS)
            values = load(v, column, low, k_step, context, head_dim, PLANAR, PARTS)
            scores = tl.dot(q_low, tl.trans(keys_low), input_precision=PRECISION)
            dp = tl.dot(dy_low, tl.trans(values), input_precision=PRECISION)
            if HIGH > 0:
                keys_high = load(k, column, high, k_step, context, head_dim, PLANAR, PARTS)
                values = load(v, column, high, k_step, context, head_dim, PLANAR, PARTS)
                scores = tl.dot(q_high, tl.trans(keys_high), scores, input_precision=PRECISION)
                dp = tl.dot(dy_high, tl.trans(values), dp, input_precision=PRECISION)
            p = tl.exp2(scores * (scale * LOG2_E) - log_sums[:, None])
            if RAGGED:
                p = tl.where((column < context)[None, :], p, 0.0)
            ds = (p * (dp - deltas[:, None])).to(q.dtype.element_ty)
            sum_low = tl.dot(ds, keys_low, sum_low, input_precision=PRECISION)
            if HIGH > 0:
                sum_high = tl.dot(ds, keys_high, sum_high, input_precision=PRECISION)
        store(dq, row, low, q_step, sum_low * scale, tokens, head_dim, PLANAR, PARTS)
        if HIGH > 0:
            store(dq, row, high, q_step, sum_high * scale, tokens, head_dim, PLANAR, PARTS)


@triton.jit(do_not_specialize=["tokens", "context"])
def _attention_stream_dq_kernel(
    dy, q, k, v, y, log_sum, dq, delta, table, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """A program owns some queries of one head, writes delta = sum(dy * y) and their gradients once.

    It reads its queries, cotangents and outputs once and streams blocks of keys and values past them.
    """
    tokens, context = lengths(tokens, context, PLANAR, ALIGN)
    problem, sample, head, block, rows = find_tile(table, tokens, PROBLEMS)
    kind = read_number(problem, KIND, PROBLEMS)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _stream_dq_tile(
                dy, q, k, v, y, log_sum, dq, delta, problem, sample, head, block, rows, tokens, context,
                PROBLEMS, PLANAR, PARTS, ALIGN, PRECISION, RAGGED,
                KINDS[i][0], KINDS[i][1], KINDS[i][2], KINDS[i][3], KINDS[i][4],
            )  # fmt: skip


@triton.jit
def _stream_dkv_tile(
    dy, q, k, v, log_sum, delta, dk, dv, problem, sample, head, block, rows, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OWN context tokens of a head whose dimension is cut into LOW and HIGH elements, HIGH = 0 for one piece."""
    head_dim, scale = find_size(problem, PROBLEMS, PLANAR, ALIGN)
    dy, y_step = find_head(dy, problem, sample, head, Y, Y, PROBLEMS, ALIGN)
    q, q_step = find_head(q, problem, sample, head, Q, Q, PROBLEMS, ALIGN)
    k, k_step = find_head(k, problem, sample, head, K, K, PROBLEMS, ALIGN)
    v, _ = find_head(v, problem, sample, head, V, K, PROBLEMS, ALIGN)
    row = block * OWN + tl.arange(0, OWN)
    low = tl.arange(0, LOW)
    k_low = load(k, row, low, k_step, context, head_dim, PLANAR, PARTS)
    v_low = load(v, row, low, k_step, context, head_dim, PLANAR, PARTS)
    dk_low = tl.zeros([OWN, LOW], tl.float32)
    dv_low = tl.zeros([OWN, LOW], tl.float32)
    if HIGH > 0:
        high = LOW + tl.arange(0, HIGH)
        k_high = load(k, row, high, k_step, context, head_dim, PLANAR, PARTS)
        v_high = load(v, row, high, k_step, context, head_dim, PLANAR, PARTS)
        dk_high = tl.zeros([OWN, HIGH], tl.float32)
        dv_high = tl.zeros([OWN, HIGH], tl.float32)
    for first in tl.range(0, tokens, OTHER, num_stages=STAGES):
        column = first + tl.arange(0, OTHER)
        live = column < tokens
        q_low = load(q, column, low, q_step, tokens, head_dim, PLANAR, PARTS)
        dy_low = load(dy, column, low, y_step, tokens, head_dim, PLANAR, 1)
        scores = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)
        if HIGH > 0:
            q_high = load(q, column, high, q_step, tokens, head_dim, PLANAR, PARTS)
            dy_high = load(dy, column, high, y_step, tokens, head_dim, PLANAR, 1)
            scores = tl.dot(k_high, tl.trans(q_high), scores, input_precision=PRECISION)
        log_sums = tl.load(log_sum + rows + column, mask=live, other=float("inf")) * LOG2_E
        p = tl.exp2(scores * (scale * LOG2_E) - log_sums[None, :])
        if dv is not None:
            rounded = p.to(q.dtype.element_ty)
            dv_low = tl.dot(rounded, dy_low, dv_low, input_precision=PRECISION)
            if HIGH > 0:
                dv_high = tl.dot(rounded, dy_high, dv_high, input_precision=PRECISION)
        if dk is not None:
            dp = tl.dot(v_low, tl.trans(dy_low), input_precision=PRECISION)
            if HIGH > 0:
                dp = tl.dot(v_high, tl.trans(dy_high), dp, input_precision=PRECISION)
            deltas = tl.load(delta + rows + column, mask=live, other=0.0)
            ds = (p * (dp - deltas[None, :])).to(q.dtype.element_ty)
            dk_low = tl.dot(ds, q_low, dk_low, input_precision=PRECISION)
            if HIGH > 0:
                dk_high = tl.dot(ds, q_high, dk_high, input_precision=PRECISION)
    if dv is not None:
        dv, _ = find_head(dv, problem, sample, head, V, K, PROBLEMS, ALIGN)
        store(dv, row, low, k_step, dv_low, context, head_dim, PLANAR, PARTS)
        if HIGH > 0:
            store(dv, row, high, k_step, dv_high, context, head_dim, PLANAR, PARTS)
    if dk is not None:
        dk, _ = find_head(dk, problem, sample, head, K, K, PROBLEMS, ALIGN)
        store(dk, row, low, k_step, dk_low * scale, context, head_dim, PLANAR, PARTS)
        if HIGH > 0:
            store(dk, row, high, k_step, dk_high * scale, context, head_dim, PLANAR, PARTS)


@triton.jit(do_not_specialize=["tokens", "context"])
def _attention_stream_dkv_kernel(
    dy, q, k, v, log_sum, delta, dk, dv, table, tokens, context,
    PROBLEMS: tl.constexpr, PLANAR: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """A program owns some context tokens of one head and writes the gradients of their keys and values once.

    It reads its keys and values once and streams blocks of queries and cotangents past them.
    """
    tokens, context = lengths(tokens, context, PLANAR, ALIGN)
    problem, sample, head, block, rows = find_tile(table, tokens, PROBLEMS)
    kind = read_number(problem, KIND, PROBLEMS)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            _stream_dkv_tile(
                dy, q, k, v, log_sum, delta, dk, dv, problem, sample, head, block, rows, tokens, context,
                PROBLEMS, PLANAR, PARTS, ALIGN, PRECISION,
                KINDS[i][0], KINDS[i][1], KINDS[i][2], KINDS[i][3], KINDS[i][4],
            )  # fmt: skip


KERNELS = {
    ("dq", False): _attention_row_dq_kernel,
    ("dq", True): _attention_stream_dq_kernel,
    ("dkv", False): _attention_row_dkv_kernel,
    ("dkv", True): _attention_stream_dkv_kernel,
}


def compilations(architecture: int) -> Iterator[Compilation]:
    """The launches that count, see :mod:`msd_kernels.ops.attention.parts`."""
    return attention_parts.compilations(architecture, KERNELS)
