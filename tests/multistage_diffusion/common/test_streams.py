import io
import os

import pytest

from broken_streams import on_a_full_disk, without_reader
from multistage_diffusion.common.streams import release, silence, tell


def test_a_stream_that_works_is_told():
    stream = io.StringIO()
    assert tell("a line", stream)
    assert stream.getvalue() == "a line\n"


@pytest.mark.parametrize("make", [without_reader, on_a_full_disk])
def test_a_stream_that_does_not_is_silent_from_then_on(make):
    with make() as stream:
        assert not tell("lost", stream)
        stream.write("more\n")  # raises nothing
        stream.flush()
    # and closing it, as the interpreter does at its end, has raised nothing


def test_there_may_be_no_stream():
    assert not tell("lost", None)
    closed = io.StringIO()
    closed.close()
    assert not tell("lost", closed)


def test_release_writes_out_or_drops(tmp_path):
    with without_reader() as broken, (tmp_path / "kept").open("w") as kept:
        broken.reconfigure(line_buffering=False)
        broken.write("lost")
        kept.write("kept")
        release(broken, None, kept)
        assert (tmp_path / "kept").read_text() == "kept"


def test_silence_keeps_no_file_open():
    with without_reader() as stream:
        before = len(os.listdir("/proc/self/fd"))
        silence(stream)
        assert len(os.listdir("/proc/self/fd")) == before
