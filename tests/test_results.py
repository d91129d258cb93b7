"""A Result stands where its module stands, and says in a few lines what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vfx


@pytest.fixture(scope="module")
def result() -> vfx.Result:
    torch.manual_seed(0)
    edges = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in range(2)]
    return vfx.merge(edges, torch.randn(4, 3), match="weight", progress=False)


def test_a_result_is_called_moved_and_saved_like_its_module(result: vfx.Result, tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    assert torch.equal(result(x), result.module(x))
    assert result.state_dict().keys() == result.module.state_dict().keys()
    assert result.eval() is result
    path = result.save(tmp_path / "merged.safetensors")
    fresh = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    assert torch.equal(vfx.load(path, fresh)(x), result(x))
    result.to(torch.float64)
    assert result(x.double()).dtype == torch.float64
    result.to(torch.float32)


def test_a_result_prints_its_network_and_its_notes_in_ten_lines_at_most(result: vfx.Result) -> None:
    assert repr(result).splitlines()[0] == "Result(Sequential of 50 parameters)"
    assert 1 <= len(repr(result).splitlines()) <= 10
    pruned = vfx.prune_structured(result.module, torch.randn(4, 3), sparsity=0.5, progress=False)
    assert "of 26 parameters" in repr(pruned)


def test_many_notes_are_counted(result: vfx.Result) -> None:
    class Report:
        outcome = "outcome"
        notes = tuple(f"note {index}" for index in range(20))

    lines = repr(vfx.Result(result.module, result.program, Report())).splitlines()
    assert len(lines) == 10
    assert lines[1] == "  outcome"
    assert lines[-1] == "  and 13 more notes: print(result.report)"


def test_types_are_published_and_the_package_runs_as_a_module() -> None:
    assert Path(vfx.__file__).with_name("py.typed").is_file()
    done = subprocess.run([sys.executable, "-m", "vfx", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "merge" in done.stdout
