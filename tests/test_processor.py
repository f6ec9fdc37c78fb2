"""What each kind of processor computes in, by simulation: this machine is of one kind only."""

from __future__ import annotations

import pytest
import torch

import msd_kernels
from msd_kernels import StageBatch, env
from msd_kernels.ops.attention import library
from msd_kernels.runtime import processor

AVX512 = {"sse2", "avx2", "avx512_f"}
PROCESSORS = {  # capabilities, its kind, what it computes in
    "Sapphire Rapids": (AVX512 | {"avx512_bf16", "avx512_fp16", "amx_bf16"}, "amx", {"bfloat16", "float16"}),
    "Zen 4": (AVX512 | {"avx512_bf16"}, "avx512_bf16", {"bfloat16"}),
    "Skylake": (AVX512, "avx512", set()),
    "Zen 3": ({"sse2", "avx2"}, "avx2", set()),
    "Graviton 3": ({"neon", "fp16_arith", "bf16"}, "arm bf16", {"bfloat16", "float16"}),
    "Graviton 2": ({"neon", "fp16_arith"}, "other", {"float16"}),
    "an old one": ({"sse2"}, "other", set()),
}


@pytest.fixture
def simulate(monkeypatch):
    """Makes this machine a processor of ``PROCESSORS``, under a oneDNN that accepts everything."""

    def pretend(name: str) -> None:
        monkeypatch.delenv(processor.CAP, raising=False)
        monkeypatch.setattr(processor, "capabilities", lambda: frozenset(PROCESSORS[name][0]))
        monkeypatch.setattr(processor, "onednn_accepts", lambda dtype: True)

    return pretend


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_and_not_onednn_says_what_is_computed_in(name, simulate):
    simulate(name)
    _, kind, native = PROCESSORS[name]
    assert processor.kind().name == kind
    assert processor.computes_in(torch.float32)
    assert processor.computes_in(torch.float64)
    for dtype in processor.SIXTEEN_BITS:
        takes = str(dtype).removeprefix("torch.") in native
        assert processor.computes_in(dtype) == takes
        assert (processor.why_float32(dtype, "grouped_linear") is None) == takes
    assert processor.attention_in_float32(torch.bfloat16) == (name == "Skylake")
    assert f"{kind}: computes in float32" in processor.describe()
    assert ("saves no time" in processor.describe()) == (len(native) < 2)


@pytest.mark.parametrize(("cap", "kind"), [("avx512", "avx512"), ("avx2", "avx2"), ("portable", "other")])
def test_processor_is_capped_as_the_compiled_kernels_are(cap, kind, simulate, monkeypatch):
    simulate("Sapphire Rapids")
    monkeypatch.setenv(processor.CAP, cap)
    assert processor.kind().name == kind
    assert not processor.computes_in(torch.bfloat16)


def test_processor_is_asked_beside_onednn(simulate, monkeypatch):
    simulate("Zen 4")
    monkeypatch.setattr(processor, "onednn_accepts", lambda dtype: False)
    assert not processor.computes_in(torch.bfloat16)


def test_processor_without_pytorchs_own_list_is_read_from_the_system(monkeypatch):
    found = processor.capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    processor.capabilities.cache_clear()
    try:
        read = processor.capabilities()
    finally:
        processor.capabilities.cache_clear()
    flags = {kind.flag for kind in processor.KINDS} | {
        flag for kind in processor.KINDS for flag in kind.float16
    }
    assert found & flags == read & flags


@pytest.mark.parametrize(("name", "expected"), [("Skylake", torch.float32), ("Zen 4", torch.bfloat16)])
def test_processor_decides_in_what_attention_is_computed(name, expected, simulate, monkeypatch, generator):
    simulate(name)
    seen = set()

    def fused(q, *others):
        seen.add(q.dtype)
        return forward(q, *others)

    def gradients(dy, q, *others):
        seen.add(q.dtype)
        return backward(dy, q, *others)

    forward, backward = library._fused_forward, library._write_gradients
    monkeypatch.setattr(library, "_fused_forward", fused)
    monkeypatch.setattr(library, "_write_gradients", gradients)
    q, k, v = (torch.randn(2, 2, 9, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    y = msd_kernels.attention(q, k, v)
    found = torch.autograd.grad(y.float().square().sum(), (q, k, v))
    assert seen == {expected}
    assert {t.dtype for t in (y, *found)} == {torch.bfloat16}
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    reference = msd_kernels.attention(*exact)
    torch.testing.assert_close(y.double(), reference, rtol=2**-7, atol=2**-7)
    for gradient, wanted in zip(found, torch.autograd.grad(reference.square().sum(), exact), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=2**-5, atol=2**-5)


def test_processor_shows_in_explain_and_in_the_report(simulate, generator):
    x = StageBatch.from_dense(torch.randn(2, 4, 3, 3, generator=generator).bfloat16())
    weight = [torch.randn(5, 4, generator=generator).bfloat16()]
    simulate("Skylake")
    reason = "this processor (avx512) has no avx512_bf16: computed in float32"
    assert reason in str(msd_kernels.explain("grouped_linear", x=x, weight=weight))
    assert reason in str(msd_kernels.explain("attention", x, x, x))
    assert reason not in str(msd_kernels.explain("grouped_linear", x.to(torch.float32), [weight[0].float()]))
    with torch.autocast("cpu", torch.bfloat16):
        assert reason in str(msd_kernels.explain("grouped_linear", x.to(torch.float32), [weight[0].float()]))
    assert "avx512: computes in float32; bfloat16 and float16 in float32" in env.report()
    simulate("Zen 3")
    assert "computed in float32" not in str(msd_kernels.explain("attention", x, x, x))
    simulate("Zen 4")
    assert "computed in float32" not in str(msd_kernels.explain("grouped_linear", x, weight))
