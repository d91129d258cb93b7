"""A small sample of ``make bench``: every part gives its rows, and a comparison says what moved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import bench


def test_calls_and_latency_are_measured_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["calls", "latency"]
    bench.main(parts, None, rounds=1, threads=1, compiled=False, size="small", output=tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["name"] for row in found["calls"]} >= {"capture", "statistics", "reconstruction", "export"}
    assert all(row["processor"] > 0 for row in found["calls"])
    shown = {(row["network"], row["form"], row["batch"]): row for row in found["latency"]}
    assert len(shown) == 5 * 2 * 2  # networks, forms and batches
    assert all(row["ratio"] == 1 for (name, _, _), row in shown.items() if name.endswith(" edge"))
    assert shown["vgg16 ensemble", "eager", 64]["ratio"] > 1.2
    assert shown["vgg16 ensemble", "eager", 64]["flops"] == 2
    text = (tmp_path / "bench.md").read_text()
    assert text in capsys.readouterr().out
    assert "vgg16 PFM 8" in text
    assert "torch" in text

    assert bench.moved(found, found) == []
    slower = copy.deepcopy(found)
    slower["calls"][0]["processor"] *= 2
    slower["latency"][-1]["ratio"] *= 1.05  # less than a tenth
    ((name, _, _, ratio),) = bench.moved(found, slower)
    assert (name, ratio) == ("capture, processor s", "2.00×")
