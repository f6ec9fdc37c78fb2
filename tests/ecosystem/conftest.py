"""Which modules of this folder are read at all."""

from __future__ import annotations

from pathlib import Path

import pytest

# Their tests are all marked so, and what they import takes up to half a minute.
ECOSYSTEM = (
    "test_accelerate.py",
    "test_diffusers.py",
    "test_hub.py",
    "test_lightning.py",
    "test_peft.py",
    "test_torchao.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out modules whose tests would all be deselected, before they import anything."""
    left_out = "not ecosystem" in config.getoption("markexpr") and collection_path.name in ECOSYSTEM
    return True if left_out else None
