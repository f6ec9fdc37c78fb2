"""An evaluation of the EDM CIFAR-10 multi-stage denoiser beside plain PyTorch's and its floor, see whole_step.py.

    python -m pytest benchmarks/bench_sampling_step.py

Goal C7.
"""

from __future__ import annotations

import pytest
from whole_step import WholeStep

from msd_kernels.runtime import processor

AMX = processor.kind().name == "amx"


@pytest.mark.goal
@pytest.mark.benchmark(group="sampling step")
@pytest.mark.parametrize(("batch", "least"), [(8, 1.5 if AMX else 2.2), (1, 1.5)], ids=["8", "1"])
def test_sampling_step_float32(batch, least, race_step):
    found = race_step(WholeStep((batch, 0, 0), forward=True))
    assert found["ratio"] >= least, f"C7: {found['ratio']:.2f} times as fast as plain, wanted {least}"


@pytest.mark.benchmark(group="sampling step")
def test_sampling_step_of_mixed_stages(race_step):
    """As in a service that samples for several users at once."""
    race_step(WholeStep((3, 3, 2), forward=True))
