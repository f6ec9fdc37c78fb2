"""What the repository holds travels to everybody: no heavy files, no pickles, no upper limit on PyTorch."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 10**6
MOST_BYTES_OF_A_FILE = 2 * MEGABYTE  # outside of DATA
MOST_BYTES = 40 * MEGABYTE
DATA = "tests/data/"
# The first bytes of a pickle since protocol 2, and of PyTorch's old format, which is one.
PICKLED = re.compile(rb"\x80[\x02-\x08]")
PICKLE_NAMES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib")


def faults(files: dict[str, Path]) -> list[str]:
    """What is wrong with a tree of files, given by their names in it."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    found = [
        f"{name} has {size} bytes, {MOST_BYTES_OF_A_FILE} are allowed outside of {DATA}"
        for name, size in sizes.items()
        if size > MOST_BYTES_OF_A_FILE and not name.startswith(DATA)
    ]
    found += [f"{name} is a pickle" for name, path in files.items() if is_pickle(path)]
    if (total := sum(sizes.values())) > MOST_BYTES:
        found.append(f"the tree has {total} bytes, {MOST_BYTES} are allowed")
    return found


def is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix in PICKLE_NAMES or PICKLED.match(file.read(2)) is not None


def git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git, which knows what is tracked")


def test_tracked_files_are_light_and_no_pickles():
    names = git("ls-files", "-z").rstrip("\0").split("\0")
    assert "setup.py" in names
    assert faults({name: ROOT / name for name in names if (ROOT / name).is_file()}) == []


@pytest.mark.parametrize(
    ("name", "size", "fault"),
    [
        ("docs/picture.png", 2 * MEGABYTE, None),
        ("docs/picture.png", 2 * MEGABYTE + 1, "outside of tests/data/"),
        ("tests/data/weights.npz", 3 * MEGABYTE, None),
        ("tests/data/weights.npz", 41 * MEGABYTE, "the tree has"),
        ("scratch.pkl", 1, "is a pickle"),
        ("tests/data/trial.bin", 1, None),
    ],
)
def test_heavy_files_are_found(tmp_path, name, size, fault):
    path = tmp_path / "file"
    path = path.with_suffix(Path(name).suffix)
    with path.open("wb") as file:
        file.truncate(size)
    found = faults({name: path})
    assert [fault in each for each in found] == ([True] if fault else [])


def test_pickles_are_found_by_their_content(tmp_path):
    path = tmp_path / "trial.bin"
    path.write_bytes(b"\x80\x05]\x94.")
    assert faults({"trial.bin": path}) == ["trial.bin is a pickle"]


@pytest.mark.parametrize(
    "name",
    ["trial.pkl", "trial.pt", "trial.ckpt", "trial.safetensors", "core.1234", "build/x.o", "runs/a/loss.png"],
)
def test_git_ignores_what_trials_leave_behind(name):
    git("rev-parse", "HEAD")
    done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", name], cwd=ROOT, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["pyproject.toml", "README.md", "setup.py"])
def test_pytorch_has_a_lower_limit_alone(name):
    """The wheel uses PyTorch's stable interface of 2.11, which later versions keep."""
    stated = re.findall(r"torch ?[(\[]?((?:[<>=!~]=? ?\d[\d.]*,? ?)+)", (ROOT / name).read_text())
    assert set(stated) <= {">=2.11"}
    assert stated or name != "pyproject.toml"
    assert "2.11 to 2" not in (ROOT / name).read_text()
