"""What every op owes besides its values: derivatives, registration, compilation, determinism."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from helpers import backend_names, dispatcher_calls, parts_of, poisoned_memory
from msd_kernels import StageBatch, group_norm, grouped_conv2d, grouped_linear
from msd_kernels.dispatch.backends import FallbackWarning
from msd_kernels.ops import group_norm as group_norm_op
from op_calls import (
    CALLS,
    Call,
    assert_same_bits,
    cotangent_of,
    forward_and_backward,
    packed_size,
    plain_conv,
    strided,
)

PLAIN = ("library", "reference")

every_call = pytest.mark.parametrize("build", [b for _, b in CALLS.values()], ids=CALLS)


def on_backends(*names: str) -> pytest.MarkDecorator:
    """Every call on each of its op's backends, or on those among ``names``."""
    parameters = [
        pytest.param(build, name, id=f"{case}-{name}")
        for case, (backends, build) in CALLS.items()
        for name in backend_names(backends)
        if not names or name in names
    ]
    return pytest.mark.parametrize(("build", "backend"), parameters, indirect=["backend"])


def expanded(t: Tensor) -> Tensor:
    """One value in all places."""
    return t.flatten()[:1].expand(t.numel()).view(t.shape)


@on_backends(*PLAIN)
def test_contract_first_derivatives(build, backend, generator):
    call = build(2)
    assert torch.autograd.gradcheck(call.function, call.leaves(generator, torch.float64))


@on_backends(*PLAIN)
def test_contract_second_derivatives(build, backend, generator):
    call = build(2)
    leaves = call.leaves(generator, torch.float64)
    assert torch.autograd.gradgradcheck(call.function, leaves, fast_mode=True)


@on_backends()
def test_contract_dispatcher_registration(build, backend, generator):
    call = build(2)
    leaves = call.leaves(generator)
    calls = dispatcher_calls(lambda: forward_and_backward(call, leaves))
    assert len(calls) == 2, "one forward and one backward op"
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@on_backends()
def test_contract_repetition_does_not_change_a_bit(build, backend, generator):
    call = build(24)
    leaves = call.leaves(generator)
    torch.set_num_threads(2)
    once = forward_and_backward(call, leaves)
    assert_same_bits(once, forward_and_backward(call, leaves))


@on_backends("cpu", "triton")
def test_contract_threads_do_not_change_a_bit(build, backend, generator):
    """True of this library's own kernels; the sums of BLAS and oneDNN do depend on the number of threads."""
    if build is plain_conv and backend == "cpu":
        pytest.skip("leaves 1x1 kernels to oneDNN")
    call = build(80)
    leaves = call.leaves(generator)
    one = forward_and_backward(call, leaves)
    torch.set_num_threads(2)
    assert_same_bits(one, forward_and_backward(call, leaves))


@on_backends()
def test_contract_every_element_is_written(build, backend, generator):
    call = build(6)
    leaves = call.leaves(generator)
    with poisoned_memory():
        results = forward_and_backward(call, leaves)
    assert all(t.isfinite().all() for t in results)
    assert_same_bits(results, forward_and_backward(call, leaves))


@on_backends()
def test_contract_a_gradient_does_not_depend_on_which_others_are_wanted(build, backend, generator):
    call = build(4)
    leaves = call.leaves(generator)
    _, *together = forward_and_backward(call, leaves)
    for position, expected in enumerate(together):
        only = [t.detach().requires_grad_(i == position) for i, t in enumerate(leaves)]
        y = call.function(*only)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        (alone,) = torch.autograd.grad(y, [only[position]], dy)
        assert_same_bits([expected], [alone])


@on_backends()
def test_contract_takes_expanded_cotangents(build, backend, generator):
    """The cotangent of a sum has stride 0."""
    call = build(4)
    leaves = call.leaves(generator)
    y = call.function(*leaves)
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert_same_bits(expanded, torch.autograd.grad(y, leaves, torch.ones_like(y)))


@on_backends()
@pytest.mark.parametrize("gaps", [strided, expanded])
def test_contract_takes_inputs_with_gaps(build, backend, gaps, generator):
    """Views that ``reshape(-1)`` leaves views, since one stride fits all their dimensions."""
    call = build(4)
    views = [gaps(t.detach()) for t in call.leaves(generator)]
    dense = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in views]
    found = forward_and_backward(call, [t.requires_grad_() for t in views])
    assert_same_bits(found, forward_and_backward(call, dense))


