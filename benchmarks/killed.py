"""``kill -9`` of ``vfx merge`` and ``vfx export`` at random moments: is each file the old one or the whole new one?

Every command replaces files that an earlier run wrote from other networks. Half of the moments lie anywhere in a run,
half between the first and the last change of a file. A file is "old" or "new" if its bytes are, or if what is loaded
from it computes what the old or the new network does; else it is "broken". What a killed process left beside the files
("drafts") must be gone when the next file has been written there. Commands with a checkpoint are then started again:
"same" counts the networks that equal, bit for bit, those of a run that nobody killed. Under ``torchrun`` all processes
are killed at once. Results go to ``benchmarks/results``: killed.json and killed.md; a broken file, a draft that stays
or another network ends the run with status 1.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.fashion import RESULTS
from benchmarks.options import Output
from vfx.emit.files import load
from vfx.files import write_atomic

MODEL = ["-m", "benchmarks.killed:tiny", "-i", "1x8x8"]
ROOT = Path(__file__).parents[1]
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(1)).split(32)
VFX = [sys.executable, "-m", "vfx"]
LARGE = [  # the same, with weights that lie beside their graph
    sys.executable, "-c", "import vfx.emit.onnx as o; o.IN_ONE_FILE = 0; import vfx.cli; vfx.cli.main()",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vfx"]
RESUMED = ["-d", "benchmarks.killed:IMAGES", "--solve", "least_squares"]
FILES = ("m.safetensors", "m.onnx", "m.pt2")
COMMANDS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {  # program, subcommand, files
    "merge": (VFX, "merge", (*FILES, "m.json")),
    "merge, checkpoint": (VFX, "merge", ("m.safetensors", "m.json")),
    "merge, checkpoint, two processes": (TORCHRUN, "merge", ("m.safetensors", "m.json")),
    "export": (VFX, "export", FILES),
    "export, weights beside the graph": (LARGE, "export", ("m.onnx",)),
}


@dataclass
class Row:
    """What the kills of one command left: how often each file was old, new or broken, and drafts."""

    command: str
    moments: int
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    drafts: int = 0
    stayed: int = 0
    same: int | None = None  # of the runs that were started again

    @property
    def broken(self) -> int:
        others = 0 if self.same is None else self.moments - self.same
        return sum(counts.get("broken", 0) for counts in self.files.values()) + self.stayed + others


def tiny() -> nn.Module:
    """A network that costs next to nothing beside the start of Python."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return tiny().eval()


def line(command: str, checkpoints: list[Path], folder: Path) -> list[str]:
    """The command that writes its files into ``folder``."""
    program, name, files = COMMANDS[command]
    given = checkpoints if name == "merge" else checkpoints[:1]
    outputs = [text for file in files for text in ("--json" if file == "m.json" else "-o", str(folder / file))]
    resumed = [*RESUMED, "--checkpoint", str(run_of(folder))] if resumes(command) else []
    return [*program, name, *map(str, given), *MODEL, *resumed, *outputs]


def resumes(command: str) -> bool:
    """Whether a command goes on from a checkpoint."""
    return "checkpoint" in command


def run_of(folder: Path) -> Path:
    """The checkpoint of a command that writes into ``folder``."""
    return folder.with_name(f"{folder.name}-run")


def content(path: Path) -> np.ndarray | None:
    """What the network in a file computes on fixed inputs; None where it cannot be read."""
    try:
        if path.suffix == ".json":
            return np.frombuffer(json.dumps(json.loads(path.read_text())["passes"]).encode(), np.uint8)
        if path.suffix == ".onnx":
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
        model = load(path, network(9)) if path.suffix == ".safetensors" else load(path)
        with torch.no_grad():
            return model.eval()(X).numpy()
    except Exception:  # a half-written file raises anything
        return None


def judged(path: Path, old: Path, new: Path) -> str:
    """Old, new or broken: by the bytes, else by what is computed."""
    if path.is_file() and path.suffix != ".onnx":  # whose weights may lie beside it
        for name, reference in (("old", old), ("new", new)):
            if path.read_bytes() == reference.read_bytes():
                return name
    found = content(path)
    if found is None:
        return "broken"
    for name, reference in (("old", old), ("new", new)):
        expected = content(reference)
        if expected is not None and found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5:
            return name
    return "broken"


def belongs(name: str, files: tuple[str, ...]) -> bool:
    """Whether a name is one of the files, or of the weights beside one."""
    return name in files or any(name.startswith(f"{file}.") and name.endswith(".data") for file in files)


