"""NaN, infinity and numbers whose squares overflow: no finite result is wrong, and nothing spreads."""

from __future__ import annotations

import pytest
import torch
from special_value_checks import CASES, check

from helpers import backend_names

# The reference works in float32 at least.
ON_EACH_BACKEND = [
    pytest.param(case, name, dtype, id=f"{case}-{name}-{str(dtype)[6:]}")
    for case, (backends, _) in CASES.items()
    for name in backend_names(backends)
    for dtype in ((torch.float32,) if name == "reference" else (torch.float32, torch.bfloat16, torch.float16))
]


@pytest.mark.parametrize(("case", "backend", "dtype"), ON_EACH_BACKEND, indirect=["backend"])
def test_special_values(case, backend, dtype):
    check(case, dtype)
