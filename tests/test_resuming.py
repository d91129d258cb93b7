"""A killed run goes on behind its last layer and gives the same network; the checkpoint of another run is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vfx
from vfx.checkpointing.journal import Journal, journaled, section
from vfx.checkpointing.resuming import digest_of
from vfx.emit.tensors import read_metadata
from vfx.errors import CheckpointError

X = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = torch.randn(40, 5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Killed(Exception):
    pass


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval()


class Attention(nn.Module):
    """Self-attention of two heads, whose queries are turned when they lost channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(9, 12) for _ in range(3))
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(-1, 5, 2, 6).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def merged(**options: Any) -> vfx.Result:
    return vfx.merge([network(0), network(1)], X, data=X.split(16), progress=False, **options)


def pruned(**options: Any) -> vfx.Result:
    options = {"sparsity": 0.5, "data": X.split(16)} | options
    return vfx.prune(network(0), X, progress=False, **options)


def narrowed(**options: Any) -> vfx.Result:
    return vfx.prune_structured(network(0), X, sparsity=0.5, data=X.split(16), progress=False, **options)


def heads(**options: Any) -> vfx.Result:
    torch.manual_seed(0)
    model = Attention().double().eval()
    return vfx.prune_structured(
        model, ROWS[:2], sparsity=0.34, data=ROWS.split(8), solve="least_squares", score="magnitude", progress=False,
        **options,
    )  # fmt: skip


CALLS: dict[str, tuple[Callable[..., vfx.Result], dict[str, Any]]] = {
    "least squares": (merged, {"solve": "least_squares"}),
    "chosen": (merged, {"match": None}),
    "normalized": (merged, {"normalize": "repair"}),
    "reset": (pruned, {"score": "magnitude", "normalize": "reset"}),
    "wanda": (pruned, {"score": "wanda", "solve": "least_squares"}),
    "wanda, layer by layer": (pruned, {"score": vfx.Wanda(propagation="pruned"), "solve": None, "normalize": None}),
    "alps in two steps": (pruned, {"score": "alps", "steps": 2, "solve": "least_squares"}),
    "channels": (narrowed, {"solve": "least_squares"}),
    "heads": (heads, {}),
}


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> list[str]:
    """Let the ``number``-th file of a checkpoint be the last; the names of those that are written."""
    write, names = Journal.write, list[str]()

    def counted(self: Journal, name: str, *rest: Any) -> None:
        if len(names) == number:
            raise Killed
        write(self, name, *rest)
        names.append(name)

    monkeypatch.setattr(Journal, "write", counted)
    return names


def assert_equal(one: vfx.Result, another: vfx.Result) -> None:
    first, second = one.state_dict(), another.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", CALLS)
