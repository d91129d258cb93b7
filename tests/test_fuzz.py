"""Damaged files: a sample of the benchmark's for every reader, and faults of each kind that it must notice."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import BAD, GOOD, READERS, Outcome, markdown, measure, mutant

CASES = 40


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str) -> None:
    results = list(measure(name, range(CASES)))
    assert [result.case for result in results] == list(range(CASES))
    assert [result for result in results if result.verdict in BAD] == []
    assert sum(result.verdict == "refused" for result in results) > CASES / 10


def test_a_case_is_the_same_file_each_time() -> None:
    reader = READERS["npz"]
    good = reader.good()
    first, again, other = (mutant(reader, good, "npz", case) for case in (3, 3, 4))
    assert first == again
    assert first != other


def _raw(path: Path) -> Any:
    raise KeyError(path)


def _unpickles(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _leaves(path: Path) -> Any:
    os.close(os.open(path.with_name("draft"), os.O_CREAT))


def _writes(path: Path) -> Any:
    path.with_name("draft").write_bytes(b"")


def _spins(path: Path) -> Any:
    start = time.process_time()
    while time.process_time() < start + 2 * fuzz.SLOW:
        pass


def _dies(path: Path) -> Any:
    os._exit(7)


def _hangs(path: Path) -> Any:
    time.sleep(100)


@pytest.mark.parametrize(
    ("read", "verdict"),
    [
        (_raw, "raw"), (_unpickles, "code"), (_leaves, "left over"), (_writes, "code"), (_spins, "slow"),
        (_dies, "crash"), (_hangs, "slow"),
    ],
)  # fmt: skip
def test_faults_of_every_kind_are_noticed(
    read: Callable[[Path], Any], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SLOW", 0.1)
    monkeypatch.setattr(fuzz, "LOST", 2.0)

    def hostile(rng: Any, data: bytes, mark: str) -> bytes:
        return b"cos\nmkdir\n(V" + mark.encode() + b"\ntR."

    good = READERS["npy"].good()
    monkeypatch.setitem(READERS, "npy", replace(READERS["npy"], mutate=hostile, read=(read,)))
    monkeypatch.setattr(fuzz, "_warm", lambda name, good: None)
    results = list(measure("npy", range(2), good))
    assert {result.verdict for result in results} == {verdict}
    table = markdown(results, 2)
    assert f"| npy | 1 | {verdict} |" in table


def test_the_table_counts_every_verdict() -> None:
    results = [Outcome("npy", 0, "read", seconds=0.5), Outcome("npy", 1, "refused"), Outcome("npy", 2, "raw", "a|b")]
    assert "| npy | 1 | 1 | 1 | 0 | 0 | 0 | 0 | 0.5 |" in markdown(results, 3)
    assert "a\\|b" in markdown(results, 3)
    assert set(GOOD).isdisjoint(BAD)
