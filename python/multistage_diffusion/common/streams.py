"""Telling on the standard streams, without harm to the work where a reader has left or the disk behind is full."""

from __future__ import annotations

import os
from typing import TextIO

__all__ = ["release", "silence", "tell"]


def tell(text: str, stream: TextIO | None) -> bool:
    """Prints a line at once.

    Returns:
        Whether the stream took it. Where it did not, it is silent from then on.
    """
    if stream is None:  # the process was started without it
        return False
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: it is closed
        silence(stream)
        return False
    return True


def silence(stream: TextIO) -> None:
    """Sends all that is, and will be, written to a stream nowhere.

    Else the interpreter would fail at its end over what the stream still holds.
    """
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
    except (OSError, ValueError):  # it is closed, or there is no file behind it, as in a notebook
        pass


def release(*streams: TextIO | None) -> None:
    """Writes out what the streams hold; what one does not take is dropped."""
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            silence(stream)
