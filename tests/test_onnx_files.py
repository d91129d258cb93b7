"""ONNX on the disk: weights beside the graph above protobuf's limit, never half new; types that a runtime has."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import vfx.emit.onnx as onnx_module
import vfx.emit.onnx_files as onnx_files
from vfx.emit.files import export, load
from vfx.errors import ArgumentError, CheckpointError, OutputError, VerificationError

X = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)).eval()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is above the limit."""
    monkeypatch.setattr(onnx_module, "IN_ONE_FILE", 100)


def run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return output


def computes(path: Path, model: nn.Module) -> bool:
    with torch.no_grad():
        return bool(np.abs(run(path) - model(X).numpy()).max() < 1e-5)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.usefixtures("large")
def test_weights_above_the_limit_lie_beside_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(network(0), path, X[:2])
    first = names(tmp_path)
    assert len(first) == 2
    assert first[0] == "model.onnx"
    assert first[1].startswith("model.onnx.")
    assert first[1].endswith(".data")
    assert computes(path, network(0))
    assert not computes(path, network(1))  # negative control
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in load(path).graph.initializer}
    np.testing.assert_array_equal(held["0.weight"], network(0)[0].weight.detach().numpy())
    export(network(0), path, X[:2])
    assert names(tmp_path) == first  # the same network, the same name


@pytest.mark.usefixtures("large")
def test_what_an_earlier_network_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "model.onnx", tmp_path / "model.onnx.keep.data"
    other.write_bytes(b"not ours")
    export(network(0), path, X[:2])
    path.chmod(0o640)
    first = set(names(tmp_path))
    export(network(1), path, X[:2])
    second = set(names(tmp_path))
    assert len(second) == 3
    assert first & second == {"model.onnx", other.name}
    assert computes(path, network(1))
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir() if one != other} == {0o640}
    monkeypatch.setattr(onnx_module, "IN_ONE_FILE", 2**30)
    export(network(2), path, X[:2])
    assert names(tmp_path) == ["model.onnx", other.name]
    assert computes(path, network(2))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("failure", ["difference", "first move", "second move"])
def test_a_failure_leaves_the_earlier_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    path = tmp_path / "model.onnx"
    export(network(0), path, X[:2])
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    if failure == "difference":
        monkeypatch.setattr(onnx_module, "SINGLE", -1.0)
    else:
        move, suffix = onnx_files.move_into_place, ".data" if failure == "first move" else ".onnx"

        def full(draft: Path, place: Path, like: Path | None = None) -> None:
            if place.suffix == suffix:
                raise OSError(28, "No space left on device")
            move(draft, place, like)

        monkeypatch.setattr(onnx_files, "move_into_place", full)
    with pytest.raises(VerificationError if failure == "difference" else OutputError):
        export(network(1), path, X[:2])
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before
    assert computes(path, network(0))


WRITER = """
import shutil, sys
from pathlib import Path
from vfx.emit.onnx_files import name_weights, place_pair
from vfx.files import drafts_beside
path, drafts = Path(sys.argv[1]), [Path(one) for one in sys.argv[2:]]
print("ready", flush=True)
while True:
    for draft in drafts:
        with drafts_beside(path) as folder:
            for name in ("graph.onnx", "graph.onnx.data"):
                shutil.copy(draft / name, folder / name)
            graph, weights = folder / "graph.onnx", folder / "graph.onnx.data"
            place_pair(graph, name_weights(graph, weights, path), path)
"""


def test_a_killed_writer_leaves_one_of_the_networks(tmp_path: Path) -> None:
    path, drafts = tmp_path / "out" / "model.onnx", []
    path.parent.mkdir()
    export(network(0), path, X[:2])
    for seed in (0, 1):
        drafts.append(tmp_path / str(seed))
        drafts[-1].mkdir()
        program = torch.onnx.export(network(seed), (X,), dynamo=True, verbose=False)
        program.save(str(drafts[-1] / "graph.onnx"), external_data=True)
    for moment in (0.2, 0.33, 0.47):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path, *drafts], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert computes(path, network(0)) or computes(path, network(1))
    export(network(2), path, X[:2])
    assert names(path.parent) == ["model.onnx"]  # drafts, and weights that were never used, are gone


