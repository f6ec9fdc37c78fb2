"""Values, gradients, contract and errors of attention."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_checks import check_close, dense, pixels_as_tokens, run, unpack
from helpers import dispatcher_calls, each_backend, poisoned_memory, stage_batch
from msd_kernels import StageBatch
from msd_kernels.dispatch.backends import use
from msd_kernels.ops.attention import BACKENDS, attention, explain, library

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda t: str(t)[6:]
)
LAYOUTS = pytest.mark.parametrize("layout", ["interleaved", "per_head", "blocked"])
# Samples, heads, query tokens, context tokens, head dimension. The last is beyond what the library's backward through
# matrix products takes.
SHAPES = [
    (2, 1, 64, 64, 384),
    (1, 2, 16, 16, 160),
    (2, 3, 9, 5, 40),
    (3, 2, 7, 13, 24),
    (1, 1, 1, 1, 32),
    (2, 2, 5, 1, 8),
    (1, 3, 1, 6, 1),
    (1, 1, 272, 256, 72),
]


def check(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float | None = None) -> None:
    with poisoned_memory():
        found = run(lambda *inputs: attention(*inputs, scale=scale), (q, k, v), dy)
    check_close(found, q, k, v, dy, scale)


@each_backend(BACKENDS)
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_formula(shape, dtype, backend, generator):
    check(*dense(generator, shape, dtype))


@each_backend(BACKENDS)
@DTYPES
@pytest.mark.parametrize("shape", [(2, 2, 16, 12, 24), (1, 1, 24, 24, 160)], ids=str)
def test_attention_of_scores_of_magnitude_100(shape, dtype, backend, generator):
    q, k, v, dy = dense(generator, shape, dtype)
    check(q * 100, k, v, dy)
    check(q, k, v, dy, scale=100 / math.sqrt(shape[-1]))


@each_backend(BACKENDS)
@DTYPES
@pytest.mark.parametrize("shape", [(2, 2, 16, 12, 24), (1, 1, 24, 24, 160), (1, 1, 272, 256, 8)], ids=str)
def test_attention_of_off_centre_inputs(shape, dtype, backend, generator):
    q, k, v, dy = dense(generator, shape, dtype)
    check(q, k, v + 100, dy)
    check(q + 3, k + 3, v - 100, dy + 3)


@each_backend(BACKENDS)
def test_attention_of_one_context_token_is_that_token(backend, generator):
    q, k, v, dy = dense(generator, (2, 3, 5, 1, 8))
    y, dq, dk, dv = run(attention, (q, k, v), dy)
    assert torch.equal(y, v.expand_as(q))
    check_close((y, dq, dk, dv), q, k, v, dy)


@each_backend(BACKENDS)
def test_attention_of_non_contiguous_tensors(backend, generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator)

    packed = draw(2, 7, 3, 4, 8).transpose(1, 3)
    views = {
        "tokens first": [draw(2, 7, 4, 8).transpose(1, 2) for _ in range(3)],
        "parts of one tensor": list(packed.unbind(2)),
        "head dimension outside": [draw(2, 4, 8, 7).mT for _ in range(3)],
        "every second": [draw(2, 8, 14, 16)[:, ::2, ::2, ::2] for _ in range(3)],
        "expanded": [draw(1, 4, 1, 8).expand(2, 4, 7, 8) for _ in range(3)],
        "mixed": [draw(2, 7, 4, 8).transpose(1, 2), draw(2, 4, 7, 8), draw(2, 4, 8, 7).mT],
    }
    for q, k, v in views.values():
        check(q, k, v, draw(2, 4, 7, 8))
        check(q, k, v, draw(2, 7, 4, 8).transpose(1, 2))
        check(q, k, v, draw(2, 1, 1, 8).expand(2, 4, 7, 8))


def test_attention_returns_the_order_of_q(generator):
    q, k, v, _ = dense(generator, (2, 3, 5, 4, 8), torch.bfloat16)
    assert attention(q, k, v).is_contiguous()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert attention(q, k, v).transpose(1, 2).is_contiguous()
    assert attention(q, k, v).dtype == torch.bfloat16


@each_backend(BACKENDS)
@DTYPES
@LAYOUTS
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_attention_of_a_packed_tensor_equals_the_formula(memory_format, layout, dtype, backend, generator):
    for batch, heads, head_dim, height, width in ((2, 1, 96, 4, 5), (1, 3, 24, 3, 3), (2, 2, 1, 1, 1)):
        x = torch.randn(batch, 3 * heads * head_dim, height, width, generator=generator).to(dtype)
        x = x.contiguous(memory_format=memory_format)
        dy = torch.randn(batch, heads * head_dim, height, width, generator=generator).to(dtype)
        for cotangent in (dy, dy.contiguous(memory_format=torch.channels_last)):
            with poisoned_memory():
                y, dx = run(lambda t, h=heads: attention(t, num_heads=h, layout=layout), [x], cotangent)
            assert y.is_contiguous(memory_format=memory_format)
            assert dx.stride() == x.stride()
            parts = [y.reshape(batch, heads, head_dim, -1).mT, *unpack(dx, heads, layout)]
            check_close(parts, *unpack(x, heads, layout), dy.reshape(batch, heads, head_dim, -1).mT)


STAGES = [
    ((2, 0, 1), (384, 256, 32), 1),
    ((1, 2, 1), (48, 24, 8), (3, 1, 2)),
    ((0, 0, 2), (16, 8, 40), (2, 1, 5)),
    ((3,), (24,), 3),
    ((0, 0), (4, 8), 1),
]


@each_backend(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("counts", "channels", "num_heads"), STAGES, ids=str)
def test_attention_of_stages_equals_separate_calls_bit_for_bit(
    counts, channels, num_heads, dtype, backend, generator
):
    q = stage_batch(generator, counts, channels, 4, 3, dtype=dtype, requires_grad=True)
    k, v = (stage_batch(generator, counts, channels, 5, 1, dtype=dtype, requires_grad=True) for _ in "kv")
    dy = stage_batch(generator, counts, channels, 4, 3, dtype=dtype)
    with poisoned_memory():
        y = attention(q, k, v, num_heads=num_heads)
        gradients = torch.autograd.grad(y.values, [b.values for b in (q, k, v)], dy.values)
    batches = [q, k, v, dy, y, *(b.with_values(g) for b, g in zip((q, k, v), gradients, strict=True))]
    heads = num_heads if isinstance(num_heads, tuple) else (num_heads,) * len(counts)
    for *segments, h in zip(*(b.segments() for b in batches), heads, strict=True):
        *inputs, d, y_s, dq, dk, dv = (pixels_as_tokens(t.detach(), h) for t in segments)
        alone = run(attention, inputs, d)
        assert all(torch.equal(a, b) for a, b in zip((y_s, dq, dk, dv), alone, strict=True))


@each_backend(BACKENDS)
@LAYOUTS
@pytest.mark.parametrize(("counts", "channels", "num_heads"), STAGES, ids=str)
def test_attention_of_packed_stages_equals_separate_calls_bit_for_bit(
    counts, channels, num_heads, layout, backend, generator
):
    x = stage_batch(generator, counts, [3 * c for c in channels], 3, 4, requires_grad=True)
    y = attention(x, num_heads=num_heads, layout=layout)
    assert (y.counts, y.channels, y.height, y.width) == (counts, channels, 3, 4)
    dy = stage_batch(generator, counts, channels, 3, 4)
    (gradient,) = torch.autograd.grad(y.values, x.values, dy.values)
    heads = num_heads if isinstance(num_heads, tuple) else (num_heads,) * len(counts)
    batches = (x, y, x.with_values(gradient), dy)
    for segment, y_s, dx, d, h in zip(*(b.segments() for b in batches), heads, strict=True):
        alone = run(lambda t, h=h: attention(t, num_heads=h, layout=layout), [segment], d)
        assert all(torch.equal(a, b) for a, b in zip((y_s, dx), alone, strict=True))


@each_backend(BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [64, 320])
def test_attention_repeats_bit_for_bit(tokens, dtype, backend, generator):
    *inputs, dy = dense(generator, (2, 2, tokens, tokens, 40), dtype)
    first, second = (run(attention, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend(BACKENDS)
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_computes_the_wanted_gradients_only(dtype, wanted, backend, generator):
    *inputs, dy = dense(generator, (1, 2, 6, 5, 8), dtype)
    full = run(attention, inputs, dy)[1:]
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(inputs, wanted, strict=True)]
    attention(*leaves).backward(dy)
    for leaf, gradient, flag in zip(leaves, full, wanted, strict=True):
        assert torch.equal(leaf.grad, gradient) if flag else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda t: str(t)[6:])
def test_attention_without_a_fused_kernel_equals_the_formula(dtype, monkeypatch, generator):
    """The library's way through matrix products, in chunks of one sample: CUDA's where no kernel of SDPA fits."""
    monkeypatch.setattr(library, "_fused_forward", lambda *_: None)
    monkeypatch.setattr(library, "_takes_fused_backward", lambda *_: False)
    monkeypatch.setitem(library.SCORES_AT_ONCE, "cpu", 1)
    with use("library"):
        for shape in SHAPES[:6]:
            check(*dense(generator, shape, dtype))


def test_attention_of_no_samples_is_empty():
    x = torch.empty(0, 12, 3, 3, requires_grad=True)
    y = attention(x, layout="blocked")
    y.sum().backward()
    assert y.shape == (0, 4, 3, 3)
    assert x.grad.shape == x.shape


@each_backend(BACKENDS)
def test_attention_derivatives_agree_with_differences(backend, generator):
    leaves = [torch.randn(1, 2, n, 3, generator=generator).double().requires_grad_() for n in (2, 3, 3)]
    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.autograd.gradgradcheck(attention, leaves)
    x = torch.randn(1, 12, 1, 3, generator=generator).double().requires_grad_()
    for layout in ("interleaved", "per_head", "blocked"):
        assert torch.autograd.gradcheck(lambda t, o=layout: attention(t, num_heads=2, layout=o), x)
        assert torch.autograd.gradgradcheck(lambda t, o=layout: attention(t, num_heads=2, layout=o), x)


def test_attention_second_derivatives_of_some_inputs(generator):
    q, k, v = (torch.randn(1, 1, 3, 2, generator=generator).double() for _ in range(3))
    k.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: attention(q, t, v), k)


def test_attention_passes_opcheck(generator):
    counts, channels = (2, 0, 1), (8, 6, 4)
    q = stage_batch(generator, counts, channels, 3, 2, requires_grad=True)
    k, v = (stage_batch(generator, counts, channels, 2, 2, requires_grad=True) for _ in "kv")
    packed = stage_batch(generator, counts, [3 * c for c in channels], 3, 2, requires_grad=True)
    calls = dispatcher_calls(
        lambda: (
            attention(q, k, v, num_heads=2).values.sum().backward(),
            attention(packed, num_heads=2, layout="per_head").values.sum().backward(),
            attention(q, k.to(torch.float32), v.with_values(v.values.detach())).values.sum().backward(),
        )
    )
    names = [op.overloadpacket._qualified_op_name for op, _ in calls]
    assert names == ["msd_kernels::attention", "msd_kernels::attention_backward"] * 3
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_compiles_without_graph_breaks(dynamic, generator):
    def function(q, k, x, batch):
        y = attention(q, k, k)
        image = attention(x, num_heads=2, layout="interleaved")
        packed = attention(StageBatch(batch, (1, 2), (12, 6), 2, 2), layout="blocked")
        return y.sum() + image.square().sum() + packed.values.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (4, 6, 9):
        shapes = ((2, 2, size, 8), (2, 2, 3, 8), (1, 12, size, 2), (96,))
        leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        results = []
        for run_function in (function, compiled):
            y = run_function(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_under_autocast_does_as_scaled_dot_product_attention(generator):
    q, k, v, _ = dense(generator, (1, 2, 4, 4, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, theirs = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        mixed = attention(q, k.bfloat16(), v)
    assert y.dtype == mixed.dtype == theirs.dtype
    assert torch.equal(y, attention(*(t.to(theirs.dtype) for t in (q, k, v))))


def test_attention_explains_its_choice(generator):
    *inputs, _ = dense(generator, (1, 1, 2, 2, 4))
    assert explain(*inputs).backend == "library"
    with use("reference"):
        assert explain(*inputs).backend == "reference"


Q = torch.ones(2, 3, 4, 8)
IMAGE = torch.ones(1, 24, 2, 2)
BATCH = StageBatch(torch.ones(64), (1, 1), (12, 4), 2, 2)
OTHER = StageBatch(torch.ones(64), (1, 1), (4, 12), 2, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q, Q), {}, ValueError, "k and v must be given both or neither, got k alone"),
        ((Q, None, Q), {}, ValueError, "k and v must be given both or neither, got v alone"),
        ((Q, Q, Q), {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        (
            (Q, Q, Q),
            {"layout": "blocked"},
            ValueError,
            "layout is for a packed q alone, got layout='blocked'",
        ),
        (
            (Q, Q, Q),
            {"num_heads": 2},
            ValueError,
            "num_heads=2 differs from the 3 heads of q of [2, 3, 4, 8]",
        ),
        (([1.0], Q, Q), {}, TypeError, "q must be a tensor, got list"),
        ((Q, BATCH, BATCH), {}, TypeError, "k must be a tensor, got StageBatch"),
        ((Q.int(), Q, Q), {}, TypeError, "q must be float32, bfloat16, float16 or float64, got torch.int32"),
        (
            (Q, Q.half(), Q),
            {},
            TypeError,
            "k must be torch.float32 for x of torch.float32, got torch.float16",
        ),
        ((Q[0], Q, Q), {}, ValueError, "q must be [B, heads, tokens, d], none 0 but B, got [3, 4, 8]"),
        (
            (Q, Q[:, :, :0], Q),
            {},
            ValueError,
            "k must be [B, heads, tokens, d], none 0 but B, got [2, 3, 0, 8]",
        ),
        (
            (Q, Q[..., :4], Q),
            {},
            ValueError,
            "k must be [2, 3, 4, 8] for q of [2, 3, 4, 8] and k of [2, 3, 4, 4], got [2, 3, 4, 4]",
        ),
        ((Q, Q, Q[:, :, :2]), {}, ValueError, "v must be [2, 3, 4, 8] for q of"),
        (
            (IMAGE,),
            {},
            ValueError,
            "layout must be one of interleaved, per_head, blocked for a packed q, got None",
        ),
        (
            (IMAGE[0],),
            {"layout": "blocked"},
            ValueError,
            "a packed q must be [B, 3C, H, W], none 0 but B, got",
        ),
        (
            (IMAGE,),
            {"layout": "blocked", "num_heads": 3},
            ValueError,
            "num_heads=3 does not divide the 3 parts of channels=24 of stage 0",
        ),
        (
            (BATCH,),
            {"layout": "blocked"},
            ValueError,
            "num_heads=1 does not divide the 3 parts of channels=4 of stage 1",
        ),
        ((BATCH, Q, Q), {}, TypeError, "k must be a StageBatch as q is, got Tensor"),
        ((BATCH, OTHER, OTHER), {}, ValueError, "k must have counts=(1, 1), channels=(12, 4) at 2x2, got"),
        ((BATCH, BATCH, OTHER), {}, ValueError, "v must have counts=(1, 1), channels=(12, 4) at 2x2, got"),
        (
            (BATCH, BATCH, BATCH),
            {"num_heads": 3},
            ValueError,
            "num_heads=3 does not divide channels=4 of stage 1",
        ),
        (
            (BATCH, BATCH, BATCH),
            {"num_heads": (1, 2, 3)},
            ValueError,
            "num_heads must be one integer or one per",
        ),
    ],
)
def test_attention_refuses(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(f"attention: {message}")):
        attention(*arguments, **options)
