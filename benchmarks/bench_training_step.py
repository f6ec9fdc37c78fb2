"""A training step of the EDM CIFAR-10 multi-stage network beside plain PyTorch's and its floor, see whole_step.py.

    python -m pytest benchmarks/bench_training_step.py

Goals C3, C4 and C10. Where the processor multiplies matrices of bfloat16 by itself (AMX), oneDNN's float32 is faster by
half, and less is asked for.
"""

from __future__ import annotations

import pytest
import torch
import training_steps
from whole_step import FLOOR, PLAIN, WholeStep

from harness import OURS
from msd_kernels.runtime import processor
from multistage_diffusion.common.host_memory import keep_freed_memory

FULL, MIXED = (8, 0, 0), (3, 3, 2)
AMX = processor.kind().name == "amx"
MOST_OF_FLOOR = 1.12


@pytest.mark.goal
@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize(
    ("goal", "counts", "least"),
    [("C3", FULL, 1.6 if AMX else 2.4), ("C4", MIXED, 1.4 if AMX else 2.1)],
    ids=["8-0-0", "3-3-2"],
)
def test_training_step_float32(goal, counts, least, race_step):
    found = race_step(WholeStep(counts))
    assert found["ratio"] >= least, f"{goal}: {found['ratio']:.2f} times as fast as plain, wanted {least}"
    peak = found["peak_bytes"]
    assert peak[OURS] <= peak[PLAIN], f"{goal}: {peak[OURS]:,} bytes, plain takes {peak[PLAIN]:,}"


@pytest.mark.goal
@pytest.mark.benchmark(group="training step")
@pytest.mark.skipif(
    AMX or not processor.computes_in(torch.bfloat16), reason="where there is bfloat16, but no AMX"
)
def test_training_step_float32_beats_plain_bfloat16(race, say, two_threads):
    keep_freed_memory()
    problem = training_steps.Problem.of(FULL)
    say("         checks losses and gradients of every step against float32")
    ours, plain = (problem.checked_cases(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    cases = {OURS: ours[OURS], "plain, bfloat16": plain["loop"]}
    ratio = race(cases, seconds=60.0, warm=True).ratio("plain, bfloat16").median
    assert ratio >= 1.0, f"C3: {ratio:.2f} times as fast as plain bfloat16, wanted 1"


@pytest.mark.goal
@pytest.mark.benchmark(group="training step")
@pytest.mark.skipif(not AMX, reason="where there is AMX")
def test_training_step_bfloat16_is_little_more_than_its_floor(race_step):
    found = race_step(WholeStep(FULL, torch.bfloat16))
    share = found[OURS] / found[FLOOR]
    assert share <= MOST_OF_FLOOR, f"C10: {share:.2f} times its floor, wanted at most {MOST_OF_FLOOR}"
