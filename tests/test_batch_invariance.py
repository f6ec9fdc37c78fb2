"""``batch_invariant``: what a sample gives in a batch are the bits that it gives alone."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msd_kernels
from msd_kernels import StageBatch, batch_invariance, batch_invariant

STAGES = (1, 0, 1, 1, 0)  # of the samples; stage 2 has none
COUNTS, CHANNELS, WIDER, HEADS = (2, 3, 0), (15, 9, 6), (21, 12, 3), (5, 3, 2)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


@pytest.fixture
def two_threads(one_thread) -> None:
    """Their shares end within samples."""
    torch.set_num_threads(2)


def batch(generator, dtype, channels, size, counts=COUNTS) -> StageBatch:
    return StageBatch.from_segments(
        [
            torch.randn(n, c, *size, generator=generator).to(dtype)
            for n, c in zip(counts, channels, strict=True)
        ]
    )


def weights(generator, dtype, ins, outs, *window) -> list[Tensor]:
    return [
        (torch.randn(o, i, *window, generator=generator) * 0.3).to(dtype)
        for i, o in zip(ins, outs, strict=True)
    ]


def alone(value, stage: int, i: int):
    """Sample i of a stage in a batch of its own, in memory of its own."""
    if not isinstance(value, StageBatch):
        return value
    counts = [int(s == stage) for s in range(len(value.counts))]
    return StageBatch.from_segments(
        [part[i : i + n].clone() for part, n in zip(value.segments(), counts, strict=True)]
    )


def calls(generator, dtype):
    """Every op on odd sizes, as ``name: (function of StageBatches, StageBatches)``."""
    x, skip = batch(generator, dtype, CHANNELS, (7, 5)), batch(generator, dtype, (4, 7, 1), (7, 5))
    joined = [c + d for c, d in zip(CHANNELS, skip.channels, strict=True)]
    conv = weights(generator, dtype, joined, WIDER, 3, 3)
    point = weights(generator, dtype, CHANNELS, WIDER, 1, 1)
    linear = weights(generator, dtype, CHANNELS, WIDER)
    bias = [w[:, 0].contiguous() for w in linear]
    residual, sample_bias = batch(generator, dtype, WIDER, (7, 5)), batch(generator, dtype, WIDER, (1, 1))
    even = batch(generator, dtype, CHANNELS, (6, 8))
    qkv = batch(generator, dtype, [3 * c for c in CHANNELS], (7, 5))
    context = batch(generator, dtype, CHANNELS, (11, 1))
    whole = msd_kernels
    return {
        "convolution": (
            lambda x, s, b, r: whole.grouped_conv2d(
                x, conv, bias, skip=s, sample_bias=b, residual=r, scale=0.7
            ),
            (x, skip, sample_bias, residual),
        ),
        "convolution up": (lambda x: whole.grouped_conv2d(x, point, resample="up"), (x,)),
        "convolution down": (lambda x: whole.grouped_conv2d(x, point, bias, resample="down"), (even,)),
        "linear": (lambda x: whole.grouped_linear(x, linear, bias), (x,)),
        "attention": (lambda q: whole.attention(q, num_heads=HEADS, layout="blocked"), (qkv,)),
        "cross-attention": (lambda q, k: whole.attention(q, k, k, num_heads=HEADS), (x, context)),
        "norm": (lambda x: whole.group_norm(x, HEADS, activation="silu"), (x,)),
        "resampling": (lambda x: whole.resample2d(x, (1, 3, 3, 1), up=2), (x,)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance_of_every_op(dtype, generator):
    for name, (op, batches) in calls(generator, dtype).items():
        ordinary = op(*batches)
        with batch_invariant():
            together = op(*batches)
            single = [
                [op(*(alone(b, s, i) for b in batches)) for i in range(n)] for s, n in enumerate(COUNTS)
            ]
        assert together.layout == ordinary.layout, name
        torch.testing.assert_close(together.values, ordinary.values)
        for stage, results in enumerate(single):
            for i, result in enumerate(results):
                assert torch.equal(together.segments()[stage][i], result.segments()[stage][0]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batch_invariance_at_edms_widths(dtype, generator):
    """256 channels at 8x8 in the encoder, 384, 256 and 32 in the decoders: other kernels than of small sizes."""
    counts, ins, outs = (1, 1, 1), (256, 256, 256), (384, 256, 32)
    x = batch(generator, dtype, ins, (8, 8), counts)
    qkv = batch(generator, dtype, [3 * c for c in outs], (8, 8), counts)
    conv, linear = (weights(generator, dtype, ins, outs, *window) for window in ((3, 3), ()))
    ops = {
        "convolution": (lambda x: msd_kernels.grouped_conv2d(x, conv), x),
        "linear": (lambda x: msd_kernels.grouped_linear(x, linear), x),
        "attention": (lambda x: msd_kernels.attention(x, layout="per_head"), qkv),
        "norm": (lambda x: msd_kernels.group_norm(x, 16, activation="silu"), qkv),
    }
    with batch_invariant():
        for name, (op, given) in ops.items():
            together = op(given).segments()
            for stage in range(3):
                assert torch.equal(together[stage], op(alone(given, stage, 0)).segments()[stage]), name
        shared = StageBatch.from_dense(x.dense())
        y = msd_kernels.grouped_conv2d(shared, conv[1:2]).dense()
        for i in range(3):
            own = StageBatch.from_dense(x.dense()[i : i + 1].clone())
            assert torch.equal(y[i : i + 1], msd_kernels.grouped_conv2d(own, conv[1:2]).dense())


def test_batch_invariance_of_dense_calls(generator):
    q, k, v = (torch.randn(5, 3, n, 7, generator=generator) for n in (13, 9, 9))
    image = torch.randn(5, 6, 9, 7, generator=generator)
    data, sigma = torch.randn(40, 6, 9, 7, generator=generator), torch.tensor([0.3, 1.0, 2.0, 5.0, 0.1])
    weight = [torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator)]
    ops = {
        "attention": (lambda *t: msd_kernels.attention(*t), (q, k, v)),
        "norm": (lambda t: msd_kernels.group_norm(t, 3, activation="silu"), (image,)),
        "resampling": (lambda t: msd_kernels.resample2d(t, (1, 1), down=2), (image,)),
        "denoiser": (
            lambda t, s: msd_kernels.optimal_denoiser(t, s, data, statistics=True).log_partition,
            (image, sigma),
        ),
    }
    with batch_invariant():
        for name, (op, tensors) in ops.items():
            together = op(*tensors)
            for i in range(5):
                assert torch.equal(together[i], op(*(t[i : i + 1].clone() for t in tensors))[0]), name
        x = torch.randn(7, 5, generator=generator)
        rows = msd_kernels.grouped_linear(x, weight, counts=(4, 3))
        for i in range(7):
            own = msd_kernels.grouped_linear(x[i : i + 1].clone(), [weight[i // 4]])
            start = 4 * i if i < 4 else 16 + 3 * (i - 4)
            assert torch.equal(rows.values[start : start + own.values.numel()], own.values)
        with pytest.raises(TypeError, match=r"inside of batch_invariant\(\) data is read once"):
            msd_kernels.optimal_denoiser(image, 1.0, iter([data]))


class Network(nn.Module):
    """What U-Nets and transformers are made of, in PyTorch's own layers."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.conv, self.up = nn.Conv2d(3, width, 3, padding=1), nn.ConvTranspose2d(width, 5, 3, 2)
        self.group_norm, self.layer_norm = nn.GroupNorm(4, width), nn.LayerNorm(width)
        self.batch_norm, self.act = nn.BatchNorm2d(5), nn.SiLU(inplace=True)
        self.emb, self.qkv, self.proj = (
            nn.Linear(7, width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.act(self.group_norm(self.conv(x))) + self.emb(torch.sigmoid(t))[:, :, None, None]
        h = F.avg_pool2d(h, 2)
        n, c = h.shape[:2]
        tokens = self.layer_norm(h.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).view(n, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y + torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1) @ v
        h = h + self.proj(y.transpose(1, 2).reshape(n, -1, c)).transpose(1, 2).reshape(h.shape)
        h = self.batch_norm(F.gelu(self.up(h), approximate="tanh"))
        gate = F.normalize(h.mean((2, 3))).pow(1.5).nan_to_num(0.1)
        return F.interpolate(h, scale_factor=1.5, mode="bilinear") * gate[:, :, None, None]


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.float64, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
    ],
    ids=str,
)
def test_batch_invariance_of_a_network_of_pytorchs_own_layers(dtype, memory_format, generator):
    torch.manual_seed(1)
    network = Network().eval().to(dtype)
    x = torch.randn(7, 3, 14, 14, generator=generator).to(dtype, memory_format=memory_format)
    t = torch.randn(7, 7, generator=generator).to(dtype)
    with torch.no_grad():
        ordinary = network(x, t)
        with batch_invariant():
            together, turned = network(x, t), network(x.flip(0), t.flip(0)).flip(0)
            single = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, ordinary, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(together, turned)
    assert torch.equal(together, single)


