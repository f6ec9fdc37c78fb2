"""Runs the tests of the Triton kernels in Triton's interpreter, on the CPU.

``TRITON_INTERPRET`` counts from the import of Triton on, so every file ``test_*_triton.py`` gets a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import VARIABLE, unusable

TESTS = Path(__file__).parent
FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*_triton.py"))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get(VARIABLE) == "1", reason="this is the interpreter's process")
@pytest.mark.skipif(bool(unusable()), reason=unusable())
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)],
        cwd=TESTS.parent,
        env=os.environ | {VARIABLE: "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
    assert " passed" in result.stdout, result.stdout
