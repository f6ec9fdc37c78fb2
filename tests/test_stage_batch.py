from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from helpers import stage_batch
from msd_kernels import StageBatch

COUNTS, CHANNELS = (2, 0, 3), (4, 7, 1)


@pytest.fixture
def segments(generator):
    return [torch.randn(n, c, 3, 5, generator=generator) for n, c in zip(COUNTS, CHANNELS, strict=True)]


def test_stage_batch_returns_the_segments_that_it_packed(segments):
    batch = StageBatch.from_segments(segments)
    assert (batch.counts, batch.channels, batch.height, batch.width) == (COUNTS, CHANNELS, 3, 5)
    for packed, segment in zip(batch.segments(), segments, strict=True):
        assert torch.equal(packed, segment)


def test_stage_batch_is_one_flat_nhwc_buffer(segments):
    batch = StageBatch.from_segments(segments)
    expected = torch.cat([segment.permute(0, 2, 3, 1).flatten() for segment in segments])
    assert torch.equal(batch.values, expected)
    assert batch.sizes == (2 * 15 * 4, 0, 3 * 15)
    assert batch.offsets == (0, 120, 120, 165)
    assert (batch.num_stages, batch.num_samples) == (3, 5)


def test_stage_batch_takes_segments_of_any_layout(segments):
    batch = StageBatch.from_segments(segments)
    channels_last = [s.contiguous(memory_format=torch.channels_last) for s in segments]
    strided = [torch.stack([s, s], dim=4)[..., 0] for s in segments]
    for layout in (channels_last, strided):
        assert torch.equal(StageBatch.from_segments(layout).values, batch.values)


def test_stage_batch_segments_are_channels_last_views(generator):
    batch = stage_batch(generator, COUNTS, CHANNELS, 3, 5)
    for stage, segment in enumerate(batch.segments()):
        assert segment.shape == (COUNTS[stage], CHANNELS[stage], 3, 5)
        assert segment.is_contiguous(memory_format=torch.channels_last)
        assert segment.untyped_storage().data_ptr() == batch.values.untyped_storage().data_ptr()
        segment.fill_(stage)
    assert torch.equal(batch.values, torch.tensor([0.0] * 120 + [2.0] * 45))


def test_stage_batch_from_dense_copies_only_nchw(generator):
    x = torch.randn(5, 4, 3, 2, generator=generator)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    vectors = torch.randn(5, 4, generator=generator)
    assert StageBatch.from_dense(channels_last).values.data_ptr() == channels_last.data_ptr()
    assert StageBatch.from_dense(vectors).values.data_ptr() == vectors.data_ptr()
    assert StageBatch.from_dense(x).values.data_ptr() != x.data_ptr()
    for dense in (x, channels_last):
        assert torch.equal(StageBatch.from_dense(dense, (2, 0, 3)).dense(), dense)
    assert torch.equal(StageBatch.from_dense(vectors).dense(), vectors[:, :, None, None])


def test_stage_batch_dense_is_a_view(generator):
    batch = stage_batch(generator, (1, 2), (3, 3), 2, 2)
    dense = batch.dense()
    assert dense.shape == (3, 3, 2, 2)
    assert dense.data_ptr() == batch.values.data_ptr()
    assert torch.equal(dense, torch.cat(batch.segments()))


def test_stage_batch_restage_keeps_samples_and_memory(generator):
    batch = stage_batch(generator, (5,), (3,), 2, 2)
    staged = batch.restage([1, 0, 4])
    assert staged.counts == (1, 0, 4)
    assert staged.channels == (3, 3, 3)
    assert staged.values.data_ptr() == batch.values.data_ptr()
    assert torch.equal(staged.dense(), batch.dense())


def test_stage_batch_concatenate_joins_channels_per_stage(generator):
    first = stage_batch(generator, COUNTS, CHANNELS, 3, 5)
    second = stage_batch(generator, COUNTS, (1, 2, 3), 3, 5)
    joined = StageBatch.concatenate(first, second)
    assert joined.channels == (5, 9, 4)
    for both, a, b in zip(joined.segments(), first.segments(), second.segments(), strict=True):
        assert torch.equal(both, torch.cat([a, b], dim=1))


def test_stage_batch_map_and_to_act_on_the_buffer(generator):
    batch = stage_batch(generator, COUNTS, CHANNELS, 3, 5)
    assert torch.equal(batch.map(torch.exp).values, batch.values.exp())
    half = batch.to(torch.float16)
    assert half.dtype == torch.float16
    assert (half.counts, half.channels) == (batch.counts, batch.channels)
    assert batch.to("meta").device.type == "meta"


def test_stage_batch_gradients_flow_through_every_view(generator):
    batch = stage_batch(generator, COUNTS, CHANNELS, 3, 5, requires_grad=True)
    factors = (2.0, 3.0, 5.0)
    segments = [s * f for s, f in zip(batch.segments(), factors, strict=True)]
    StageBatch.from_segments(segments).values.sum().backward()
    assert torch.equal(batch.values.grad, torch.tensor([2.0] * 120 + [5.0] * 45))


def test_stage_batch_is_frozen(generator):
    batch = stage_batch(generator, COUNTS, CHANNELS, 3, 5)
    with pytest.raises(FrozenInstanceError):
        batch.counts = (1, 1, 1)
    with pytest.raises(FrozenInstanceError):
        batch.values = batch.values * 2


def test_stage_batch_takes_any_sequence_as_counts():
    batch = StageBatch(torch.zeros(6), [1, 2], [2, 2], 1, 1)
    assert (batch.counts, batch.channels) == ((1, 2), (2, 2))