X = torch.randn(5, 6, 61, 37, generator=torch.Generator().manual_seed(3))  # more than a thread's share
M, W, V = X[0, 0], X[1, :, :37, 0].contiguous(), X[0, 0, 0]
FUNCTIONS = {
    **{
        name: getattr(torch, name, None) or getattr(F, name)
        for name in ("sigmoid", "exp2", "sinh", "cosh", "tanh", "exp", "sin", "rsqrt", "erf")
    },
    **{name: getattr(F, name) for name in ("silu", "gelu", "mish", "softplus", "elu", "logsigmoid")},
    "methods": lambda x: x.sigmoid() * x.mul(0.1).exp_(),
    "operators": lambda x: (x.abs() ** 1.3) + 1.1**x,
    "two tensors": lambda x: torch.atan2(x, x[:, :1] + 1) + torch.addcmul(x, x, x, value=0.3),
    "in place": lambda x: F.silu(x.clone(), inplace=True),
    "transposed": lambda x: torch.sigmoid(x.transpose(1, 3)),
    "sums": lambda x: x.mean((1, 2)) + x.sum(2).std(1),
    "norm": lambda x: x.norm(dim=1) + torch.linalg.vector_norm(x, dim=1),
    "statistics": lambda x: torch.cat(torch.var_mean(x, dim=(2, 3), keepdim=True), 1),
    "softmax": lambda x: x.softmax(1) + x.log_softmax(-1) + torch.logsumexp(x, 2, keepdim=True),
    "glu": lambda x: F.glu(x, 1),
    "matrix and batch": lambda x: torch.matmul(M.T, x),
    "batch and vector": lambda x: x @ V,
    "batch and matrix": lambda x: x[:, 0] @ W.T,
    "rows": lambda x: x[:, 0, 0] @ W.T + torch.addmm(V[:6], x[:, 0, 1], W.T) + torch.mv(x[:, 0, 2], V)[:, None],
    "bmm": lambda x: torch.bmm(x[:, 0], x[:, 1].mT) + torch.baddbmm(x[:, 2, :, :1], x[:, 0], x[:, 1].mT),
    "einsum": lambda x: torch.einsum("bchw,bcHw->bchH", x, x),
    "einsum of a matrix": lambda x: torch.einsum("chw,bc->bh", X[0], x[:, :, 0, 0]),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, x[:, :1, :, :1] + x[:, :1, :, :1].mT),
    "norms": lambda x: F.group_norm(x, 2) + F.layer_norm(x, (37,)) + F.rms_norm(x, (61, 37)),
    "conv1d": lambda x: F.conv1d(x[:, :, 0], X[:4, :, :3, 0]),
    "conv3d": lambda x: F.conv3d(x[:, None], X[:1, :1, None, :3, :3]),
    "poolings": lambda x: F.adaptive_avg_pool2d(x, (3, 2)) + F.avg_pool2d(x, (20, 17)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("two_threads")
def test_batch_invariance_of_pytorchs_functions(name, dtype, monkeypatch):
    for space in ("M", "W", "V", "X"):
        monkeypatch.setitem(globals(), space, globals()[space].to(dtype))
    function, x = FUNCTIONS[name], X
    ordinary = function(x)
    with batch_invariant():
        together = function(x)
        single = [function(x[i : i + 1].clone()) for i in range(5)]
        odd = function(
            torch.cat([x, x[:1]]).view(-1)[x[0].numel() :].view(x.shape)
        )  # begins elsewhere in memory
    tolerance = {"rtol": 4e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(together, ordinary, **tolerance, equal_nan=True)
    for i, result in enumerate(single):
        assert torch.equal(together[i].nan_to_num(), result[0].nan_to_num()), i
        assert torch.equal(together[(i + 1) % 5].nan_to_num(), odd[i].nan_to_num()), i


def test_batch_invariance_leaves_what_mixes_samples_alone():
    x = X[:, :, 0]
    with batch_invariant():
        assert torch.equal(x.sum(), X[:, :, 0].sum())
        assert x.mean(0).shape == x.shape[1:]
        assert F.softmax(x, 0).sum(0).allclose(torch.ones(()))
        assert torch.arange(12).view(3, 4).sum(1).tolist() == [6, 22, 38]
        assert torch.empty(0, 6).sigmoid().shape == F.linear(torch.empty(0, 6), W[:, :6]).shape == (0, 6)


class Elsewhere:
    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nn.MultiheadAttention(6, 2).eval()(x, x, x), "multi_head_attention_forward has no sample"),
        (lambda x: nn.LSTM(6, 2)(x), "lstm has no sample-by-sample form"),
        (lambda x: nn.BatchNorm1d(6)(x), "batch normalisation in training"),
        (lambda x: torch.einsum("...i,i->...", x, x[0, 0]), "einsum needs an equation with '->'"),
        (lambda x: torch.exp(x, out=torch.empty(0)), "exp with out= is not covered"),
        (lambda x: batch_invariance.require_cpu(x, Elsewhere()), "holds on the CPU, got a tensor on cuda:0"),
    ],
)
def test_batch_invariance_refuses(call, message, generator):
    x = torch.randn(3, 6, 6, generator=generator)
    with (
        batch_invariant(),
        pytest.raises(NotImplementedError, match=f"batch_invariant: {message}"),
    ):
        call(x)