def kill(command: list[str], folder: Path, wait: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """Start the command and kill it, with no chance to clear up, when ``wait`` returns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT,
    )  # fmt: skip
    wait(process)
    for one in (process.pid, *started_by(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.communicate()


def started_by(process: int) -> list[int]:
    """The processes that a process has started, and theirs: torchrun's are in sessions of their own."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(child) for path in lists for child in path.read_text().split()]
    return [one for child in children for one in (child, *started_by(child))]


def equal(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    ours, theirs = load(first), load(second)
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


class Trial:
    """One command with its old and its new files, to be killed as often as one likes."""

    def __init__(self, command: str, work: Path):
        self.command, self.files = command, COMMANDS[command][2]
        self.old, self.new, self.out = (work / name for name in ("old", "new", "out"))
        self.checkpoints = [work / f"edge{seed}.pt" for seed in range(4)]
        for seed, path in enumerate(self.checkpoints):
            torch.save(network(seed).state_dict(), path)
        self.old.mkdir()
        subprocess.run(line(command, self.checkpoints[:2], self.old), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        shutil.copytree(self.old, self.new)
        self.first, self.seconds = self._timed()

    def _timed(self) -> tuple[float, float]:
        """Seconds to the first change of a file and to the end of a run that nobody kills."""
        places = [self.new / file for file in self.files]
        before = [place.stat().st_ino for place in places]
        start, first = time.monotonic(), 0.0
        command = line(self.command, self.checkpoints[2:], self.new)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None:
            if not first and [place.stat().st_ino for place in places] != before:
                first = time.monotonic() - start
            time.sleep(0.005)
        assert process.returncode == 0
        return first, time.monotonic() - start

    def moment(self, index: int, generator: random.Random) -> float:
        start = (0.0, max(0.0, self.first - 0.1))[index % 2]
        return generator.uniform(start, self.seconds)

    def killed(self, row: Row, wait: Callable[[subprocess.Popen[bytes]], None]) -> None:
        """Kill one run and count what it left in ``row``."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.old, self.out)
        shutil.rmtree(run_of(self.out), ignore_errors=True)
        with tempfile.TemporaryDirectory() as temporary:
            kill(line(self.command, self.checkpoints[2:], self.out), Path(temporary), wait)
        for file in self.files:
            counts = row.files.setdefault(file, collections.Counter())
            counts[judged(self.out / file, self.old / file, self.new / file)] += 1
        row.drafts += sum(not belongs(one.name, self.files) for one in self.out.iterdir())
        if resumes(self.command):
            again = line(self.command, self.checkpoints[2:], self.out)
            subprocess.run(again, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
            row.same = (row.same or 0) + equal(self.out / "m.safetensors", self.new / "m.safetensors")
        write_atomic(self.out / "next.bin", b"")
        row.stayed += sum(not belongs(one.name, self.files) for one in self.out.iterdir()) - 1


def measured(command: str, moments: int, seed: int) -> Row:
    generator, row = random.Random(seed), Row(command, moments)
    with tempfile.TemporaryDirectory() as work:
        trial = Trial(command, Path(work))
        for index in track(range(moments), command, console=Console(stderr=True), transient=True):
            moment = trial.moment(index, generator)
            trial.killed(row, lambda _, moment=moment: time.sleep(moment))  # type: ignore[misc]
    return row


def markdown(rows: list[Row]) -> str:
    text = [(__doc__ or "").strip(), "", "| command | moments | file | old | new | broken | drafts | stayed | same |"]
    text.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        same = "" if row.same is None else str(row.same)
        for file, counts in row.files.items():
            states = " | ".join(str(counts.get(name, 0)) for name in ("old", "new", "broken"))
            text.append(f"| {row.command} | {row.moments} | {file} | {states} | {row.drafts} | {row.stayed} | {same} |")
    return "\n".join(text) + "\n"


def main(
    command: Annotated[list[str] | None, typer.Option(help="Only these commands; the other rows stay.")] = None,
    moments: Annotated[int, typer.Option(help="Kills of each command.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    output: Output = RESULTS,
) -> None:
    path = output / "killed.json"
    before = json.loads(path.read_text()) if command and path.is_file() else []
    by_command = {row["command"]: Row(**row) for row in before}
    for name in command or COMMANDS:
        by_command[name] = measured(name, moments, seed)
        rows = [by_command[label] for label in COMMANDS if label in by_command]
        write_atomic(path, json.dumps([vars(row) for row in rows], indent=1) + "\n")
        write_atomic(output / "killed.md", markdown(rows))
    print(markdown(rows))
    if any(row.broken for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
