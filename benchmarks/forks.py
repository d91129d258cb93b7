"""pytest in forks of one process, which has loaded what most tests import: each run starts at once.

What is under test must not be loaded there; every fork loads it anew. Only this file's own process has to be started
with ``python -P``, so that its folder is no place to import from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HEAVY = (  # no plugins of pytest: it wants to load these by itself
    "numpy", "scipy.optimize", "scipy.stats", "sklearn.cluster", "networkx", "torch", "torch.export", "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes", "torchvision", "safetensors.torch", "PIL.Image", "typer", "rich.table",
    "jinja2", "pytest",
)  # fmt: skip
INTERNAL_ERROR = 3  # of pytest


class Forks:
    """Runs pytest in ``folder`` as often as asked; ``modules`` are loaded before."""

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str] = HEAVY):
        self.folder, self.environment, self.modules = folder, dict(environment), modules
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[str], limit: float) -> tuple[int, str]:
        """pytest's status and what it printed. Raises subprocess.TimeoutExpired behind ``limit`` seconds."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([limit, *arguments]) + "\n")
        process.stdin.flush()
        status, text = json.loads(process.stdout.readline())
        if status is None:
            raise subprocess.TimeoutExpired("pytest", limit)
        return status, text

    def close(self) -> None:
        if self._process is not None:
            with self._process:  # closes its input, behind which it ends
                pass

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-P", __file__, *self.modules]
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self._process


def serve(modules: Sequence[str]) -> None:
    """Read a limit and the arguments of a run from each line of the input, and answer with its status and output."""
    answers = os.fdopen(os.dup(1), "w")
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        limit, *arguments = json.loads(line)
        print(json.dumps(_forked(limit, arguments)), file=answers, flush=True)


def _forked(limit: float, arguments: Sequence[str]) -> tuple[int | None, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        signal.alarm(0)
        for stream in (1, 2):
            os.dup2(writer, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = INTERNAL_ERROR
        try:
            import pytest

            status = int(pytest.main(list(arguments)))
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(writer)
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        os.killpg(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(int(limit))
    with os.fdopen(reader, errors="replace") as output:
        text = output.read()
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return None if ended else os.waitstatus_to_exitcode(status), text


if __name__ == "__main__":
    serve(sys.argv[1:])
