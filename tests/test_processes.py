"""One call in several processes: the same networks as in one, and one clear error where a process is lost."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vfx
from vfx.emit.files import export
from vfx.models.named import build
from vfx.processes import added, agreed, shared
from vfx.statistics.across import cross_across, moments_across
from vfx.statistics.moments import CrossMoments, Workspace

NETWORK = """
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )
"""
BATCHES = 5  # an odd number: shares differ


def start(arguments: Sequence[str], folder: Path, processes: int = 2, seconds: float = 240) -> list[subprocess.Popen]:
    """Processes as torchrun starts them."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    try:
        said = [one.communicate(timeout=seconds) for one in processes]
    finally:
        for one in processes:
            one.kill()
    return [(one.returncode, *texts) for one, texts in zip(processes, said)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks and images in batches."""
    place = tmp_path_factory.mktemp("processes")
    (place / "net.py").write_text(NETWORK)
    for seed in range(2):
        export(network(place, seed), place / f"{seed}.safetensors")
    generator = torch.Generator().manual_seed(0)
    save_file({"x": torch.randn(BATCHES * 60, 3, 8, 8, generator=generator)}, place / "x.safetensors")
    (place / "data.py").write_text(
        "from safetensors.torch import load_file\n"
        f"loader = list(load_file({str(place / 'x.safetensors')!r})['x'].split(60))\n"
    )
    return place


def network(folder: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(f"{folder / 'net.py'}:make").eval()


def images(folder: Path) -> list[Tensor]:
    return list(load_file(folder / "x.safetensors")["x"].split(60))


MERGE = "merge 0.safetensors 1.safetensors -m net.py:make -i 3x8x8 -d data.py:loader --match activation"


@torch.no_grad()
def far(one: nn.Module, other: nn.Module, folder: Path) -> float:
    """How far two networks' outputs are from each other, in float64, as a share of their size."""
    x = torch.cat(images(folder)).double()
    first, second = (copy.deepcopy(network).double()(x) for network in (one, other))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize(
    "command",
    [
        f"{MERGE} --solve least_squares --normalize none",
        f"{MERGE} --solve none --normalize repair",
        "prune 0.safetensors -m net.py:make -i 3x8x8 -d data.py:loader -s 0.5 --score wanda --solve least_squares",
    ],
    ids=["solved", "normalized", "pruned"],
)
def test_two_processes_give_the_network_of_one(command: str, folder: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "vfx", *command.split(), "-o", "one.safetensors"], cwd=folder, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    found = ended(start(["-m", "vfx", *command.split(), "-o", "two.safetensors"], folder))
    assert [status for status, _, _ in found] == [0, 0], found
    assert "wrote two.safetensors" in found[0][1]
    assert found[1][1] == ""  # one process speaks
    one, two = (vfx.load(folder / f"{name}.safetensors", network(folder, 0)) for name in ("one", "two"))
    assert far(one, two, folder) < 1e-6
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").unlink()


def test_a_share_of_the_data_alone_gives_another_network(folder: Path) -> None:
    """The control: every second batch, as a process would see it whose sums are not added."""
    program = vfx.trace([network(folder, seed) for seed in range(2)], images(folder)[0][:2])
    whole, part = (
        vfx.merge(program, data=data, match="activation", solve="least_squares", normalize=None, progress=False)
        for data in (images(folder), images(folder)[::2])
    )
    assert far(whole.module, part.module, folder) > 1e-4


def test_a_process_that_dies_ends_the_run_with_one_error_and_no_file(folder: Path) -> None:
    (folder / "dying.py").write_text(
        "import os, signal\nfrom data import loader as whole\n\nclass Loader:\n    def __iter__(self):\n"
        "        for index, batch in enumerate(whole):\n            if index == 2 and os.environ['RANK'] == '1':\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n            yield batch\n\nloader = Loader()\n"
    )
    before = sorted(folder.iterdir())
    command = f"{MERGE} --solve least_squares --normalize none".replace("data.py", "dying.py")
    began = time.monotonic()
    (status, _, said), (killed, _, _) = ended(start(["-m", "vfx", *command.split(), "-o", "no.safetensors"], folder))
    assert (status, killed) == (1, -9)
    lines = [line for line in said.splitlines() if "Error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("ProcessError: another process of this run ended")
    assert "Traceback" not in said
    assert time.monotonic() - began < 200
    assert [path for path in sorted(folder.iterdir()) if path not in before and path.name != "__pycache__"] == []


def test_commands_that_share_nothing_are_refused(folder: Path) -> None:
    found = ended(start(["-m", "vfx", "layers", "-m", "net.py:make", "-i", "3x8x8"], folder))
    assert {status for status, _, _ in found} == {1}
    assert all("without torchrun" in said for _, _, said in found)


SUMS = """
import sys
import torch
from vfx.processes import across_processes, added, agreed, shared
from vfx.errors import DataError
from test_processes import moments_of, summary

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
with across_processes():
    batches = torch.load("batches.pt")[: int(sys.argv[1])]
    own = list(shared(batches, lambda batch: [batch]))
    found = summary(moments_of(own))
    assert agreed(rank) == 0
    (total,) = added({"all": [torch.tensor(rank + 1.0)]})["all"]
    assert total == 3
    try:
        list(shared([x + rank for x in batches], lambda batch: [batch]))
        raise SystemExit("different data were not noticed")
    except DataError:
        pass
if rank == 0:
    torch.save(found, "found.pt")
torch.distributed.destroy_process_group()  # left alone, it may abort a process that ends
"""


def moments_of(batches: Sequence[Tensor]) -> dict[str, CrossMoments]:
    """Cross moments of two networks' features, with nothing where there are no batches."""
    found: dict[str, CrossMoments] = {}
    for batch in batches:
        found.setdefault("tap", CrossMoments(2, 3, within=True)).read([batch, batch.exp()], 1, Workspace())
    return found


def summary(parts: dict[str, CrossMoments]) -> list[Tensor]:
    """All that they hold, over all processes; the moments by themselves must be the same."""
    (one,) = cross_across(parts, within=True).values()
    (moments,) = moments_across({name: own.moments for name, own in parts.items()}).values()
    assert all(torch.equal(a.m2, b.m2) for a, b in zip(one.moments, moments))
    return [x for m in one.moments for x in (torch.tensor(m.count), m.mean, m.m2)] + list(one.cross.values())


@pytest.mark.parametrize("batches", [5, 1], ids=["five batches", "a process without any"])
def test_moments_are_those_of_all_data(batches: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [100 + index + torch.randn(4 + index, 3, 2, generator=generator).double() * 0.1 for index in range(5)]
    torch.save([x - 100 for x in data], tmp_path / "batches.pt")
    (tmp_path / "sums.py").write_text(SUMS)
    found = ended(start(["sums.py", str(batches)], tmp_path))
    assert [status for status, _, _ in found] == [0, 0], found
    expected = summary(moments_of([x - 100 for x in data][:batches]))
    for own, wanted in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        np.testing.assert_allclose(own.numpy(), wanted.numpy(), rtol=1e-12)


def test_one_process_alone_keeps_all_as_it_is() -> None:
    x = torch.ones(3)
    assert list(shared([1, 2, 3], lambda _: [x])) == [1, 2, 3]
    assert added({"a": [x]})["a"][0] is x
    assert agreed(5) == 5
