"""Files say where they come from, and the same run gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

import vfx
from vfx import cli
from vfx.emit.files import safetensors_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _said(path: Path) -> dict[str, Any]:
    if path.suffix == ".onnx":
        (entry,) = [one for one in onnx.load(str(path)).metadata_props if one.key == "vfx"]
        return json.loads(entry.value)
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["format"] == "pt"
        return json.loads(file.metadata()["vfx"])


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_results_say_how_they_were_made(suffix: str, tmp_path: Path) -> None:
    result = vfx.merge([_net(0), _net(1)], X[:2], match="weight", normalize=None, progress=False)
    path = vfx.export(result, tmp_path / f"m{suffix}", origin={"note": "mine"})
    said = _said(path)
    assert said["version"] == vfx.__version__
    assert said["passes"] == list(result.report.passes)
    assert said["note"] == "mine"
    vfx.export(_net(0), path, X[:2])
    assert _said(path) == {"version": vfx.__version__}


def test_commands_name_the_call_and_the_digests(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(6, 3)\n")
    digests = []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(nn.Linear(6, 3).state_dict(), tmp_path / f"{seed}.pt")
        digests.append(hashlib.sha256((tmp_path / f"{seed}.pt").read_bytes()).hexdigest())
    out = tmp_path / "m.safetensors"
    line = ["merge", str(tmp_path / "0.pt"), str(tmp_path / "1.pt"), "-m", f"{tmp_path}/net.py:make", "-i", "6"]
    result = CliRunner().invoke(cli.app, [*line, "--match", "none", "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    said = _said(out)
    assert said["edges"] == [{"file": f"{i}.pt", "sha256": digest} for i, digest in enumerate(digests)]
    assert said["command"].split()[0] == "vfx"
    assert said["settings"] is not None


def test_bytes_do_not_depend_on_the_library_s_order() -> None:
    state = _net(0).state_dict()
    written = {safetensors_of(state, {f"key{i}": str(i) for i in range(8)}) for _ in range(8)}
    assert len(written) == 1
    header = int.from_bytes(written.pop()[:8], "little")
    assert header % 8 == 0
