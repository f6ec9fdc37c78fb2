"""Attention in Triton, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import require_interpreter
from torch import Tensor

require_interpreter()

from test_attention import check  # noqa: E402

from attention_checks import check_close, dense, pixels_as_tokens, run, unpack  # noqa: E402
from helpers import poisoned_memory, stage_batch  # noqa: E402
from msd_kernels import attention, explain  # noqa: E402
from msd_kernels.dispatch.backends import use  # noqa: E402
from msd_kernels.layouts import AttentionLayout  # noqa: E402
from msd_kernels.ops.attention import PACKED_ORDERS  # noqa: E402
from msd_kernels.ops.attention import plan as plans  # noqa: E402
from msd_kernels.ops.attention import triton as implementation  # noqa: E402
from msd_kernels.runtime import tuned  # noqa: E402

# Triton's interpreter truncates to bfloat16 and multiplies it wrongly.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
# Samples, heads, query tokens, context tokens, head dimension.
ROWS = [
    (2, 2, 9, 5, 40),
    (1, 2, 7, 13, 24),
    (1, 1, 80, 70, 16),
    (1, 2, 16, 16, 160),
    (1, 1, 1, 1, 32),
    (1, 2, 5, 1, 8),
    (1, 3, 1, 6, 1),
]
STREAMS = [(1, 1, 130, 300, 40), (1, 1, 1, 257, 24), (1, 1, 264, 3, 160), (1, 1, 257, 272, 384)]


@pytest.fixture(autouse=True)
def _triton():
    with use("triton"):
        yield


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that are launched."""
    names = []
    run_kernel = implementation.launch

    def record(kernel, *arguments, **options):
        names.append(kernel.__name__)
        run_kernel(kernel, *arguments, **options)

    monkeypatch.setattr(implementation, "launch", record)
    return names


@DTYPES
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows_of_scores_equal_the_formula(shape, dtype, generator):
    check(*dense(generator, shape, dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, torch.float32) for s in STREAMS), (STREAMS[0], torch.float16)], ids=str
)
def test_streamed_scores_equal_the_formula(shape, dtype, generator):
    check(*dense(generator, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_edm_head_of_384_over_256_tokens_equals_the_formula(dtype, generator):
    check(*dense(generator, (1, 1, 256, 256, 384), dtype))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2, 16, 12, 24), (1, 1, 24, 24, 160), (1, 1, 260, 264, 8)], ids=str)
def test_scores_of_magnitude_100(shape, dtype, generator):
    q, k, v, dy = dense(generator, shape, dtype)
    check(q * 100, k, v, dy)
    check(q, k, v, dy, scale=100 / math.sqrt(shape[-1]))


def test_a_negative_scale_is_that_of_negative_queries(generator):
    *inputs, _ = dense(generator, (1, 1, 6, 7, 8))
    assert torch.equal(attention(*inputs, scale=-0.3), attention(-inputs[0], *inputs[1:], scale=0.3))


@pytest.mark.parametrize("shape", [(1, 1, 12, 13, 24), (1, 1, 260, 264, 8)], ids=str)
def test_off_centre_inputs(shape, generator):
    q, k, v, dy = dense(generator, shape)
    check(q + 3, k + 3, v - 100, dy + 3)


def test_one_context_token_is_the_output(generator):
    q, k, v, dy = dense(generator, (2, 3, 5, 1, 8))
    y, dq, dk, dv = run(attention, (q, k, v), dy)
    assert torch.equal(y, v.expand_as(q))
    check_close((y, dq, dk, dv), q, k, v, dy)


def test_tokens_first_and_mixed_strides(generator):
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = draw(2, 7, 4, 8).transpose(1, 2), draw(2, 4, 7, 8), draw(2, 4, 8, 7).mT
    check(q, k, v, draw(2, 1, 1, 8).expand(2, 4, 7, 8))


NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("layout", "memory_format", "size"),
    [
        *((layout, order, (3, 5)) for layout in PACKED_ORDERS for order in (NCHW, NHWC)),
        ("interleaved", NHWC, (16, 17)),
        ("per_head", NCHW, (16, 17)),
    ],
    ids=str,
)
def test_packed_orders_equal_the_formula(layout, memory_format, size, generator):
    heads, head_dim = (2, 24) if size == (3, 5) else (1, 24)
    x = torch.randn(1, 3 * heads * head_dim, *size, generator=generator)
    x = x.contiguous(memory_format=memory_format)
    dy = torch.randn(1, heads * head_dim, *size, generator=generator)
    with poisoned_memory():
        y, dx = run(lambda t: attention(t, num_heads=heads, layout=layout), [x], dy)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.stride() == x.stride()
    parts = [y.reshape(1, heads, head_dim, -1).mT, *unpack(dx, heads, layout)]
    check_close(parts, *unpack(x, heads, layout), dy.reshape(1, heads, head_dim, -1).mT)


def test_packed_tensors_are_read_and_written_in_place(generator, launches, monkeypatch):
    """The kernels get the caller's own memory, and so does nobody else."""
    given = []
    record = implementation.launch
    monkeypatch.setattr(
        implementation, "launch", lambda *args, **kw: (given.append(args), record(*args, **kw))
    )
    x = stage_batch(generator, (1, 1), (48, 24), 2, 2, requires_grad=True)
    y = attention(x, layout="interleaved")
    (gradient,) = torch.autograd.grad(y.values.sum(), x.values)
    pointers = [[a.data_ptr() for a in args if isinstance(a, Tensor)] for args in given]
    assert all(found.count(x.values.data_ptr()) >= 3 for found in pointers)
    assert pointers[0].count(y.values.data_ptr()) == 1
    assert [found.count(gradient.data_ptr()) for found in pointers] == [0, 1, 2]


SMALL = ((4, 3), (5, 1))
# counts, channels, num_heads, layout, the sizes of the queries' and of the context's map
STAGES = {
    "EDM": ((2, 0, 1), (384, 256, 32), 1, None, *SMALL),
    "EDM interleaved": ((1, 1, 1), (384, 256, 32), 1, "interleaved", *SMALL),
    "several heads": ((1, 2, 1), (48, 24, 8), (3, 1, 2), None, *SMALL),
    "several heads per_head": ((1, 2, 1), (48, 24, 8), (3, 1, 2), "per_head", *SMALL),
    "five stages, two empty": ((0, 1, 1, 0, 1), (16, 8, 40, 24, 36), (2, 1, 5, 3, 1), "blocked", *SMALL),
    "only empty stages": ((0, 0), (4, 8), 1, None, *SMALL),
    "streamed": ((1, 0, 1, 1), (40, 8, 24, 160), 1, None, (1, 260), (3, 90)),
}


@pytest.mark.parametrize(
    ("counts", "channels", "num_heads", "layout", "size", "context"), STAGES.values(), ids=STAGES
)
def test_stages_equal_the_formula(counts, channels, num_heads, layout, size, context, generator):
    heads = num_heads if isinstance(num_heads, tuple) else (num_heads,) * len(counts)
    dy = stage_batch(generator, counts, channels, *size)
    if layout is None:
        sizes = (size, context, context)
        leaves = [stage_batch(generator, counts, channels, *each, requires_grad=True) for each in sizes]
    else:
        leaves = [stage_batch(generator, counts, [3 * c for c in channels], *size, requires_grad=True)]
    with poisoned_memory():
        y = attention(*leaves, num_heads=num_heads, layout=layout)
        found = torch.autograd.grad(y.values, [b.values for b in leaves], dy.values)
    gradients = [b.with_values(g) for b, g in zip(leaves, found, strict=True)]
    batches = (dy, y, *leaves, *gradients)
    for h, d, y_s, *parts in zip(heads, *(b.segments() for b in batches), strict=True):
        if layout is None:
            parts = [pixels_as_tokens(part.detach(), h) for part in parts]
        else:
            parts = [third for part in parts for third in unpack(part.detach(), h, layout)]
        results = [pixels_as_tokens(y_s.detach(), h), *parts[3:]]
        check_close(results, *parts[:3], pixels_as_tokens(d, h))