@pytest.mark.filterwarnings("ignore::msd_kernels.dispatch.backends.FallbackWarning")
@every_call
def test_contract_forward_mode_derivatives(build, generator):
    call = build(2)
    leaves = call.leaves(generator, torch.float64)
    assert torch.autograd.gradcheck(call.function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call.function, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.filterwarnings("ignore::msd_kernels.dispatch.backends.FallbackWarning")
@every_call
def test_contract_transforms_of_torch_func(build, generator):
    call = build(4)
    leaves = call.leaves(generator, torch.float64)
    _, *expected = forward_and_backward(call, leaves)

    def weighted(*tensors: Tensor) -> Tensor:
        y = call.function(*tensors)
        return (y * cotangent_of(y)).sum()

    positions = tuple(range(len(leaves)))
    found = torch.func.grad(weighted, positions)(*(t.detach() for t in leaves))
    torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-10)


def test_contract_derivatives_that_the_reference_serves_warn_once(generator, monkeypatch):
    x = torch.randn(1, 2, 3, 3, generator=generator)
    monkeypatch.setattr(group_norm_op._forward, "_warned", False)
    with pytest.warns(
        FallbackWarning, match="group_norm: served by 'reference', which alone has forward-mode and"
    ):
        torch.func.jvp(lambda t: group_norm(t, 2), (x,), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.jvp(lambda t: group_norm(t, 2), (x,), (x,))


@every_call
def test_contract_without_gradients_gives_the_same(build, generator):
    call = build(4)
    leaves = call.leaves(generator)
    expected = call.function(*leaves).detach()
    with torch.no_grad():
        assert torch.equal(call.function(*leaves), expected)
    with torch.inference_mode():
        assert torch.equal(call.function(*leaves), expected)


@every_call
def test_contract_compiles_as_one_graph(build, generator):
    call = build(4)
    leaves = call.leaves(generator)
    torch.compiler.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    assert_same_bits(forward_and_backward(call, leaves), forward_and_backward(call, leaves, compiled))


@every_call
def test_contract_fake_preserves_strides_and_dtype(build, generator):
    call = build(4)
    leaves = call.leaves(generator, torch.bfloat16)
    real = call.function(*leaves)
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fake = call.function(*(mode.from_tensor(leaf) for leaf in leaves))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.device == real.device


def block(x: StageBatch, norm: Tensor, conv: Tensor, linear: Tensor, emb: StageBatch) -> StageBatch:
    """A small decoder block through all grouped ops."""
    counts, (c0, c1) = x.counts, x.channels
    per_sample = grouped_linear(emb, parts_of(linear, [(c0, 4), (c1, 4)]))
    h = group_norm(x, 2, parts_of(norm, [(c0,), (c1,)]), activation="silu")
    weight = parts_of(conv, [(c0, c0, 3, 3), (c1, c1, 3, 3)])
    y = grouped_conv2d(h, weight, sample_bias=per_sample, residual=x, scale=0.5)
    return StageBatch(y.values * 2, counts, y.channels, y.height, y.width)


def block_call(counts: tuple[int, ...]) -> Call:
    channels = (6, 4)

    def function(x, norm, conv, linear, emb):
        batch = StageBatch(x, counts, channels, 4, 4)
        return block(batch, norm, conv, linear, StageBatch(emb, counts, (4, 4), 1, 1)).values

    sizes = [packed_size(counts, channels, 16), (10,), (36 * 9 + 16 * 9,), (40,), packed_size(counts, (4, 4))]
    return Call(sizes, function)


@pytest.mark.slow
def test_contract_compiles_with_inductor(generator):
    call = block_call((2, 1))
    leaves = call.leaves(generator)
    torch.compiler.reset()
    compiled = torch.compile(call.function, fullgraph=True)
    expected = forward_and_backward(call, leaves)
    for ours, theirs in zip(forward_and_backward(call, leaves, compiled), expected, strict=True):
        # Inductor may contract the elementwise product and sum around the ops.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_contract_compiled_code_is_kept_for_the_same_counts(generator):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)

    def run(counts):
        x, norm, conv, linear, emb = block_call(counts).leaves(generator)
        arguments = (norm, conv, linear, StageBatch(emb, counts, (4, 4), 1, 1))
        batch = StageBatch(x, counts, (6, 4), 4, 4)
        y = compiled(batch, *arguments)
        assert isinstance(y, StageBatch)
        assert torch.equal(y.values, block(batch, *arguments).values)

    for _ in range(3):
        run((2, 1))
    assert counter.frame_count == 1
    run((1, 2))
    assert counter.frame_count == 2, "other counts are another program"
