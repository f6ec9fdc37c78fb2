"""The calls that ``make gpu-smoke`` makes of every op: EDM's own shapes and odd ones, as functions of plain tensors.

Empty stages, channels of 3, 32, 65, 160 and 640, groups that are no powers of two, odd sizes, all memory formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from msd_kernels import (
    StageBatch,
    attention,
    group_norm,
    grouped_conv2d,
    grouped_linear,
    optimal_denoiser,
    resample2d,
)
from msd_kernels.dispatch.backends import use

# What a call computes in, by name; float32 without TF32 unless that is asked for.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# The largest error, as a share of the exact result: of the norms, and of the largest elements. A few roundings: by the
# library's kernels on a processor no case has more than half of it.
NORM_TOLERANCE = {"bf16": 1.2e-2, "fp16": 1.5e-3, "fp32": 1e-5, "tf32": 2.0**-8}
ELEMENT_TOLERANCE = {"bf16": 2.0**-6, "fp16": 2.0**-9, "fp32": 1e-4, "tf32": 2.0**-6}
SEED = 20240617
EDM = (384, 256, 32)


@dataclass(frozen=True)
class Call:
    """One call of an op as a function of leaves of ``shapes``, of which those in ``small`` are weights.

    Attributes:
        kinds: the names in :data:`DTYPES` that say something of their own.
    """

    op: str
    label: str
    shapes: Sequence[tuple[int, ...]]
    function: Callable[..., Tensor]
    kinds: Sequence[str] = ("bf16", "fp16", "fp32")

    def leaves(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Off-centre values; rounded to ``dtype``, so that the exact result is of the same numbers."""
        generator = torch.Generator(device).manual_seed(SEED)
        drawn = (torch.randn(shape, generator=generator, device=device) + 0.25 for shape in self.shapes)
        return [leaf.to(dtype).requires_grad_() for leaf in drawn]

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The result and the gradients of all leaves for a random cotangent."""
        y = self.function(*leaves)
        generator = torch.Generator(y.device).manual_seed(SEED + 1)
        dy = torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@dataclass(frozen=True)
class Case:
    """A call by one backend in one arithmetic."""

    call: Call
    backend: str
    kind: str

    def __str__(self) -> str:
        return f"{self.call.op}, {self.call.label}, {self.kind}, {self.backend}"

    def run(self, device: str, backend: str | None = None) -> list[Tensor]:
        """``backend`` in the place of the case's own."""
        with use(backend or self.backend), exact(self.kind != "tf32"):
            return self.call.run(self.call.leaves(device, DTYPES[self.kind]))

    def errors(self, device: str, backend: str | None = None) -> tuple[float, float]:
        """The largest errors of norms and of elements, each over its tolerance: right up to 1."""
        leaves = self.call.leaves(device, DTYPES[self.kind])
        with use("reference"):
            expected = self.call.run([leaf.detach().double().requires_grad_() for leaf in leaves])
        return compare(self.run(device, backend), expected, self.kind)


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], kind: str) -> tuple[float, float]:
    """As :meth:`Case.errors`; what is not finite is infinitely wrong."""
    worst = [0.0, 0.0]
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        error = a.double() - b
        norms = (torch.linalg.vector_norm(error) / torch.linalg.vector_norm(b).clamp(min=1e-300)).item()
        elements = (error.abs().max() / b.abs().max().clamp(min=1e-300)).item()
        for i, share in enumerate((norms / NORM_TOLERANCE[kind], elements / ELEMENT_TOLERANCE[kind])):
            worst[i] = max(worst[i], share if math.isfinite(share) else math.inf)
    return worst[0], worst[1]


@contextmanager
def exact(without_tf32: bool) -> Iterator[None]:
    """Sums in float32, of products of float32 or of TF32."""
    precision = "ieee" if without_tf32 else "tf32"
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    with ExitStack() as stack:
        for setting in settings:
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = precision
        matmul = torch.backends.cuda.matmul
        for name in (
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_reduced_precision_reduction",
        ):
            stack.callback(setattr, matmul, name, getattr(matmul, name))
            setattr(matmul, name, False)
        yield


def cases(op: str) -> list[Case]:
    """All of an op: its calls by every backend that a GPU has besides the reference."""
    backends = import_module(f"msd_kernels.ops.{op}").BACKENDS.candidates
    names = [backend.name for backend in backends if backend.name not in ("reference", "cpu")]
    calls = CALLS[op]()
    return [Case(call, name, kind) for call in calls for kind in call.kinds for name in names]