def test_batch_invariance_refuses_compiled_functions_before_and_after_they_were_compiled():
    x, weight = X[:2, :, :5, :5], [X[:3, :, :3, :3].contiguous()]
    functions = (
        nn.Sequential(nn.Conv2d(6, 4, 3), nn.SiLU()),
        lambda x: msd_kernels.grouped_conv2d(StageBatch.from_dense(x), weight).values,
    )

    def inside(x):
        with batch_invariant():
            return functions[0](x)

    with torch.no_grad():
        for function in functions:
            compiled = torch.compile(function, backend="eager")
            for before in (False, True):
                if before:
                    expected = compiled(x)
                with (
                    batch_invariant(),
                    pytest.raises(NotImplementedError, match=r"what torch\.compile fuses"),
                ):
                    compiled(x)
            torch.testing.assert_close(compiled(x), expected)  # goes on to work outside
        with pytest.raises(NotImplementedError, match=r"what torch\.compile fuses"):
            torch.compile(inside, backend="eager")(x)
        with torch.compiler.set_stance("force_eager"), batch_invariant():
            assert torch.equal(compiled(x).view(2, -1)[0], compiled(x[:1]))


def test_batch_invariance_is_the_threads_own_and_nests():
    seen = {}

    def look():
        seen["other"] = batch_invariance.active()

    with batch_invariant():
        with batch_invariant():
            pass
        seen["inner left"] = batch_invariance.active()
        other = threading.Thread(target=look)
        other.start()
        other.join()
        with pytest.raises(KeyError), batch_invariant():
            raise KeyError
        seen["after an error"] = batch_invariance.active()
    assert seen == {"inner left": True, "other": False, "after an error": True}
    assert not batch_invariance.active()


