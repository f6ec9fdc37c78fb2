"""A file is replaced as a whole or not at all, and what stands in the way is said before."""

import os
import re

import pytest

from multistage_diffusion.atomic_files import check_replaceable, replacing


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
