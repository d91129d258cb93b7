"""What is installed: one name, ``vfx``; a user's own ``passes.py`` is theirs, in a checkout and from the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import vfx

ROOT = Path(__file__).parents[1]

USER = """
import torch, vfx, passes
assert passes.MINE == 7, passes
from vfx.passes.align import Align
assert vfx.Align is Align
nets = [torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval() for _ in range(2)]
merged = vfx.merge(nets, torch.randn(2, 4), data=torch.randn(64, 4))
assert merged(torch.randn(3, 4)).shape == (3, 2)
print(vfx.__file__)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a freshly built wheel, as an installer puts them down."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*build, "--wheel-dir", place, ROOT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("vfx-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "installed")
    return place / "installed"


def _run(folder: Path, path: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(folder)])}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_name_is_installed(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"vfx"}
    passes = {path.name for path in (ROOT / "passes").glob("*.py")} | {"__init__.py"}
    assert {path.name for path in (unpacked / "vfx" / "passes").glob("*.py")} == passes
    assert (unpacked / "vfx" / "py.typed").is_file()


def test_a_checkout_beside_the_users_own_passes(tmp_path: Path) -> None:
    (tmp_path / "passes.py").write_text("MINE = 7\n")
    assert _run(tmp_path, ROOT, "-c", USER) == str(ROOT / "vfx" / "__init__.py")


def test_the_wheel_beside_the_users_own_passes(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "passes.py").write_text("MINE = 7\n")
    assert _run(tmp_path, unpacked, "-c", USER) == str(unpacked / "vfx" / "__init__.py")


def test_a_model_from_the_users_own_passes(tmp_path: Path) -> None:
    """The command line imports modules of the working folder, one named ``passes`` like any other."""
    (tmp_path / "passes.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2)\n")
    listed = _run(tmp_path, ROOT, "-m", "vfx", "layers", "-m", "passes:make", "-i", "3")
    assert "linear" in listed.lower()


CORE = """
import sys
from vfx.extras import EXTRAS
for package in sum(EXTRAS.values(), ()):
    sys.modules[package] = None  # as if it were not installed
import torch, vfx
from vfx.errors import MissingExtraError
make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
merged = vfx.merge([make(), make()], torch.randn(2, 4), data=torch.randn(64, 4))
merged.save("merged.safetensors")
small = vfx.prune_structured(merged.module, torch.randn(2, 4), sparsity=0.5, data=torch.randn(64, 4))
small.save("small.pt2")
vfx.save_pretrained(small, "small")
assert vfx.from_pretrained("small", model=make)(torch.randn(3, 4)).shape == (3, 2)
from vfx.models.named import build
tries = {
    "onnx": lambda: merged.save("merged.onnx"),
    "plots": lambda: vfx.draw(vfx.symmetry(make(), torch.randn(2, 4)), "ties.png"),
    "zoo": lambda: build("torchvision:resnet18"),
}
assert set(tries) == set(EXTRAS)
for extra, call in tries.items():
    try:
        call()
    except MissingExtraError as error:
        assert f"pip install 'vfx[{extra}]'" in str(error), error
    else:
        raise AssertionError(extra)
"""


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    """Merging, pruning and files of tensors work without the extras; what needs one names it."""
    _run(tmp_path, ROOT, "-c", CORE)
    assert {path.name for path in tmp_path.iterdir()} == {"merged.safetensors", "small.pt2", "small"}


def test_extras_are_those_that_are_declared() -> None:
    import tomllib

    from vfx.extras import EXTRAS

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, needs in declared["optional-dependencies"].items():
        named = {need.partition(">")[0] for need in needs}
        assert extra == "dev" or named <= set(EXTRAS[extra]), extra
    core = {need.partition(">")[0] for need in declared["dependencies"]}
    assert not core & set().union(*EXTRAS.values())


def test_each_public_name_is_in_the_module_that_a_type_checker_is_told() -> None:
    assert len(vfx.__all__) > 80
    for name in vfx.__all__:
        assert name == "__version__" or getattr(vfx, name) is getattr(import_module(vfx._LAZY[name]), name)
    with pytest.raises(AttributeError, match="no attribute 'merger'"):
        vfx.merger  # noqa: B018
