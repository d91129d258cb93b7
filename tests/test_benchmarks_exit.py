"""A benchmark that could measure nothing ends with an error that says what is missing, and writes no result."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.fashion import command

# benchmarks that read the trained pairs, with what makes them read nothing else
READERS = {
    "balance": [], "diagnosis": [], "folding": [], "masks": [], "methods": [], "normalization": [], "pairs": [],
    "pruning": ["--net", "vgg16_bn_w025 fashion"], "solving": [], "recovery": ["--network", "vgg16_w025"],
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_missing_checkpoints_end_the_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    line = ["--checkpoints", folder, "--data", folder, "--output", folder, *READERS[name]]
    monkeypatch.setattr("sys.argv", [name, *line])
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "ProcessPoolExecutor"):  # a thread is there at once
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    with pytest.raises(SystemExit, match=r"nothing measured: no (checkpoint|Fashion-MNIST file)"):
        command(module.main)
    assert not list(tmp_path.glob("*.md"))


def test_a_command_that_measures_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr("sys.argv", ["name"])
    with pytest.raises(SystemExit) as ended:
        command(lambda: None)
    assert not ended.value.code