def test_a_run_goes_on_behind_its_last_layer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, options = CALLS[name]
    plain = call(**options)
    with monkeypatch.context() as whole:
        files = killed_at(whole, None)
        assert_equal(plain, call(**options, checkpoint=tmp_path / "whole"))
    assert len(files) > 1
    for number in {0, len(files) // 2, len(files) - 1}:
        folder = tmp_path / str(number)
        with monkeypatch.context() as first:
            killed_at(first, number)
            with pytest.raises(Killed):
                call(**options, checkpoint=folder)
        with monkeypatch.context() as second:
            written = killed_at(second, None)
            assert_equal(plain, call(**options, checkpoint=folder))
        assert written == files[number:]  # nothing that was there is made again


def test_queries_are_turned(tmp_path: Path) -> None:
    """The case of heads above holds a stage that changes values that wait."""
    heads(checkpoint=tmp_path / "run")
    assert any("turn" in load_file(path) for path in (tmp_path / "run").glob("*.safetensors"))


def test_a_wrong_layer_in_a_checkpoint_shows(tmp_path: Path) -> None:
    """Control: what is read is what counts."""
    options = {"solve": "least_squares", "checkpoint": tmp_path / "run"}
    plain = merged(**options)
    path = sorted((tmp_path / "run").glob("*.safetensors"))[-1]
    tensors, head = load_file(path), read_metadata(path)
    save_file({name: x + 1e-3 for name, x in tensors.items()}, path, head)
    differences = zip(plain.state_dict().values(), merged(**options).state_dict().values())
    assert max(float((a - b).abs().max()) for a, b in differences if a.is_floating_point()) > 1e-6


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": 0.6}, "sparsity="),
        ({"data": X.flip(0).split(16)}, "data"),
        ({"data": X.split(12)}, "data"),
        ({"seed": 1, "scope": "layer"}, "scope=, seed="),
        ({"score": vfx.SparseGPT(block=64)}, "score="),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    options = {"score": vfx.SparseGPT(), "solve": None, "normalize": None, "checkpoint": tmp_path / "run"}
    pruned(**options)
    with pytest.raises(CheckpointError, match=f"of a run with other {named};"):
        pruned(**options | changes)


def test_another_network_call_or_folder_is_refused(tmp_path: Path) -> None:
    narrowed(solve=None, checkpoint=tmp_path / "run")
    with pytest.raises(CheckpointError, match="of another call"):
        pruned(solve=None, checkpoint=tmp_path / "run")
    with pytest.raises(CheckpointError, match="other networks;"):
        vfx.prune_structured(
            network(1), X, sparsity=0.5, data=X.split(16), progress=False, solve=None, checkpoint=tmp_path / "run"
        )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    with pytest.raises(CheckpointError, match="holds something else"):
        narrowed(checkpoint=tmp_path / "notes")
    (tmp_path / "notes" / "run.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no head of a checkpoint"):
        narrowed(checkpoint=tmp_path / "notes")


def test_files_of_another_pass_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    def passed(titles: str) -> None:
        with journaled(tmp_path / "run", {}):
            section(titles, ["layer"]).once(0, lambda: {"x": torch.ones(2)}, {})

    passed("one")
    with pytest.raises(CheckpointError, match="another pass"):
        passed("other")
    path = tmp_path / "run" / "0001-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        passed("one")
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no part of a checkpoint"):
        passed("one")


@pytest.mark.parametrize("strides", [[0, 0], [1], [1 << 40, 1], "12"])
def test_strides_that_fill_no_memory_are_refused(tmp_path: Path, strides: Any) -> None:
    with journaled(tmp_path / "run", {}):
        pass_of = section("one", ["layer"])
        pass_of.write(0, {"x": torch.ones(2, 3)})
        path = tmp_path / "run" / "0001-00000.safetensors"
        head = json.dumps({"key": pass_of.key, "strides": {"x": strides}, "values": None})
        save_file({"x": torch.ones(2, 3)}, path, {"vfx.checkpoint": head})
        with pytest.raises(CheckpointError, match="no part of a checkpoint"):
            pass_of.entry(0, {})


def test_tensors_come_back_in_their_layout(tmp_path: Path) -> None:
    given = {
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "mask": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "wide": torch.ones(1, 3).expand(2, 3),
        "none": torch.empty(0, 3),
    }
    with journaled(tmp_path / "run", {}):
        pass_of = section("one", ["layer"])
        pass_of.write(0, given, [1.5, "text"])
        entry = pass_of.entry(0, {})
    assert entry is not None
    assert entry.values == [1.5, "text"]
    for name, x in given.items():
        assert torch.equal(entry.tensors[name], x)
        assert entry.tensors[name].dtype == x.dtype
    assert entry.tensors["turned"].stride() == (1, 3)
    assert entry.tensors["last"].stride() == given["last"].stride()


def test_equal_inputs_have_one_digest() -> None:
    assert digest_of(network(0)) == digest_of(network(0)) != digest_of(network(1))
    assert digest_of([X, {"a": 1}]) == digest_of([X.clone(), {"a": 1}]) != digest_of([X, {"a": 1.0}])
    assert digest_of(X) != digest_of(X.float())
    assert digest_of(vfx.SparseGPT()) != digest_of(vfx.SparseGPT(damping=0.02))
    looped: dict[str, Any] = {}
    looped["self"] = looped
    assert digest_of(looped) == digest_of(looped)


RUN = """
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vfx
from tests.test_resuming import X, network

result = vfx.prune(network(0), X, sparsity=0.5, data=X.split(16), progress=False, checkpoint=sys.argv[1])
save_file(result.state_dict(), sys.argv[2])
"""


def test_a_process_that_is_killed_goes_on(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(tmp_path / "pruned.safetensors")]
    process = subprocess.Popen(line, env=environment)
    while len(list((tmp_path / "run").glob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "pruned.safetensors").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = pruned(checkpoint=tmp_path / "run")
        plain: dict[str, Tensor] = pruned().state_dict()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, plain[name]) for name, x in again.state_dict().items())
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.safetensors")}
    assert before.items() <= after.items()
    assert len(after) > len(before)
