"""Python programs in fresh processes that have PyTorch already: importing it takes longer than most of them run.

A process that has imported PyTorch and done nothing else is forked for each program, by ``multiprocessing``'s server.
What must be seen as a user's own process is not for this: the entrance of a command, what an import loads, the streams.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "numpy"])


class Program:
    """``python -c code arguments...`` as ``subprocess.Popen`` would run it, with its output in files.

    Args:
        code: the source.
        arguments: become ``sys.argv[1:]``.
        path: folders that come first in ``sys.path``.
        cwd: where it runs.
        environment: variables that it has besides those of this process.
    """

    def __init__(self, code: str, *arguments: object, path=(), cwd=None, environment=None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        setting = {
            "argv": ["-c", *map(str, arguments)],
            "path": [*map(str, path), *sys.path],
            "cwd": str(cwd or os.getcwd()),
            "environment": dict(os.environ) | (environment or {}),
        }
        self._process = CONTEXT.Process(target=_run, args=(code, list(map(str, self._files)), setting))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    def wait(self, seconds: float = 120) -> int:
        self._process.join(seconds)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("a program of a test", seconds, self.stdout, self.stderr)
        return self.returncode

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until it has printed that, and flushed it."""
        until = time.monotonic() + seconds
        while text not in self.stdout:
            if self.returncode is not None or time.monotonic() > until:
                raise AssertionError(f"{text!r} was not printed: {self.stdout}{self.stderr}")
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kills it, if it still runs, and waits for its end."""
        self._process.kill()
        self._process.join()


def run(code: str, *arguments: object, seconds: float = 120, **setting) -> Program:
    """Runs a program to its end."""
    program = Program(code, *arguments, **setting)
    program.wait(seconds)
    return program


def run_ranks(code: str, size: int, *arguments: object, seconds: float = 180, **setting) -> list[Program]:
    """``size`` processes of one program, which meet over Gloo as those of ``torchrun`` do, each run to its end.

    Raises:
        AssertionError: one of them failed; the message holds what they wrote.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    programs = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        programs.append(Program(code, *arguments, environment={**common, **own}, **setting))
    try:
        ended = [program.wait(seconds) for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert ended == [0] * size, "\n".join(program.stderr for program in programs)
    return programs


def _run(code: str, files: list[str], setting: dict) -> None:
    for number, file in zip((1, 2), files, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(setting["environment"])
    os.chdir(setting["cwd"])
    sys.argv, sys.path[:] = setting["argv"], setting["path"]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