@pytest.mark.parametrize("context", [nullcontext, batch_invariant])
def test_batch_invariance_shows_in_explain_and_keeps_errors(context, generator):
    x, weight = (
        batch(generator, torch.float32, CHANNELS, (4, 4)),
        weights(generator, torch.float32, CHANNELS, WIDER),
    )
    with context():
        explanation = msd_kernels.explain("grouped_linear", x, weight)
        assert ("called sample by sample inside of batch_invariant()" in str(explanation)) == (
            context is batch_invariant
        )
        assert "sample by sample" not in str(msd_kernels.explain("group_norm", x, 1))
        with pytest.raises(ValueError, match="grouped_linear: weight of stage 1"):
            msd_kernels.grouped_linear(x, [weight[0], weight[2], weight[2]])


def test_batch_invariance_has_gradients(generator):
    x, w = (
        batch(generator, torch.float64, CHANNELS, (3, 3)),
        weights(generator, torch.float64, CHANNELS, WIDER, 3, 3),
    )
    found = []
    for context in (nullcontext, batch_invariant):
        leaves = [t.clone().requires_grad_() for t in (x.values, *w)]
        with context():
            y = msd_kernels.grouped_conv2d(x.with_values(leaves[0]), leaves[1:]).map(torch.sigmoid)
        found.append(torch.autograd.grad(y.values.square().sum(), leaves, materialize_grads=True))
    torch.testing.assert_close(found[1], found[0])
