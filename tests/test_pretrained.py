"""Directories give the user's class back with its new widths, and refuse another network by the name of its layer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import close, images, network
from torch import nn

import vfx
from vfx.errors import ArchitectureError, ArgumentError, CheckpointError, VerificationError
from vfx.models import resnet20_bn, vgg11_bn

X = images(8, 32, 1)


class Depthwise(nn.Module):
    """Groups whose number changes, and a norm without running statistics."""

    def __init__(self, width: int = 8, swapped: bool = False):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3, groups=width)
        self.norm, self.c = nn.GroupNorm(1, width), nn.Linear(width, 5)
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = torch.tanh if self.swapped else torch.relu
        return self.c(act(self.norm(self.b(act(self.a(x))))).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: vgg11_bn(width=0.125, in_channels=1),
    "resnet": lambda: resnet20_bn(width=0.25, in_channels=1),
    "depthwise": Depthwise,
}


@pytest.mark.parametrize("name", NETS)
def test_a_smaller_network_is_the_users_class_again(name: str, tmp_path: Path) -> None:
    build = NETS[name]
    result = vfx.prune_structured(network(build, X), X[:2], sparsity=0.5, normalize=None, progress=False)
    vfx.save_pretrained(result, tmp_path / "small")
    again = vfx.from_pretrained(tmp_path / "small", model=build)
    assert type(again) is type(build())
    assert not again.training
    with torch.no_grad():
        close(again(X), result(X), 1e-6)
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert count(again) == count(result.module) < 0.6 * count(build())
    layers = [m for m in again.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(m.weight.shape[0] == getattr(m, "out_channels", getattr(m, "out_features", None)) for m in layers)
    assert vfx.prune_structured(again, X[:2], sparsity=0.5, normalize=None, progress=False)  # it is a network as any


def test_masks_and_merges_come_back(tmp_path: Path) -> None:
    build = NETS["vgg"]
    net = network(build, X)
    pruned = vfx.prune(net, X[:2], sparsity=0.5, masks="parametrize", normalize=None, progress=False)
    vfx.save_pretrained(pruned, tmp_path / "masked")
    again = vfx.from_pretrained(tmp_path / "masked", model=net)
    with torch.no_grad():
        close(again(X), pruned(X), 1e-6)
    assert net(X).shape == again(X).shape
    kept = vfx.merge([net, network(build, X, 1)], X[:2], match="weight", normalize=None, preserve=3, progress=False)
    vfx.save_pretrained(kept, tmp_path / "branches")
    assert json.loads((tmp_path / "branches" / "config.json").read_text())["holds"] == "program"
    with torch.no_grad():
        close(vfx.from_pretrained(tmp_path / "branches")(X), kept(X), 1e-5)


def test_constructors_by_name_need_not_be_given(tmp_path: Path) -> None:
    name = "vfx:vgg11_bn?width=0.125&in_channels=1"
    result = vfx.prune_structured(network(NETS["vgg"], X), X[:2], sparsity=0.5, normalize=None, progress=False)
    vfx.save_pretrained(result, tmp_path / "small", model=name)
    code = (
        "import sys, vfx; net = vfx.from_pretrained(sys.argv[1]); "
        "print(type(net).__name__, sum(p.numel() for p in net.parameters()))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "small")], capture_output=True, text=True)
    assert found.stdout.split() == ["VGG", str(sum(p.numel() for p in result.module.parameters()))], found.stderr
    config = tmp_path / "small" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace(name, "vfx:vgg11_bn?width=0.125&norm=/etc/passwd"))
    with pytest.raises(ArgumentError, match="give model="):
        vfx.from_pretrained(tmp_path / "small")
    config.write_text(whole.replace(name, "os:getcwd"))
    with pytest.raises(ArgumentError, match=r"VGG; give model=.*'os:getcwd'"):  # a file names no code to run
        vfx.from_pretrained(tmp_path / "small")


def test_other_networks_are_refused_by_layer(tmp_path: Path) -> None:
    result = vfx.prune_structured(network(Depthwise, X), X[:2], sparsity=0.5, normalize=None, progress=False)
    folder = vfx.save_pretrained(result, tmp_path / "small")
    assert type(vfx.from_pretrained(folder, model=Depthwise)) is Depthwise  # the control
    with pytest.raises(ArchitectureError, match=r"'a.weight' has shape \(6, 1, 3, 3\) in the model and \(4, 1, 3, 3\)"):
        vfx.from_pretrained(folder, model=lambda: Depthwise(6))
    with pytest.raises(
        ArchitectureError, match=r"'a.weight' has shape \(4, 1, 3, 3\) in the model.*came from \(8, 1, 3, 3\)"
    ):
        vfx.from_pretrained(folder, model=lambda: Depthwise(4))
    with pytest.raises(VerificationError, match="does not give the outputs"):
        vfx.from_pretrained(folder, model=lambda: Depthwise(swapped=True))
    with pytest.raises(ArchitectureError, match="a has no size 'out_channels'"):
        vfx.from_pretrained(folder, model=lambda: nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="gave int"):
        vfx.from_pretrained(folder, model=lambda: 3)


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    result = vfx.prune_structured(network(Depthwise, X), X[:2], sparsity=0.5, normalize=None, progress=False)
    folder = vfx.save_pretrained(result, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"no directory that save_pretrained wrote"):
        vfx.from_pretrained(tmp_path, model=Depthwise)
    for name in ("config.json", "model.safetensors", "check.safetensors"):
        broken = tmp_path / f"broken {name}"
        shutil.copytree(folder, broken)
        (broken / name).write_bytes(b"{")
        with pytest.raises(CheckpointError):
            vfx.from_pretrained(broken, model=Depthwise)
    with pytest.raises(ArgumentError, match="must be a Result"):
        vfx.save_pretrained(Depthwise(), tmp_path / "x")
