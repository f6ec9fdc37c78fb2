import contextlib
import errno
import os
import resource
import signal
import sys

import pytest

from broken_streams import on_a_full_disk, without_reader
from multistage_diffusion.training import run_log
from multistage_diffusion.training.run_log import LogWarning, Progress, RunLog

RECORD = {"loss": 1.0, "loss_stage": [1.0, None], "images_per_second": 5.0, "lr": 0.1}


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
@pytest.mark.parametrize("make", [without_reader, on_a_full_disk])
def test_progress_goes_quiet_where_nobody_reads_it(make, terminal, monkeypatch):
    with make() as stream:
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress(3, 0, seconds_between_lines=0)
        for _ in range(3):
            progress.advance()
            progress.report(RECORD)
        progress.close()
        assert progress.quiet
        assert progress.done == 3


@pytest.mark.parametrize("method", ["update", "set_postfix_str", "close"])
def test_a_terminal_may_go_at_any_moment(method, monkeypatch):
    class Bar:
        def __init__(self, **settings):
            pass

        def update(self, steps):
            pass

        set_postfix_str = close = lambda self, text=None: None

    def gone(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Bar, method, gone)
    monkeypatch.setattr(run_log, "tqdm", Bar)
    with without_reader() as stream:
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress(1, 0)
        assert not progress.quiet
        progress.advance()
        progress.report(RECORD)
        progress.close()
        assert progress.quiet


def test_there_may_be_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    progress = Progress(1, 0)
    progress.advance()
    progress.report(RECORD)
    progress.close()


def test_a_truncation_that_fails_leaves_the_log_and_nothing_beside_it(tmp_path, monkeypatch):
    log = RunLog(tmp_path / "log.jsonl")
    for step in (1, 2):
        log.append({"step": step})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        log.truncate(1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert log.read() == [{"step": 1}, {"step": 2}]


BAD = [
    b"not JSON at all",
    b'{"step": 3, "lo{"step": 4}',
    b"[1, 2]",
    b"\xff\xfe\x00",
    b"7",
    b'{"step": ' + b"[" * 5000,
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_in_between_costs_no_record(tmp_path, bad):
    log = RunLog(tmp_path / "log.jsonl")
    for step in (2, 4, 6, 8):
        log.append({"step": step})
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:1], bad + b"\n", *lines[1:]]))
    assert [record["step"] for record in log.read()] == [2, 4, 6, 8]
    with pytest.warns(LogWarning, match=r"log\.jsonl: 1 line\(s\) are no records"):
        log.truncate(6)
    assert log.path.read_bytes() == b"".join([*lines[:1], bad + b"\n", *lines[1:3]])
    assert log.read() == [{"step": 2}, {"step": 4}, {"step": 6}]


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["torn", "ended"])
def test_only_a_torn_last_line_goes(tmp_path, end):
    log = RunLog(tmp_path / "log.jsonl")
    log.path.write_bytes(b'{"step": 1}\n{"step": 2, "lo' + end)
    with contextlib.nullcontext() if not end else pytest.warns(LogWarning, match="1 line"):
        log.truncate(9)
    assert log.path.read_bytes() == b'{"step": 1}\n' + (b'{"step": 2, "lo\n' if end else b"")


def test_a_log_that_needs_no_change_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "replacing", None)
    log = RunLog(tmp_path / "log.jsonl")
    log.truncate(0)
    log.append({"step": 1})
    log.append({"event": "of another kind"})
    log.truncate(1)
    assert len(log.read()) == 2


@pytest.mark.parametrize("tail", [b'{"step": 1}', b'{"st'])
def test_an_append_starts_on_a_line_of_its_own(tmp_path, tail):
    log = RunLog(tmp_path / "log.jsonl")
    log.path.write_bytes(tail)
    log.append({"step": 2})
    log.append({"step": 3})
    assert log.path.read_bytes() == tail + b'\n{"step": 2}\n{"step": 3}\n'


def test_a_last_record_without_its_end_of_line_stays(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.path.write_bytes(b'{"step": 1}\n{"step": 2}')
    log.truncate(2)
    assert log.path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_records_that_cannot_be_written_go_with_the_next_one(tmp_path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))  # refuses as a full disk does
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = RunLog(tmp_path / "log.jsonl")
    try:
        log.append({"step": 1})
        for step in (2, 3):
            with pytest.warns(
                LogWarning, match=rf"{step - 1} record\(s\) could not be written yet: File too large"
            ):
                log.append({"step": step, "text": "that is longer than the disk"})
        assert log.path.read_bytes() == b'{"step": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, before)
    log.append({"step": 4})
    assert [record["step"] for record in log.read()] == [1, 2, 3, 4]


def make_folder(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_folder, make_pipe])
def test_what_is_no_log_is_set_aside(tmp_path, make):
    log = RunLog(tmp_path / "log.jsonl")
    make(log.path)
    assert not log.is_empty()
    with pytest.warns(LogWarning, match=r"cannot be read \(.*\); it is kept as .*damaged-log\.jsonl"):
        log.truncate(3)
    log.append({"step": 4})
    assert log.read() == [{"step": 4}]
    assert (tmp_path / "damaged-log.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "empty"),
    [(None, True), (b"", True), (b"\n \n", True), (b'{"st', True), (b'{"step": 1}', False), (b"?\n", False)],
)
def test_a_log_is_empty_where_nothing_would_be_lost(tmp_path, content, empty):
    log = RunLog(tmp_path / "log.jsonl")
    if content is not None:
        log.path.write_bytes(content)
    assert log.is_empty() == empty
