"""Runs every way through the compiled CUDA kernels on small tensors: for compute-sanitizer, see gpu_check.py.

Tensors are made on the CPU, so that there is little else on the device. A result that is not finite fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from msd_kernels import StageBatch, group_norm  # noqa: E402
from msd_kernels.backends import use  # noqa: E402

# The exit status that says that something is wrong with the kernels and not with this machine's tools.
FOUND = 9
# (counts, channels, groups, side): one block; a cluster; two passes; stages of which some begin at odd addresses.
GROUP_NORMS = [
    ((2,), (64,), (8,), 8),
    ((4,), (256,), (16,), 32),
    ((1,), (16,), (1,), 256),
    ((1, 0, 2, 1), (3, 8, 64, 36), (3, 2, 16, 4), 9),
]


def run_group_norm(counts, channels, groups, side: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).cuda().requires_grad_()

    samples = sum(n * c for n, c in zip(counts, channels, strict=True))
    x = StageBatch(draw(samples * side**2), counts, channels, side, side)
    scale, shift = (StageBatch(draw(samples), counts, channels, 1, 1) for _ in range(2))
    weight = [draw(c) for c in channels]
    y = group_norm(x, groups, weight, scale=scale, shift=shift, activation="silu").values
    leaves = [x.values, scale.values, shift.values, *weight]
    results = [y, *torch.autograd.grad(y, leaves, draw(y.numel()).detach())]
    if not all(result.isfinite().all() for result in (r.cpu() for r in results)):
        print(f"group_norm of {counts}, {channels}, {groups}, {side}, {dtype}: not finite")
        raise SystemExit(FOUND)


def main() -> None:
    with use("group_norm=cuda"):
        for case in GROUP_NORMS:
            for dtype in (torch.float32, torch.bfloat16):
                run_group_norm(*case, dtype)
    print("done")


if __name__ == "__main__":
    main()