@pytest.mark.parametrize(("side", "kind"), [(2, "row"), (17, "stream")])
def test_one_launch_forward_two_backward(side, kind, generator, launches):
    counts, channels = (1, 0, 1), (24, 8, 16)
    q, k, v = (stage_batch(generator, counts, channels, side, side, requires_grad=True) for _ in "qkv")
    y = attention(q, k, v)
    assert launches == [f"_attention_{kind}_forward_kernel"]
    launches.clear()
    y.values.sum().backward()
    assert launches == [f"_attention_{kind}_dq_kernel", f"_attention_{kind}_dkv_kernel"]


@pytest.mark.parametrize("tokens", [20, 257])
def test_repetition_gives_the_same_bits(tokens, generator):
    *inputs, dy = dense(generator, (1, 1, tokens, tokens, 8))
    first, second = (run(attention, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("position", "tokens"), [(0, 20), (1, 20), (2, 20), (1, 257)], ids=str)
def test_a_gradient_alone_has_the_same_bits(position, tokens, generator):
    *inputs, dy = dense(generator, (1, 1, tokens, tokens, 8))
    together = run(attention, inputs, dy)[1:]
    leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(inputs)]
    attention(*leaves).backward(dy)
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, together[i]) if i == position else leaf.grad is None


@pytest.mark.parametrize(
    ("shape", "arithmetic"),
    [((1, 1, 40, 36, 48), "half"), ((1, 1, 40, 36, 48), "float32"), ((1, 1, 20, 260, 80), "half")],
    ids=str,
)
def test_tiles_of_the_committed_tables_equal_the_formula(shape, arithmetic, monkeypatch, generator):
    def committed(which, layout, like):
        parameters = tuned.attention(80, arithmetic, which)
        return plans.plan(layout, which, parameters, "float32", like.itemsize, like.device)

    monkeypatch.setattr(implementation, "_plan", committed)
    check(*dense(generator, shape))


@pytest.mark.parametrize("which", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("tokens", [6, 258])
def test_nothing_is_written_beside_the_results(which, tokens, generator):
    guard, layout = 64, AttentionLayout((1, 2), (1, 2), (24, 3), tokens, tokens, "nthd", None)
    size, rows = tokens * (24 + 2 * 6), tokens * (1 + 4)

    def guarded(n: int) -> Tensor:
        memory = torch.full((n + 2 * guard,), torch.nan)
        memory[guard : n + guard] = torch.randn(n, generator=generator)
        return memory

    whole = {name: guarded(size) for name in ("q", "k", "v", "y", "dy", "dq", "dk", "dv")}
    whole |= {name: guarded(rows) for name in ("log_sum", "delta")}
    t = {name: memory[guard:-guard] for name, memory in whole.items()}
    outputs = (t["y"],) if tokens > plans.ROW else ()
    arguments = {
        "forward": (t["q"], t["k"], t["v"], t["y"], t["log_sum"]),
        "dq": (t["dy"], t["q"], t["k"], t["v"], *outputs, t["log_sum"], t["dq"], t["delta"]),
        "dkv": (t["dy"], t["q"], t["k"], t["v"], t["log_sum"], t["delta"], t["dk"], t["dv"]),
    }
    implementation._run(which, layout, t["q"], *arguments[which])
    for memory in whole.values():
        assert memory[:guard].isnan().all()
        assert memory[-guard:].isnan().all()
        assert not memory[guard:-guard].isnan().any()


def test_auto_never_takes_the_interpreter(generator):
    inputs = dense(generator, (1, 1, 2, 2, 4))[:3]
    with use("auto"):
        answer = explain("attention", *inputs)
    assert answer.backend == "library"
    assert "interpreter" in answer.why_not["triton"]
    assert explain("attention", *inputs).backend == "triton"
