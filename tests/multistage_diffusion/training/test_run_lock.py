import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from multistage_diffusion.training.run_lock import RunError, RunLock

HOLDER = """
import sys, time
from multistage_diffusion.training.run_lock import RunLock
RunLock(sys.argv[1]).acquire()
print("has it", flush=True)
time.sleep(600)
"""


def test_a_folder_is_for_one_at_a_time(tmp_path):
    folder = tmp_path / "runs" / "x"
    with RunLock(folder) as first:
        first.acquire()  # makes the folder
        refusal = rf"another process trains in {folder} \(process {os.getpid()} on .+\); wait"
        with RunLock(folder) as second, pytest.raises(RunError, match=refusal):
            second.acquire()
        with pytest.raises(RunError):  # the one that was refused has released nothing
            RunLock(folder).acquire()
    with RunLock(folder) as third:
        third.acquire()


def test_a_process_that_is_killed_frees_the_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "has it\n"
    with RunLock(tmp_path) as lock:
        with pytest.raises(RunError, match=f"process {holder.pid} on"):
            lock.acquire()
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
        lock.acquire()


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.warns(UserWarning, match=r"cannot lock .*\.lock \(No locks available\)"):
        RunLock(tmp_path).acquire()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_that_cannot_be_opened_is_a_warning(tmp_path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.warns(UserWarning, match=r"cannot lock .*\.lock \(Is a directory\)"),
        RunLock(tmp_path) as lock,
    ):
        lock.acquire()


def test_a_file_of_another_user_is_locked_all_the_same(tmp_path, monkeypatch):
    original = os.open

    def protected(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return original(path, flags, *mode)

    (tmp_path / ".lock").touch()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        monkeypatch.setattr(os, "open", protected)
        with pytest.raises(RunError, match="another process trains in"):
            RunLock(tmp_path).acquire()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert lock._descriptor is not None


def test_who_has_a_folder_is_written_anew(tmp_path):
    (tmp_path / ".lock").write_text(
        "process 1 on a machine whose name is much longer than that of this one " * 3
    )
    with RunLock(tmp_path) as lock:
        lock.acquire()
        lines = (tmp_path / ".lock").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"process {os.getpid()} on ")
    assert "whose name" not in lines[0]


def test_a_lock_is_released_once(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    lock.release()
    other = os.open(tmp_path, os.O_RDONLY)  # has the number that the lock's descriptor had
    lock.release()
    os.close(other)
