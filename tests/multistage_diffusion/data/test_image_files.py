"""Folders of images: every part is read, or the reason why not is said."""

import os
import signal

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data.images import DataError, load_images


def brightness(folder):
    """The grey value of every image that is read, in their order."""
    return load_images(folder).images[:, 0, 0, 0].tolist()


def write_grey(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """A folder with images of brightness 1 and 2, and one of brightness 3 elsewhere."""
    write_grey(tmp_path / "d" / "a.png", 1)
    write_grey(tmp_path / "d" / "t" / "z.png", 2)
    write_grey(tmp_path / "elsewhere" / "x.png", 3)
    return tmp_path / "d"


def test_links_to_folders_and_files_are_followed(folder):
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    (folder / "b.png").symlink_to(folder.parent / "elsewhere" / "x.png")
    assert brightness(folder) == [1, 3, 3, 2]  # a.png, b.png, sub/x.png, t/z.png
    alone = folder.parent / "alone"
    alone.mkdir()
    (alone / "sub").symlink_to(folder)
    assert brightness(alone) == [1, 3, 3, 2]


def test_a_link_back_to_a_folder_above_adds_nothing(folder):
    (folder / "self").symlink_to(folder)
    (folder / "t" / "up").symlink_to("..")
    assert brightness(folder) == [1, 2]


def test_a_folder_linked_twice_is_read_twice(folder):
    for name in ("u", "v"):
        (folder / name).symlink_to(folder.parent / "elsewhere")
    assert brightness(folder) == [1, 2, 3, 3]


@pytest.mark.parametrize(("name", "target"), [("sub", "gone"), ("b.png", "gone.png")])
def test_a_broken_link_is_named(folder, name, target):
    (folder / "t" / name).symlink_to(target)
    with pytest.raises(DataError, match=f"t/{name} in .* is a broken link or no regular file; allowed are"):
        load_images(folder)


def test_what_cannot_be_read_is_named(folder):
    (folder / "t" / "circle").symlink_to("circle")
    with pytest.raises(
        DataError, match=r"t/circle, a part of .*, cannot be read: .*; make it readable, or remove it"
    ):
        load_images(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/t"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # permissions do not stop the superuser
    with pytest.raises(DataError, match=r"d/t, a part of .*/d, cannot be read: Permission denied"):
        load_images(folder)


@pytest.fixture
def at_most_ten_seconds():
    def too_long(*_):
        raise TimeoutError("waiting")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_are_refused_instead_of_waited_for(folder, at_most_ten_seconds):
    os.mkfifo(folder / "no image")
    os.mkfifo(folder / ".hidden.png")
    assert brightness(folder) == [1, 2]
    os.mkfifo(folder / "b.png")
    with pytest.raises(DataError, match=r"b\.png in .* no regular file"):
        load_images(folder)
    for suffix in (".npy", ".npz", ".zip"):
        os.mkfifo(folder / f"pipe{suffix}")
        with pytest.raises(DataError, match=f"pipe{suffix} is neither a folder nor a regular file"):
            load_images(folder / f"pipe{suffix}")


def test_hidden_folders_are_left_alone(folder):
    for name in (".cache", "__MACOSX"):
        write_grey(folder / name / "x.png", 9)
        (folder / name / "gone").symlink_to("nowhere")
    assert brightness(folder) == [1, 2]


@pytest.mark.parametrize("name", ["notes.txt", "labels.csv", "dataset.json", "Thumbs.db"])
def test_side_files_that_cannot_be_read_do_no_harm(folder, name):
    """They hold no images, whatever is wrong with them: broken links, circles of links, damaged content."""
    (folder / name).symlink_to("gone")
    (folder / "t" / name).symlink_to(name)
    (folder / f"another-{name}").write_bytes(b"\xff\x00{")
    assert brightness(folder) == [1, 2]


@pytest.mark.parametrize("name", ["@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"])
def test_what_systems_keep_beside_the_images_is_no_part_of_them(folder, name, monkeypatch):
    """Some of it may not be read by anybody, some of it are small copies of the images."""
    write_grey(folder / name / "a.png" / "THUMB_M.jpg", 9)
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert brightness(folder) == [1, 2]
