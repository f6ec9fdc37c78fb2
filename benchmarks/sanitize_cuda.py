"""Runs every way through the compiled CUDA kernels on small tensors: for compute-sanitizer.

    compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/sanitize_cuda.py

``--three`` runs one compiled kernel and two of Triton's instead, as ``make gpu-smoke`` does. Tensors are made on the
CPU, so that there is little else on the device. A result that is not finite fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from msd_kernels import (  # noqa: E402
    StageBatch,
    attention,
    group_norm,
    grouped_conv2d,
    resample2d,
)
from msd_kernels.dispatch.backends import use  # noqa: E402

# The exit status that says that something is wrong with the kernels and not with this machine's tools.
FOUND = 9
# (counts, channels, groups, side): one block; a cluster; two passes; stages of which some begin at odd addresses.
GROUP_NORMS = [
    ((2,), (64,), (8,), 8),
    ((4,), (256,), (16,), 32),
    ((1,), (16,), (1,), 256),
    ((1, 0, 2, 1), (3, 8, 64, 36), (3, 2, 16, 4), 9),
]
# (samples, channels, height, width): full vectors; neither full vectors nor an even width; more than one block.
MAPS = [(2, 16, 8, 8), (3, 5, 7, 9), (2, 96, 18, 22)]
# (counts, channels, side): stages of which some fill vectors.
STAGES = ((2, 0, 1), (16, 8, 3), 8)


def draw_from(
    generator: torch.Generator, dtype: torch.dtype, device: str = "cuda"
) -> Callable[..., torch.Tensor]:
    """A function that draws leaves of a shape."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_()

    return draw


def require_finite(what: str, results: Sequence[torch.Tensor]) -> None:
    if not all(result.isfinite().all() for result in (r.detach().cpu() for r in results)):
        print(f"{what}: not finite")
        raise SystemExit(FOUND)


def run_group_norm(counts, channels, groups, side: int, dtype: torch.dtype, device: str = "cuda") -> None:
    draw = draw_from(torch.Generator().manual_seed(0), dtype, device)
    samples = sum(n * c for n, c in zip(counts, channels, strict=True))
    x = StageBatch(draw(samples * side**2), counts, channels, side, side)
    scale, shift = (StageBatch(draw(samples), counts, channels, 1, 1) for _ in range(2))
    weight = [draw(c) for c in channels]
    y = group_norm(x, groups, weight, scale=scale, shift=shift, activation="silu").values
    leaves = [x.values, scale.values, shift.values, *weight]
    results = [y, *torch.autograd.grad(y, leaves, draw(y.numel()).detach())]
    require_finite(f"group_norm of {counts}, {channels}, {groups}, {side}, {dtype}", results)


def run_resample2d(filter: Sequence[float], factors: dict[str, int], dtype: torch.dtype) -> None:
    draw = draw_from(torch.Generator().manual_seed(0), dtype)
    counts, channels, side = STAGES
    values = draw(sum(n * c for n, c in zip(counts, channels, strict=True)) * side**2)
    cases = [(values, StageBatch(values, counts, channels, side, side))]
    for shape in MAPS:
        x = draw(*shape)
        cases += [(x, x), (x, x.to(memory_format=torch.channels_last))]
    for leaf, x in cases:
        y = resample2d(x, filter, **factors)
        y = y.values if isinstance(y, StageBatch) else y
        results = [y, *torch.autograd.grad(y, leaf, draw(*y.shape).detach())]
        require_finite(f"resample2d of {list(leaf.shape)}, {filter}, {factors}, {dtype}", results)


def run_grouped_conv2d(device: str) -> None:
    """A 3x3 convolution of stages of which some fill vectors, with an empty one."""
    draw = draw_from(torch.Generator().manual_seed(0), torch.bfloat16, device)
    counts, channels, side = STAGES
    values = draw(sum(n * c for n, c in zip(counts, channels, strict=True)) * side**2)
    weight = [draw(c, c, 3, 3) for c in channels]
    x = StageBatch(values, counts, channels, side, side)
    y = grouped_conv2d(x, weight).values
    leaves = [values, *(w for w, n in zip(weight, counts, strict=True) if n)]
    results = [y, *torch.autograd.grad(y, leaves, draw(y.numel()).detach())]
    require_finite("grouped_conv2d", results)


def run_attention(device: str) -> None:
    """Heads of which one is no power of two, tokens that fill no tile."""
    draw = draw_from(torch.Generator().manual_seed(0), torch.bfloat16, device)
    counts, channels, side = (2, 0, 1), (3 * 32, 3 * 8, 3 * 20), 7
    values = draw(sum(n * c for n, c in zip(counts, channels, strict=True)) * side**2)
    y = attention(StageBatch(values, counts, channels, side, side), layout="per_head").values
    require_finite("attention", [y, *torch.autograd.grad(y, values, draw(y.numel()).detach())])


# One kernel that is compiled ahead, with its cluster, and two of Triton's; each takes the device.
THREE: dict[str, Callable[[str], None]] = {
    "group_norm": partial(run_group_norm, *GROUP_NORMS[1], torch.bfloat16),
    "grouped_conv2d": run_grouped_conv2d,
    "attention": run_attention,
}


def run_three(device: str, setting: str) -> None:
    with use(setting):
        for name, run in THREE.items():
            run(device)
            print(f"{name}: done", flush=True)


def no_gpu() -> str:
    """What to say where there is no GPU; empty where there is one."""
    if torch.cuda.is_available():
        return ""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"no GPU here (torch {torch.__version__}, {built}, sees no device); nothing was run"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--three", action="store_true", help="three kernels: one compiled, two of Triton's")
    parser.add_argument("--rehearse", action="store_true", help="those three calls on the processor")
    options = parser.parse_args(arguments)
    if options.rehearse:
        run_three("cpu", "library")
        return
    if reason := no_gpu():
        print(f"sanitize_cuda: {reason}")
        return
    if options.three:
        run_three("cuda", "group_norm=cuda,triton")
        return
    for dtype in (torch.float32, torch.bfloat16):
        with use("group_norm=cuda"):
            for case in GROUP_NORMS:
                run_group_norm(*case, dtype)
        with use("resample2d=cuda"):
            for filter in ((1, 1), (1, 3, 3, 1), (1, 2, 1)):
                for factors in ({"up": 2}, {"down": 2}):
                    run_resample2d(filter, factors, dtype)
    print("done")


if __name__ == "__main__":
    main()
