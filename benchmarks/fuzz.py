"""Damaged and hostile files for every reader: is any error raw, does any code run, is anything left over or slow?

Each case is a good file changed by ``benchmarks.damage`` and read in a process of its own kind, in which a file's
code would be noticed: the mutants carry calls that make a folder, and the interpreter reports every program that is
started, connection that is opened and file that is written. A case is "read", "refused" (an error of vfx), "raw" (any
other error), "code", "left over" (a file that was not there before), "slow" (more than 5 s of the processor) or
"crash" (the process died). Results go to ``benchmarks/results``: fuzz.json and fuzz.md. Anything but "read" and
"refused" ends the run with status 1; ``--reader NAME --first N --cases 1`` runs one case again.
"""

from __future__ import annotations

import collections
import faulthandler
import io
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import nn

import vfx
from benchmarks.damage import (
    Mutator,
    Random,
    mutate_bytes,
    mutate_json,
    mutate_npy,
    mutate_safetensors,
    mutate_zip,
)
from benchmarks.fashion import RESULTS
from benchmarks.options import Output
from benchmarks.pairs_report import cell
from vfx.data.arrays import read_batches, read_inputs, read_labelled
from vfx.errors import VfxError
from vfx.files import write_atomic

SLOW = 5.0  # seconds of the processor
LOST = 60.0  # seconds by the clock, on a busy machine
MARK = "made-by-a-file"  # a folder
GOOD = ("read", "refused")
BAD = ("raw", "code", "left over", "slow", "crash")
_WATCHED = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link",
    "os.symlink", "os.truncate", "subprocess.", "shutil.", "socket.", "webbrowser.", "ctypes.dlopen",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A kind of file: its suffix, good files, how they are changed, and how one is read."""

    suffix: str
    good: Callable[[], list[bytes]]
    mutate: Mutator
    read: tuple[Callable[[Path], Any], ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    reader: str
    case: int
    verdict: str
    detail: str = ""
    seconds: float = 0.0


# good files -----------------------------------------------------------------------------------------------------------


class _Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 4, batch_first=True)
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last": self.cell(x)[0][:, -1] + self.shift * torch.tensor([1.0, 2.0, 3.0, 4.0])}


def _models() -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    perceptron = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return [
        (perceptron, torch.randn(2, 4)),
        (convolutions, torch.randn(2, 3, 8, 8)),
        (_Sequence(), torch.randn(2, 5, 3)),
    ]


def _exported(suffix: str, count: int = 3) -> list[bytes]:
    files = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, (model, x) in enumerate(_models()[:count]):
            files.append(vfx.export(model.eval(), Path(folder, f"{index}{suffix}"), x).read_bytes())
        if suffix == ".pt2":
            files.append(_traced_by_torch())
    return files


def _traced_by_torch() -> bytes:
    """A foreign archive: sizes that depend on the input, no batch."""
    sizes = nn.Sequential(nn.Conv1d(2, 3, 3, 2), nn.ReLU(), nn.ConstantPad1d(2, 0.0))
    axes = ({2: torch.export.Dim("length", min=16, max=64)},)
    torch.export.save(torch.export.export(sizes, (torch.randn(1, 2, 32),), dynamic_shapes=axes), buffer := io.BytesIO())
    return buffer.getvalue()


def _saved(old: bool) -> list[bytes]:
    states: list[Any] = [model.state_dict() for model, _ in _models()]
    states.append({"state_dict": states[0], "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}})
    states.append({"x": torch.randn(5, 4), "y": torch.arange(5)})
    files = []
    for state in states:
        torch.save(state, buffer := io.BytesIO(), _use_new_zipfile_serialization=not old)
        files.append(buffer.getvalue())
    return files


def _arrays() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)).astype(np.float32), np.arange(6)
    return [{"x": x, "y": y}, {"inputs": x}, {"input_ids": y.reshape(3, 2), "mask": y.reshape(3, 2) > 2}]


def _npy() -> list[bytes]:
    files = []
    for array in (array for arrays in _arrays() for array in arrays.values()):
        np.save(buffer := io.BytesIO(), array)
        files.append(buffer.getvalue())
    return files


def _npz() -> list[bytes]:
    files = []
    for arrays in _arrays():
        for save in (np.savez, np.savez_compressed):
            save(buffer := io.BytesIO(), **arrays)
            files.append(buffer.getvalue())
    return files


_PT2 = partial(mutate_zip, inner=lambda name: mutate_json if name.endswith(".json") else mutate_bytes)
_PT = partial(mutate_zip, inner=lambda name: mutate_bytes)
_DATA: tuple[Callable[[Path], Any], ...] = (
    read_inputs,
    read_labelled,
    partial(read_batches, names=["input_ids", "mask"]),
)
READERS: dict[str, Reader] = {
    "pt2": Reader(".pt2", partial(_exported, ".pt2"), _PT2, (vfx.load,)),
    "pt": Reader(".pt", partial(_saved, False), _PT, (vfx.load, *_DATA)),
    "pth, old form": Reader(".pth", partial(_saved, True), mutate_bytes, (vfx.load, *_DATA)),
    "safetensors": Reader(".safetensors", partial(_exported, ".safetensors"), mutate_safetensors, (vfx.load, *_DATA)),
    "onnx": Reader(".onnx", partial(_exported, ".onnx", 2), mutate_bytes, (vfx.load,)),
    "npz": Reader(".npz", _npz, partial(mutate_zip, inner=lambda name: mutate_npy), _DATA),
    "npy": Reader(".npy", _npy, mutate_npy, _DATA),
}


# one case -------------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what the interpreter does beyond reading, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)  # for good: hooks cannot be removed

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and any(letter in str(args[1] or "") for letter in "wax+")
        if writes or event.startswith(_WATCHED):
            self.seen.append(f"{event}{args[:2]}"[:200])


def mutant(reader: Reader, good: list[bytes], name: str, case: int) -> bytes:
    """The file of a case."""
    rng: Random = random.Random(f"{name} {case}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of members that are there twice
        return reader.mutate(rng, rng.choice(good), MARK)


def outcome(name: str, case: int, good: list[bytes], folder: Path, watch: Watch) -> Outcome:
    """Read the file of a case by every function that reads such files, in a folder that holds nothing else."""
    reader, mark = READERS[name], folder / MARK
    path = folder / f"case{reader.suffix}"
    path.write_bytes(mutant(reader, good, name, case))
    start, verdict, detail = time.process_time(), "refused", ""
    for read in reader.read:
        watch.seen.clear()
        watch.on = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
            verdict = "read"
        except VfxError:
            pass
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            verdict, detail = "raw", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        finally:
            watch.on = False
        if mark.exists() or watch.seen:
            verdict, detail = "code", "; ".join(watch.seen) or "the mark was made"
        if verdict in BAD:
            break
    seconds = time.process_time() - start
    path.unlink(missing_ok=True)
    left = [entry.name for entry in folder.iterdir()]
    if seconds > SLOW and verdict in GOOD:
        verdict, detail = "slow", f"{seconds:.1f} s"
    if left and verdict in GOOD:
        verdict, detail = "left over", ", ".join(left)
    return Outcome(name, case, verdict, detail[:400], seconds)


# many cases -----------------------------------------------------------------------------------------------------------


def _work(name: str, good: list[bytes], cases: range, pipe: Connection) -> None:
    """Read cases one after another in this process and send what became of each."""
    torch.set_num_threads(1)
    faulthandler.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # native code writes of damaged files to standard error
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # what a reader leaves lies there
        os.environ["TMPDIR"] = folder
        os.chdir(folder)
        for case in cases:
            pipe.send(outcome(name, case, good, Path(folder), watch))


def measure(name: str, cases: range, good: list[bytes] | None = None) -> Iterator[Outcome]:
    """The outcomes of a reader's cases, each as it is known; a case that kills its process is one, too."""
    good = READERS[name].good() if good is None else good
    _warm(name, good)
    context, following = multiprocessing.get_context("fork"), cases.start
    while following < cases.stop:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(name, good, range(following, cases.stop), sender), daemon=True)
        worker.start()
        sender.close()
        while following < cases.stop:
            try:
                result = receiver.recv() if receiver.poll(LOST) else Outcome(name, following, "slow", f"> {LOST:.0f} s")
            except EOFError:
                worker.join()
                result = Outcome(name, following, "crash", f"exit status {worker.exitcode}")
            yield result
            following += 1
            if result.verdict == "crash" or (result.seconds == 0 and result.verdict == "slow"):
                break
        worker.kill()
        worker.join()
        receiver.close()


