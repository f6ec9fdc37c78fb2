"""What tests of Triton kernels on the CPU share; test_interpreter.py runs them."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import interpreter_sanitizer
import interpreter_speed
import pytest

VARIABLE = "TRITON_INTERPRET"


def require_interpreter() -> None:
    """For the top of a ``test_*_triton.py``: skips it outside of the interpreter's process, checks memory in it."""
    if os.environ.get(VARIABLE) != "1":
        pytest.skip(f"runs with {VARIABLE}=1, through test_interpreter.py", allow_module_level=True)
    interpreter_speed.install()
    interpreter_sanitizer.install()


def unusable() -> str:
    """Why Triton's interpreter cannot run here, or an empty string."""
    try:
        triton, numpy = (_release(name) for name in ("triton", "numpy"))
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.7 fails with NumPy 2.4 and later"
    return ""


def _release(name: str) -> tuple[int, int]:
    major, minor = version(name).split(".")[:2]
    return int(major), int(minor)