def test_stage_batch_passes_through_compiled_code(generator):
    def scaled(batch: StageBatch, factor: torch.Tensor) -> StageBatch:
        segments = [segment * factor for segment in batch.segments()]
        return StageBatch.from_segments(segments).map(lambda values: values + 1)

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    batch = stage_batch(generator, COUNTS, CHANNELS, 3, 5, requires_grad=True)
    found, expected = compiled(batch, torch.tensor(3.0)), scaled(batch, torch.tensor(3.0))
    assert isinstance(found, StageBatch)
    assert (found.counts, found.channels, found.height, found.width) == (COUNTS, CHANNELS, 3, 5)
    assert torch.equal(found.values, expected.values)
    (gradient,) = torch.autograd.grad(found.values.sum(), batch.values)
    assert torch.equal(gradient, torch.full_like(batch.values, 3.0))


X = torch.zeros(3, 4, 2, 2)
BATCH = StageBatch(torch.zeros(2 * 4 + 4 * 3), (1, 1), (2, 3), 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StageBatch([1.0], (1,), (1,), 1, 1), TypeError, "values must be a tensor, got list"),
        (
            lambda: StageBatch(torch.zeros(2), (1, 1), (1,), 1, 1),
            ValueError,
            "counts and channels must name the same stages",
        ),
        (
            lambda: StageBatch(torch.zeros(0), (), (), 1, 1),
            ValueError,
            "counts and channels must .* at least one",
        ),
        (
            lambda: StageBatch(torch.zeros(0), (-1,), (1,), 1, 1),
            ValueError,
            r"counts must be >= 0, .* got counts=\(-1,\)",
        ),
        (
            lambda: StageBatch(torch.zeros(0), (0,), (0,), 1, 1),
            ValueError,
            r"channels, .* must|counts must be >= 0",
        ),
        (
            lambda: StageBatch(torch.zeros(0), (1,), (1,), 0, 1),
            ValueError,
            "counts must be >= 0, .* height=0",
        ),
        (
            lambda: StageBatch(torch.zeros(5), (1,), (2,), 1, 2),
            ValueError,
            r"values must be flat with 4 elements .* got shape \(5,\)",
        ),
        (
            lambda: StageBatch(torch.zeros(2, 2), (1,), (2,), 1, 2),
            ValueError,
            r"values must be flat .* got shape \(2, 2\)",
        ),
        (
            lambda: StageBatch.from_segments([]),
            ValueError,
            "from_segments needs at least one segment, got none",
        ),
        (
            lambda: StageBatch.from_segments([None]),
            TypeError,
            "segment of stage 0 must be a tensor, got NoneType",
        ),
        (
            lambda: StageBatch.from_segments([X, X[0]]),
            ValueError,
            r"segment of stage 1 must be \[n, C, H, W\], got \(4, 2, 2\)",
        ),
        (
            lambda: StageBatch.from_segments([X, X[:, :, :1]]),
            ValueError,
            r"segment of stage 1 must be \[n, C, 2, 2\] like stage 0, got \(3, 4, 1, 2\)",
        ),
        (
            lambda: StageBatch.from_segments([X[0]]),
            ValueError,
            r"segment of stage 0 must be \[n, C, H, W\], got \(4, 2, 2\)",
        ),
        (
            lambda: StageBatch.from_segments([X, X.half()]),
            TypeError,
            "segment of stage 1 is torch.float16 on cpu, stage 0 is torch.float32",
        ),
        (
            lambda: StageBatch.from_dense(X[0]),
            ValueError,
            r"from_dense takes \[B, C, H, W\] or \[B, C\], got shape \(4, 2, 2\)",
        ),
        (
            lambda: StageBatch.from_dense(X, (1, 1)),
            ValueError,
            r"counts must sum up to the batch size 3, got \(1, 1\) \(sum 2\)",
        ),
        (lambda: StageBatch.from_dense(X, (4, -1)), ValueError, "counts must be >= 0"),
        (BATCH.dense, ValueError, r"dense needs the same channels in every stage, got \(2, 3\)"),
        (lambda: BATCH.restage((2, 0)), ValueError, "dense needs the same channels in every stage"),
        (
            lambda: StageBatch.from_dense(X).restage((1, 1)),
            ValueError,
            "counts must sum up to the batch size 3",
        ),
        (lambda: BATCH.with_values(torch.zeros(3)), ValueError, "values must be flat with 20 elements"),
        (
            lambda: StageBatch.concatenate(BATCH, StageBatch(torch.zeros(16), (2, 0), (2, 3), 2, 2)),
            ValueError,
            r"concatenate needs the same counts and size, got \(1, 1\) at 2x2 and \(2, 0\) at 2x2",
        ),
    ],
)
def test_stage_batch_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^StageBatch: {message}"):
        call()


def test_integers_of_other_kinds_become_integers():
    counts = np.bincount([0, 2, 2], minlength=3)
    batch = StageBatch(torch.zeros(3 * 4 * 2), counts, (2, 2, 2), np.int64(2), 2)
    assert batch.layout == ((1, 0, 2), (2, 2, 2), 2, 2)
    assert {type(size) for size in (*batch.counts, *batch.channels, batch.height, batch.width)} == {int}


@pytest.mark.parametrize("again", [False, True])
def test_what_is_no_integer_is_refused_although_an_equal_integer_was_seen(again):
    if again:
        StageBatch(torch.zeros(16), (1,), (2,), 4, 2)
    with pytest.raises(TypeError, match=r"must be integers, got .*height=4.0") as caught:
        StageBatch(torch.zeros(16), (1,), (2,), 4.0, 2)
    assert caught.value.__suppress_context__


def test_errors_come_without_another_one_before_them():
    with pytest.raises(ValueError, match="same stages") as caught:
        StageBatch(torch.zeros(5), (1,), (4, 4), 1, 1)
    assert caught.value.__context__ is None