def _warm(name: str, good: list[bytes]) -> None:
    """Read the good files once: one function reads each at least, and what is imported late is imported now."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(good):
            path = Path(folder, f"{index}{reader.suffix}")
            path.write_bytes(data)
            refusals = [error for read in reader.read if (error := _refusal(read, path))]
            if len(refusals) == len(reader.read):
                raise refusals[0]


def _refusal(read: Callable[[Path], Any], path: Path) -> VfxError | None:
    try:
        read(path)
    except VfxError as error:
        return error
    return None


def markdown(results: list[Outcome], cases: int) -> str:
    """A table of verdicts by reader, and all cases that were neither read nor refused."""
    verdicts = (*GOOD, *BAD)
    count = collections.Counter((result.reader, result.verdict) for result in results)
    longest = {name: max(r.seconds for r in results if r.reader == name) for name in {r.reader for r in results}}
    lines = [
        f"# {cases} damaged files for every reader",
        "",
        "`python -m benchmarks.fuzz`; what the words mean stands there. Longest: seconds of the processor.",
        "",
        f"| reader | {' | '.join(verdicts)} | longest |",
        f"| --- |{' ---: |' * (len(verdicts) + 1)}",
    ]
    for name in READERS:
        if name in longest:
            counts = " | ".join(str(count[name, verdict]) for verdict in verdicts)
            lines.append(f"| {name} | {counts} | {longest[name]:.1f} |")
    faults = [result for result in results if result.verdict in BAD]
    if faults:
        lines += ["", "| reader | case | verdict | detail |", "| --- | ---: | --- | --- |"]
        lines += [f"| {r.reader} | {r.case} | {r.verdict} | {cell(r.detail)} |" for r in faults[:200]]
    return "\n".join(lines) + "\n"


def main(
    cases: Annotated[int, typer.Option(help="Cases for each reader.")] = 10_000,
    first: Annotated[int, typer.Option(help="Number of the first.")] = 0,
    reader: Annotated[list[str] | None, typer.Option(help="Only these readers, repeatable.")] = None,
    out: Output = RESULTS,
) -> None:
    """Read damaged files; see the module's first lines."""
    console, results = Console(stderr=True), list[Outcome]()
    chosen = [name for name in READERS if not reader or name in reader]
    with Progress(console=console) as progress:
        for name in chosen:
            task = progress.add_task(name, total=cases)
            for result in measure(name, range(first, first + cases)):
                results.append(result)
                progress.advance(task)
                if result.verdict in BAD:
                    console.print(f"{name} {result.case}: {result.verdict}: {result.detail}", markup=False)
    faults = [result for result in results if result.verdict in BAD]
    if cases > 1 and len(chosen) == len(READERS):
        slowest = sorted(results, key=lambda result: -result.seconds)[:20]
        summary = {"cases": cases, "faults": [asdict(r) for r in faults], "slowest": [asdict(r) for r in slowest]}
        write_atomic(out / "fuzz.json", json.dumps(summary, indent=1))
        write_atomic(out / "fuzz.md", markdown(results, cases))
    print(markdown(results, cases))
    if faults or not results:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
