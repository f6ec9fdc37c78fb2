import errno
import os
import sys

import pytest

from broken_streams import on_a_full_disk, without_reader
from multistage_diffusion import run_log
from multistage_diffusion.run_log import Progress, RunLog

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
