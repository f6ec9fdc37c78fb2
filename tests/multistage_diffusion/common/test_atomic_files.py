"""A file is replaced as a whole or not at all, and what stands in the way is said before."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from multistage_diffusion.common import atomic_files
from multistage_diffusion.common.atomic_files import check_replaceable, remove_abandoned, replacing, set_aside


def test_the_new_content_shows_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "x.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary.name == path.name
            assert temporary.parent.parent == path.parent
            assert temporary.parent.name.startswith(".")
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_stay(tmp_path):
    target, link = tmp_path / "far" / "x.txt", tmp_path / "x.txt"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_what_stands_in_the_way_is_said(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("folder.png", "is a folder; give the name of a file"),
        ("file/x.png", "/file is no folder; give a file in one"),
        ("file/new/x.png", "/file is no folder; give a file in one"),
    ):
        path = tmp_path / name
        with pytest.raises(ValueError, match=f"^--out {re.escape(str(path))}: .*{message}"):
            check_replaceable(path, "--out")
    for name in ("file", "new/x.png", "new"):
        check_replaceable(tmp_path / name, "--out")
    assert not (tmp_path / "new").exists()


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: is no regular file"):
        check_replaceable(tmp_path / "x.png", "--out")


@pytest.mark.parametrize(
    ("protected", "message"),
    [("x.png", "the file there is write-protected"), ("", "the folder .* cannot be written")],
)
def test_what_may_not_be_written_is_said(tmp_path, monkeypatch, protected, message):
    (tmp_path / "x.png").write_text("old")
    # Permissions do not stop the superuser, who may run the tests.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path.resolve() / protected)
    with pytest.raises(ValueError, match=message):
        check_replaceable(tmp_path / "x.png", "--out")
    if not protected:
        with pytest.raises(ValueError, match=message):
            check_replaceable(tmp_path / "new" / "y.png", "--out")


WRITER = """
import sys, time
from multistage_diffusion.common.atomic_files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half of it")
    (temporary.parent / ".tmpAbCd").write_text("what a library writes beside it")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_one_writes_stays(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "x.txt")]
    writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))  # however long it takes
    for name in ("x.txt", "y.txt"):  # it may be writing the same file
        with replacing(tmp_path / name) as temporary:
            temporary.write_text(name)
        assert (left / "x.txt").read_text() == "half of it"
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=60)
    with replacing(tmp_path / "y.txt") as temporary:
        temporary.write_text("y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt", "y.txt"]
    assert (tmp_path / "x.txt").read_text() == "x.txt"


def no_locks(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("age", ["new", "old"])
def test_without_a_lock_age_tells(tmp_path, monkeypatch, age, locks):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    names = (".writing-empty", ".writing-locked", ".writing-12-x.txt", ".writing-other", ".writing-own")
    empty, locked, earlier, other, own = (tmp_path / name for name in names)
    empty.mkdir()
    locked.mkdir()
    (locked / ".writing").touch()
    own.mkdir()
    (own / "a user's file").touch()
    earlier.touch()
    other.touch()
    if age == "old":
        for path in tmp_path.iterdir():
            os.utime(path, (0, time.time() - 2 * 24 * 3600))
    with replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("written all the same")
    kept = {own, other, tmp_path / "x.txt"}
    if age == "new":
        kept |= {empty, earlier} | (set() if locks else {locked})
    assert set(tmp_path.iterdir()) == kept
    remove_abandoned(tmp_path, earlier_names_after=0)
    assert set(tmp_path.iterdir()) == kept - {earlier}


def test_a_folder_that_vanishes_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    original, calls = fcntl.flock, []

    def late(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            remove_abandoned(tmp_path)  # another process was faster
        else:
            original(descriptor, operation)

    monkeypatch.setattr(atomic_files.fcntl, "flock", late)
    with replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_nothing_is_replaced_before_it_is_on_the_disk(tmp_path, monkeypatch):
    path, synced = tmp_path / "x.txt", []
    path.write_text("old")
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(path.read_text()) or original(handle))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == ["old"]
    assert path.read_text() == "new"


def test_no_descriptor_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("x")
    remove_abandoned(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_set_aside_overwrites_nothing(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "x").write_text(str(number))
        set_aside(tmp_path / "x")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"damaged-x": "1", "damaged-x-2": "2", "damaged-x-3": "3"}
