"""What every op owes besides its values, of the Triton kernels, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from interpreter import require_interpreter

require_interpreter()

from msd_kernels.dispatch.backends import use  # noqa: E402
from op_calls import CALLS, forward_and_backward, strided  # noqa: E402


@pytest.mark.parametrize("build", [b for _, b in CALLS.values()], ids=CALLS)
def test_contract_takes_inputs_with_gaps(build, generator):
    """Kernels read dense memory, and between the elements of these views there is NaN."""
    call = build(4)
    leaves = call.leaves(generator)
    with use("reference"):
        expected = forward_and_backward(call, leaves)
    gaps = [strided(t.detach()) for t in leaves]
    with use("triton"):
        found = forward_and_backward(call, [t.requires_grad_() for t in gaps])
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
