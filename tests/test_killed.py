"""A killed command leaves each file as it was or whole (``benchmarks.killed`` measures more moments)."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks.killed import COMMANDS, Row, X, judged, kill, line, network
from vfx.emit.files import export
from vfx.files import write_atomic

FILES = COMMANDS["export"][2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of two networks."""
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"network{seed}")
        for name in FILES:
            export(network(seed), folder / name, X)
        made.append(folder)
    return made[0], made[1]


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_killed_export_leaves_old_and_whole_new_files(
    folders: tuple[Path, Path], tmp_path: Path, pause: float
) -> None:
    old, new = folders
    out = shutil.copytree(old, tmp_path / "out")
    torch.save(network(1).state_dict(), tmp_path / "edge.pt")

    def wait(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"wrote")  # the first file; the others are being made
        time.sleep(pause)

    kill(line("export", [tmp_path / "edge.pt"], out), tmp_path, wait)
    states = [judged(out / name, old / name, new / name) for name in FILES]
    assert states[0] == "new"
    assert states[1:] in (["old", "old"], ["new", "old"], ["new", "new"])
    write_atomic(out / "next.bin", b"")
    assert sorted(one.name for one in out.iterdir()) == sorted([*FILES, "next.bin"])


def test_a_broken_file_is_noticed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = folders
    for name in FILES:
        whole = (new / name).read_bytes()
        assert judged(new / name, old / name, new / name) == "new"
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert judged(tmp_path / name, old / name, new / name) == "broken"
        assert judged(tmp_path / "gone", old / name, new / name) == "broken"
    assert Row("export", 1, {"m.onnx": {"old": 1, "broken": 2}}, stayed=1).broken == 3