@pytest.mark.usefixtures("large")
def test_a_link_would_part_graph_and_weights(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "model.onnx").symlink_to(tmp_path / "real" / "model.onnx")
    with pytest.raises(OutputError, match="is a link, and the weights of so large a network lie beside"):
        export(network(0), tmp_path / "model.onnx", X[:2])
    assert names(tmp_path / "real") == []


@pytest.mark.usefixtures("large")
def test_a_graph_without_its_weights_is_refused(tmp_path: Path) -> None:
    export(network(0), tmp_path / "model.onnx", X[:2])
    (weights,) = (one for one in tmp_path.iterdir() if one.suffix == ".data")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model.onnx is not a valid ONNX model"):
        load(tmp_path / "model.onnx")
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"model.onnx is not a valid ONNX model.*{weights.name}"):
        load(tmp_path / "model.onnx")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("sizes", [(1 << 40,), (7, 7, 7), (-1,)])
def test_weights_that_do_not_fill_their_shapes_are_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    path = tmp_path / "model.onnx"
    export(network(0), path, X[:2])
    load(path)
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.dims[:] = sizes
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=rf"bytes for '{tensor.name}', which do not fill its shape"):
        load(path)


# types ----------------------------------------------------------------------------------------------------------------


class Comparisons(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x > 0, x.argmax(-1), (2 * x).round().to(torch.int32)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (network(0).half(), X[:2].half()),
        (network(0).double(), X[:2].double()),
        (nn.Sequential(nn.Conv1d(20, 4, 1), nn.BatchNorm1d(4), nn.Flatten()).half().eval(), X[:2, :, None].half()),
        (Comparisons(), X[:2]),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.arange(6).reshape(2, 3)),
        *((Counts(), torch.arange(6).reshape(2, 3).to(t)) for t in (torch.int64, torch.int32, torch.uint8)),
    ],
    ids=["half", "double", "half conv", "bool and int", "indices", "int64", "int32", "uint8"],
)
def test_types_that_the_runtime_has_are_exported(tmp_path: Path, model: nn.Module, x: Tensor) -> None:
    path = tmp_path / "model.onnx"
    export(model, path, x)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    expected = model(x)
    for want, got in zip(
        [expected] if isinstance(expected, Tensor) else expected,
        session.run(None, {session.get_inputs()[0].name: x.numpy()}),
        strict=True,
    ):
        assert torch.from_numpy(got).dtype == want.dtype
        assert torch.allclose(
            torch.from_numpy(got).double(), want.double(), atol=2e-3 if want.dtype.itemsize == 2 else 1e-5
        )


@pytest.mark.parametrize(
    ("model", "x", "name"),
    [
        (network(0).bfloat16(), X[:2].bfloat16(), "bfloat16"),
        (nn.Conv1d(20, 4, 1).double(), X[:2, :, None].double(), "float64"),
    ],
)
def test_types_that_the_runtime_lacks_are_named(tmp_path: Path, model: nn.Module, x: Tensor, name: str) -> None:
    with pytest.raises(VerificationError, match=rf"cannot run \w+ in {name}, so nothing was written: .*float32"):
        export(model, tmp_path / "model.onnx", x)
    assert names(tmp_path) == []
    export(model, tmp_path / "model.pt2", x)


def test_half_precision_is_compared_in_its_roundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a tenth is noticed."""
    compare, model = onnx_module._compare, network(0).half()

    def changed(module: nn.Module, *arguments: object) -> float:
        module[2].bias.data += 0.1
        return compare(module, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_module, "_compare", changed)
    with pytest.raises(VerificationError, match="in output 0 at batch 1"):
        export(model, tmp_path / "model.onnx", X[:2].half())


def test_a_network_that_takes_positive_inputs_only_is_compared_on_the_example(tmp_path: Path) -> None:
    """Normal inputs give NaN, which proves nothing; an error of a tenth is noticed on the example's rows."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt() + self.shift

    model, x = Root(), torch.rand(2, 3) + 0.1
    export(model, tmp_path / "root.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "root.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(outputs), x.sqrt())


def test_what_torch_cannot_export_is_refused(tmp_path: Path) -> None:
    class Ordered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x.unsqueeze(-1) @ x.unsqueeze(-2) + torch.eye(20))[1]

    with pytest.raises(ArgumentError, match=r"this network \(float32\) as ONNX in opset 20: .*; use another opset or"):
        export(Ordered(), tmp_path / "model.onnx", X[:2])
    assert names(tmp_path) == []
