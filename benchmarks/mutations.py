"""Wrong changes of the code, one at a time: do the tests notice each?

``benchmarks.mutations_list`` holds the changes, among them every fact of the registry of operators emptied in turn. The
files that git knows are copied to a folder of their own; there a change is made, and the tests that it names run up to
the first failure. ``--whole`` runs all tests for what these let pass. In the end the tests that failed run once
more without any change: one that fails there, too, has noticed nothing. Results go to ``benchmarks/results``:
mutations.json and mutations.md, change by change, so that a run that was ended goes on where it was. A change that
nothing notices ends the run with status 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.fashion import RESULTS
from benchmarks.forks import HEAVY, Forks
from benchmarks.mutations_list import MUTATIONS, Mutation
from benchmarks.options import Fresh, Output, Render
from benchmarks.pairs_report import cell
from vfx.files import write_atomic

ROOT = Path(__file__).parents[1]
LIMIT = 1200  # seconds of one run of tests, behind which it counts as failed
NO_END = f"no end in {LIMIT} s"
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
TESTS_FAILED, TESTS_INTERRUPTED = 1, 2  # pytest's status, the latter where a file of tests cannot be read


@dataclass(frozen=True)
class Row:
    """What became of a change: the first ``test`` that failed ("" if none), and the seconds until then.

    ``control``: whether that test passes without the change.
    """

    key: str
    file: str
    breaks: str
    test: str
    seconds: float
    control: bool = False


def key_of(mutation: Mutation) -> str:
    """What tells a change from all others, in whatever words it is described."""
    return hashlib.sha256("\0".join((mutation.file, mutation.old, mutation.new)).encode()).hexdigest()[:12]


class Checkout:
    """A copy of all files that git knows in ``source``."""

    def __init__(self, folder: Path, source: Path = ROOT, modules: Sequence[str] = HEAVY):
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name)
        command = [sys.executable, "-c", "import vfx; print(vfx.__file__)"]
        said = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True).stdout.strip()
        if not Path(said).resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"nothing measured: {said} is imported, which is not the copy in {folder}")
        self.forks = Forks(folder, self.environment, modules)

    def failing(self, tests: Sequence[str], every: bool = False) -> list[str]:
        """The first of some tests that fails, or every one."""
        stop = () if every else ("-x",)
        command = [*stop, "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *tests]
        try:
            status, said = self.forks.run(command, LIMIT)
        except subprocess.TimeoutExpired:
            return [NO_END]
        if status not in (0, TESTS_FAILED, TESTS_INTERRUPTED):
            raise RuntimeError(f"pytest {' '.join(command)} ended with {status}: {said}")
        found = FAILED.findall(said)
        assert bool(found) == bool(status), said
        return found if every else found[:1]

    def noticed(self, mutation: Mutation, whole: bool) -> tuple[str, float]:
        """The first test that fails with a change, and the seconds that it took."""
        path, start = self.folder / mutation.file, time.monotonic()
        right = path.read_text()
        assert right.count(mutation.old) == 1, f"{mutation.file} does not hold {mutation.old!r} once"
        self._write(path, right.replace(mutation.old, mutation.new))
        try:
            found = self.failing(mutation.test_names)
            if whole and not found:
                found = self.failing(["tests"])
        finally:
            self._write(path, right)
        return next(iter(found), ""), time.monotonic() - start

    def _write(self, path: Path, text: str) -> None:
        """The file, and nothing that was compiled from what it was."""
        path.write_text(text)
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def markdown(rows: Sequence[Row]) -> str:
    noticed = sum(row.control for row in rows)
    text = [f"# {noticed} of {len(rows)} wrong changes of the code are noticed", ""]
    text += ["`python -m benchmarks.mutations`; the changes stand in `benchmarks/mutations_list.py`.", ""]
    if len(rows) < len(MUTATIONS):
        text += [f"{len(MUTATIONS) - len(rows)} more of the list are not measured yet.", ""]
    text += ["| file | what it breaks | the first test that fails | s |", "| --- | --- | --- | ---: |"]
    for row in rows:
        test = f"`{cell(row.test.removeprefix('tests/'))}`" if row.control else "**none**"
        text.append(f"| `{row.file}` | {row.breaks} | {test} | {row.seconds:.0f} |")
    return "\n".join(text) + "\n"


def stored(path: Path, mutations: Sequence[Mutation]) -> dict[str, Row]:
    """The rows of an earlier run by their keys, in today's words."""
    held = {row["key"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    words = {key_of(mutation): {"breaks": mutation.breaks} for mutation in mutations}
    return {key: Row(**held[key] | words[key]) for key in words if key in held}


def write(output: Path, rows: dict[str, Row]) -> list[Row]:
    """Both files, in the order of the list."""
    ordered = [rows[key] for key in map(key_of, MUTATIONS) if key in rows]
    write_atomic(output / "mutations.json", json.dumps([asdict(row) for row in ordered], indent=1) + "\n")
    write_atomic(output / "mutations.md", markdown(ordered))
    return ordered


def _controlled(checkout: Checkout, rows: dict[str, Row]) -> None:
    """Run the tests that failed once more without a change; a row whose test fails again has to be measured anew."""
    tests = sorted({row.test for row in rows.values() if not row.control} - {"", NO_END})
    failed = checkout.failing(tests, every=True) if tests else []
    for key, row in list(rows.items()):
        if row.test in failed:
            print(f"fails without any change, too: {rows.pop(key).test}")
        elif row.test:
            rows[key] = replace(row, control=True)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Changes whose file or description holds this text.")] = None,
    whole: Annotated[bool, typer.Option(help="Run all tests for what the named ones let pass.")] = False,
    fresh: Fresh = False,
    render: Render = False,
    output: Output = RESULTS,
) -> None:
    rows = stored(output / "mutations.json", MUTATIONS)
    asked = [m for m in MUTATIONS if not only or any(text in m.file or text in m.breaks for text in only)]
    todo = [m for m in asked if fresh or key_of(m) not in rows or not rows[key_of(m)].test]
    with tempfile.TemporaryDirectory() as folder:
        checkout = None if render else Checkout(Path(folder))
        for mutation in todo if checkout else ():
            try:
                test, seconds = checkout.noticed(mutation, whole)  # type: ignore[union-attr]
            except RuntimeError as error:
                print(f"not measured: {mutation.file}: {mutation.breaks}: {error}", flush=True)
                continue
            print(f"{seconds:5.0f} s  {mutation.file}: {mutation.breaks}: {test or 'NOT NOTICED'}", flush=True)
            rows[key_of(mutation)] = Row(key_of(mutation), mutation.file, mutation.breaks, test, round(seconds, 1))
            write(output, rows)
        if checkout:
            _controlled(checkout, rows)
            checkout.forks.close()
    ordered = write(output, rows)
    print(markdown(ordered).splitlines()[0].removeprefix("# "))
    if not all(key_of(m) in rows and rows[key_of(m)].control for m in asked):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
