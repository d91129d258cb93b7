"""Every Python block of every README runs, on small random networks in the place of the reader's."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import vfx
import vfx.data.catalogue
import vfx.models
from vfx import cli
from vfx.data import digits
from vfx.models import vgg11, vit_tiny

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.glob("**/README.md") if not any(part[0] == "." for part in path.parts[1:]))
NAMES = [str(path.relative_to(ROOT)) for path in PAGES if "```python" in path.read_text()]


def _net(seed: int, build: Callable[..., nn.Module] = vgg11, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build(in_channels=1, **({"width": 1 / 16} | options)).eval()


def _tuned(model: nn.Module, seed: int) -> nn.Module:
    """A copy that has gone on a little way of its own."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return tuned


def _readers_names() -> dict[str, Any]:
    images, classes, test, labels = (tensor[:16] for tensor in digits())
    model_a, model_b = _net(0), _net(1)
    recorders = [vfx.record(model) for model in (model_a, model_b)]

    def train(model: nn.Module) -> None:
        for each in (model_a, model_b):
            each.train()(images)
            each.eval()

    with recorders[1]:
        train(model_b)
    return {
        "vfx": vfx,
        "numpy": numpy,
        "example_inputs": images[:2],
        "loader": [(images, classes)],
        "test": [(test, labels)],
        "test_loader": [(test, labels)],
        "model": model_a,
        "models": [model_a, model_b],
        "model_a": model_a,
        "model_b": model_b,
        "a": model_a,
        "b": model_b,
        "merged": vfx.merge([model_a, model_b], images[:2], match="weight", progress=False),
        "ten_classes": model_a,
        "four_classes": _net(3, num_classes=4),
        "small": _net(4),
        "large": _net(5, width=1 / 8),
        "tuned_models": [_tuned(model_a, 8), _tuned(model_a, 9)],
        "x": images[:2],
        "images_of_a": images[:8],
        "images_of_b": images[8:],
        "vit_a": _net(6, vit_tiny, width=0.25),
        "vit_b": _net(7, vit_tiny, width=0.25),
        "pretrained": model_a,
        "other_pretrained": model_b,
        "tuned": _net(8),
        "loader_a": [(images, classes)],
        "loader_b": [(test, labels)],
        "train": train,
        "recorder_b": recorders[1],
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("demo").mkdir()
    for seed in (0, 1):
        save_file(_net(seed).state_dict(), f"demo/vgg16_w0.25_e15_s{seed}.safetensors")
    few = [tensor[:16] for tensor in digits()]
    monkeypatch.setattr(vfx.data, "digits", lambda size=32: few)
    monkeypatch.setattr(vfx.models, "vgg16", lambda width, in_channels: _net(0))
    names = _readers_names()
    blocks = re.findall(r"```python\n(.*?)```", ROOT.joinpath(name).read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert blocks


WITH_COMMANDS = ["README.md", "vfx/cli/README.md"]
NETWORK = """from vfx.models import vgg11


def make(classes=10):
    return vgg11(width=1 / 16, in_channels=1, num_classes=classes)
"""


def _commands(text: str) -> list[list[str]]:
    """What stands behind ``vfx`` in the console blocks, lines that end in a backslash joined."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(found[1], comments=True) for line in lines if (found := re.match(r"\$ (?:\S*/)?vfx (.*)", line))
    ]


@pytest.mark.parametrize("name", WITH_COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = ROOT.joinpath(name).read_text()
    Path("net.py").write_text(NETWORK)
    for file, seed in (("a.safetensors", 0), ("b.safetensors", 1), ("tuned.safetensors", 4)):
        save_file(_net(seed).state_dict(), file)
    save_file(_net(2, num_classes=4).state_dict(), "c.safetensors")
    save_file(_net(3).state_dict(), "base.safetensors")
    Path("demo").mkdir()
    for seed in (0, 1):
        save_file(_net(seed).state_dict(), f"demo/vgg16_w0.25_e15_s{seed}.safetensors")
    monkeypatch.setitem(
        vfx.models.MODELS, "vgg16", lambda width=1, in_channels=3: vgg11(1 / 16, in_channels=in_channels)
    )
    few = [tensor[:16] for tensor in digits()]
    monkeypatch.setattr(vfx.data.catalogue, "digits", lambda size=32, seed=0: few)
    for index in range(20):
        Path(f"photos/{index % 2}").mkdir(parents=True, exist_ok=True)
        pixels = numpy.random.default_rng(index).integers(0, 256, (36, 40, 3), numpy.uint8)
        Image.fromarray(pixels).save(f"photos/{index % 2}/{index}.png")
    for kind, block in re.findall(r"```(toml|yaml)\n(.*?)```", text, re.DOTALL):
        Path(f"recipe.{kind}").write_text(block)
    commands = _commands(text)
    assert len(commands) >= 4
    for command in commands:
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, (command, result.output, result.exception)


def test_pages_link_to_what_there_is() -> None:
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert len(links) >= 30
    for page, target in links:
        assert target.startswith("http") or page.parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_first_page_is_short() -> None:
    assert len(ROOT.joinpath("README.md").read_text().splitlines()) <= 150