def packed(counts: Sequence[int], channels: Sequence[int], pixels: int = 1) -> tuple[int]:
    """The shape of the values of a StageBatch."""
    return (sum(n * c for n, c in zip(counts, channels, strict=True)) * pixels,)


def parts_of(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Consecutive parts of a flat tensor in these shapes: the weights of all stages out of one leaf."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def stage_norm(label: str, counts, channels, groups, side: int) -> Call:
    vectors = [(c,) for c in channels]

    def function(x, weight, bias, scale, shift):
        return group_norm(
            StageBatch(x, counts, channels, side, side),
            groups,
            parts_of(weight, vectors),
            parts_of(bias, vectors),
            scale=StageBatch(scale, counts, channels, 1, 1),
            shift=StageBatch(shift, counts, channels, 1, 1),
            activation="silu",
        ).values

    per_sample, per_channel = packed(counts, channels), (sum(channels),)
    shapes = [packed(counts, channels, side**2), per_channel, per_channel, per_sample, per_sample]
    return Call("group_norm", label, shapes, function)


def dense_norm(label: str, shape: tuple[int, ...], groups: int, memory_format: torch.memory_format) -> Call:
    def function(x, weight, bias):
        return group_norm(x.contiguous(memory_format=memory_format), groups, weight, bias)

    return Call("group_norm", label, [shape, shape[1:2], shape[1:2]], function)


def group_norms() -> list[Call]:
    return [
        stage_norm("EDM 32x32", (3, 1, 2), EDM, (32, 32, 8), 32),
        stage_norm("empty stage, 3 160 65 channels", (2, 0, 1, 1), (3, 64, 160, 65), (3, 8, 20, 13), 9),
        dense_norm("640 channels, NHWC", (2, 640, 16, 16), 32, torch.channels_last),
        dense_norm("LDM 224 channels, NHWC", (2, 224, 32, 32), 32, torch.channels_last),
        dense_norm("65 channels, NCHW", (2, 65, 9, 7), 5, torch.contiguous_format),
    ]


def conv(
    label: str, counts, channels, out_channels, height: int, width: int, kernel=3, skip=0, resample=None
) -> Call:
    """With bias, sample bias, residual and scale; ``skip`` channels of a dense second source."""
    weights = [(o, c + skip, kernel, kernel) for c, o in zip(channels, out_channels, strict=True)]
    factor = {"up": 2, "down": 0.5, None: 1}[resample]
    out_height, out_width = int(height * factor), int(width * factor)

    def function(x, weight, bias, sample_bias, residual, *sources):
        dense = [source.contiguous(memory_format=torch.channels_last) for source in sources]
        return grouped_conv2d(
            StageBatch(x, counts, channels, height, width),
            parts_of(weight, weights),
            parts_of(bias, [(o,) for o in out_channels]),
            skip=dense[0] if dense else None,
            sample_bias=StageBatch(sample_bias, counts, out_channels, 1, 1),
            residual=StageBatch(residual, counts, out_channels, out_height, out_width),
            scale=0.5**0.5,
            resample=resample,
        ).values

    shapes = [
        packed(counts, channels, height * width),
        (sum(map(math.prod, weights)),),
        (sum(out_channels),),
        packed(counts, out_channels),
        packed(counts, out_channels, out_height * out_width),
    ]
    shapes += [(sum(counts), skip, height, width)] if skip else []
    return Call("grouped_conv2d", label, shapes, function, tuple(DTYPES))


def convs() -> list[Call]:
    return [
        conv("EDM 16x16 with a skip", (3, 1, 2), EDM, EDM, 16, 16, skip=256),
        conv("empty stage, 640 65 32 channels", (2, 0, 1), (640, 65, 32), (160, 3, 640), 8, 8),
        conv("1x1, 3 65 channels", (2, 1), (3, 65), (32, 160), 7, 5, kernel=1),
        conv("up", (1, 2), (256, 32), (256, 32), 8, 8, resample="up"),
        conv("up 1x1", (1, 2), (256, 32), (384, 32), 8, 8, kernel=1, resample="up"),
        conv("down", (1, 2), (128, 32), (128, 32), 16, 8, resample="down"),
    ]


def linear(label: str, rows, in_features, out_features) -> Call:
    weights = list(zip(out_features, in_features, strict=True))

    def function(x, weight, bias):
        batch = StageBatch(x, rows, in_features, 1, 1)
        biases = parts_of(bias, [(o,) for o in out_features])
        return grouped_linear(batch, parts_of(weight, weights), biases).values

    shapes = [packed(rows, in_features), (sum(map(math.prod, weights)),), (sum(out_features),)]
    return Call("grouped_linear", label, shapes, function, tuple(DTYPES))


def linears() -> list[Call]:
    return [
        linear("EDM's embedding", (92, 3, 1), (512, 512, 512), EDM),
        linear("empty stage, 3 65 160 features", (5, 0, 8), (65, 32, 160), (3, 160, 640)),
    ]


def packed_attention(label: str, counts, heads, head_dims, side: int, layout: str) -> Call:
    channels = [3 * h * d for h, d in zip(heads, head_dims, strict=True)]

    def function(x):
        batch = StageBatch(x, counts, channels, side, side)
        return attention(batch, num_heads=heads, layout=layout).values

    return Call("attention", label, [packed(counts, channels, side**2)], function, tuple(DTYPES))


def planar_attention(label: str, shape: tuple[int, ...], heads: int) -> Call:
    def function(x):
        return attention(x, num_heads=heads, layout="blocked")

    return Call("attention", label, [shape], function, tuple(DTYPES))


def cross_attention(label: str, batch: int, heads: int, head_dim: int, tokens: int, context: int) -> Call:
    shapes = [(batch, heads, length, head_dim) for length in (tokens, context, context)]
    return Call("attention", label, shapes, attention, tuple(DTYPES))


def attentions() -> list[Call]:
    ones = (1, 1, 1)
    return [
        packed_attention("EDM 16x16", (3, 1, 2), ones, EDM, 16, "per_head"),
        packed_attention("EDM 8x8, empty stage, interleaved", (2, 0, 3), ones, EDM, 8, "interleaved"),
        packed_attention("odd heads and tokens", (2, 1), (3, 1), (20, 33), 7, "per_head"),
        packed_attention("LDM 32x32", ones, (8, 6, 4), (32, 32, 32), 32, "per_head"),
        planar_attention("NCHW", (2, 3 * 160, 12, 12), 2),
        cross_attention("77 tokens of context", 2, 4, 40, 256, 77),
    ]


def stage_resampling(label: str, filter: Sequence[float], counts, channels, side: int, **factor: int) -> Call:
    def function(x):
        return resample2d(StageBatch(x, counts, channels, side, side), filter, **factor).values

    return Call("resample2d", label, [packed(counts, channels, side**2)], function)


def dense_resampling(label: str, filter, shape, memory_format: torch.memory_format, **factor: int) -> Call:
    def function(x):
        return resample2d(x.contiguous(memory_format=memory_format), filter, **factor)

    return Call("resample2d", label, [shape], function)


def resamplings() -> list[Call]:
    box, fir, odd = (1.0, 1.0), (1.0, 3.0, 3.0, 1.0), (1.0, 2.0, 1.0)
    stages = (2, 0, 1, 1), (3, 32, 160, 65), 16
    return [
        stage_resampling("EDM 32x32, box, down", box, (3, 1, 2), EDM, 32, down=2),
        stage_resampling("empty stage, 3 160 65 channels, fir, up", fir, *stages, up=2),
        stage_resampling("empty stage, 3 160 65 channels, fir, down", fir, *stages, down=2),
        dense_resampling("640 channels, NHWC, box, up", box, (2, 640, 8, 8), torch.channels_last, up=2),
        dense_resampling("odd size, NCHW, down", odd, (3, 5, 7, 9), torch.contiguous_format, down=2),
    ]


def denoising(label: str, batch: int, samples: int, shape: tuple[int, ...], data: torch.dtype) -> Call:
    """Of ``samples`` of a data set that is stored in ``data``; sigma differs by sample."""

    def function(x):
        generator = torch.Generator(x.device).manual_seed(SEED + 2)
        drawn = torch.rand(samples, *shape, generator=generator, device=x.device)
        stored = (255 * drawn).to(data) if data == torch.uint8 else drawn.to(data)
        sigma = torch.linspace(2.0, 20.0, batch, dtype=torch.float64, device=x.device)
        return optimal_denoiser(x, sigma, stored)

    return Call("optimal_denoiser", label, [(batch, *shape)], function, ("fp32",))


def denoisings() -> list[Call]:
    return [
        denoising("CIFAR-10 in uint8", 5, 200, (3, 32, 32), torch.uint8),
        denoising("odd sizes in float32", 3, 65, (7, 9), torch.float32),
    ]


CALLS: dict[str, Callable[[], list[Call]]] = {
    "grouped_conv2d": convs,
    "attention": attentions,
    "group_norm": group_norms,
    "resample2d": resamplings,
    "grouped_linear": linears,
    "optimal_denoiser": denoisings,
}


def all_cases() -> list[Case]:
    return [case for op in CALLS for case in cases(op)]
