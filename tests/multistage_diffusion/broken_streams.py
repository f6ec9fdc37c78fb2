"""Text streams that lead nowhere: the reader has left, or the disk is full."""

import os


def without_reader():
    """The writing end of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def on_a_full_disk():
    return open("/dev/full", "w", buffering=1)
