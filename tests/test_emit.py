"""Files: ONNX Runtime agrees with the module, what is written is read back, and a failure leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import close, edges, images
from micro_models import conv
from test_matching import concatenated, depthwise, grouped, residual, squeeze_excite
from test_merge import dropped
from torch import Tensor, fx, nn
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.interpolate import Interpolate

import vfx.emit.files as files_module
import vfx.emit.onnx as onnx_module
import vfx.files
from vfx.api import Result, compile, merge
from vfx.emit.files import export, load
from vfx.emit.module import difference, graph_module, own_class
from vfx.errors import ArgumentError, CheckpointError, OutputError, VerificationError
from vfx.models import resnet20_bn

X = images(12, 8)
PICTURES = images(8, 32)


def _transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.Flatten(),
        nn.Linear(4 * 256, 3),
    )  # fmt: skip


def _result(name: str) -> Result:
    build: Any
    build, x, options = RESULTS[name]
    if options is None:
        return compile(edges(build, x), x[:2], passes=[Interpolate(), FoldNormalization(batch_norm=True)])
    return merge(edges(build, x), x[:2], progress=False, **options)


def _tiny() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))


RESULTS: dict[str, tuple[Any, Tensor, dict[str, Any] | None]] = {
    "merged residual": (residual, X, {}),
    "merged squeeze_excite": (squeeze_excite, X, {"data": X}),
    "merged dropout": (dropped, X, {}),
    "folded transposed": (_transposed, X, None),
    "folded grouped": (grouped, X, None),
    "tiny": (_tiny, X, {}),
    "pfm residual": (residual, X, {"preserve": 3}),
    "pfm concatenated": (concatenated, X, {"data": X, "normalize": "repair", "preserve": 2}),
    "pfm dropout": (dropped, X, {"preserve": 1, "join": "activation"}),
    "pfm resnet20_bn": (lambda: resnet20_bn(width=0.25), PICTURES, {"preserve": 9}),
}


def _fresh(x: Tensor, batch: int) -> Tensor:
    return torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", RESULTS)
def test_onnx_runtime_equals_the_module_at_two_batch_sizes(name: str, tmp_path: Path) -> None:
    result, path = _result(name), tmp_path / "model.onnx"
    assert export(result, path) == path
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (feed,) = session.get_inputs()
    for batch in (1, 7):
        x = _fresh(RESULTS[name][1], batch)
        (found,) = session.run(None, {feed.name: x.numpy()})
        with torch.no_grad():
            expected = result.module(x).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1.0, np.abs(expected).max()))
    assert load(path).graph.node
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # no external data beside it


@pytest.mark.parametrize("name", ["pfm residual", "pfm dropout", "folded transposed"])
def test_pt2_comes_back_as_the_same_network(name: str, tmp_path: Path) -> None:
    result, path = _result(name), tmp_path / "model.pt2"
    export(result, path)
    back = load(path)
    assert isinstance(back, fx.GraphModule)
    assert not back.training
    own = result.module.state_dict()
    found = back.state_dict()
    read = {key for key in own if not key.endswith("num_batches_tracked")}
    assert read <= set(found)
    assert all(torch.equal(found[key], own[key]) for key in read)
    with torch.no_grad():
        for batch in (1, 7):
            x = _fresh(RESULTS[name][1], batch)
            close(back(x), result.module(x), 1e-6)
    if name == "pfm dropout":
        back.train()
        assert not torch.equal(back(X), back(X))
    again, x = tmp_path / "again.pt2", RESULTS[name][1]
    export(back, again, x[:2])
    with torch.no_grad():
        close(load(again)(x), back.eval()(x), 1e-6)


@pytest.mark.parametrize("name", ["merged residual", "merged squeeze_excite", "merged dropout"])
def test_safetensors_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    result, path = _result(name), tmp_path / "model.safetensors"
    export(result, path)
    state = load(path)
    own = result.module.state_dict()
    assert set(state) == set(own)
    assert all(torch.equal(state[key], own[key]) for key in own)
    fresh = edges(RESULTS[name][0], RESULTS[name][1], seed=9)[0]
    filled = load(path, fresh)
    assert type(filled) is type(fresh)
    with torch.no_grad():
        assert torch.equal(filled(X), result.module(X))
        assert not torch.equal(fresh(X), result.module(X))


def test_an_own_class_result_goes_to_pt2_as_well(tmp_path: Path) -> None:
    result = _result("merged residual")
    export(result, tmp_path / "model.pt2")
    with torch.no_grad():
        close(load(tmp_path / "model.pt2")(X), result.module(X), 1e-6)


def test_a_plain_module_is_exported_with_example_inputs(tmp_path: Path) -> None:
    model = edges(residual, X)[0].train()
    export(model, tmp_path / "model.onnx", X[:1])
    assert model.training  # the user's model keeps its mode
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        np.testing.assert_allclose(found, model.eval()(X).numpy(), rtol=0, atol=1e-4)


# failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, b"an earlier export"])
def test_a_failed_verification_leaves_the_folder_as_it_was(
    old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, path = _result("tiny"), tmp_path / "model.onnx"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(onnx_module, "SINGLE", -1.0)
    with pytest.raises(VerificationError, match=r"ONNX Runtime differs from the module .* nothing was written"):
        export(result, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_an_export_that_differs_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares real numbers: a module that is changed behind the exporter's back fails it."""
    result = _result("tiny")
    compare = onnx_module._compare

    def nudged(module: nn.Module, *args: Any) -> float:
        with torch.no_grad():
            module.get_parameter("3.bias")[0] += 1e-3
        return compare(module, *args)

    monkeypatch.setattr(onnx_module, "_compare", nudged)
    with pytest.raises(VerificationError, match="in output 0 at batch 1"):
        export(result, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_a_full_disk_leaves_the_earlier_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, path = _result("tiny"), tmp_path / f"model{suffix}"
    path.write_bytes(b"an earlier export")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vfx.files.os, "fsync", full)
    with pytest.raises(OutputError, match=rf"model{suffix}' cannot be written: No space left"):
        export(result, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier export"]


def test_unknown_suffixes_and_wrong_formats_are_refused(tmp_path: Path) -> None:
    own, graph = _result("tiny"), _result("pfm dropout")
    with pytest.raises(ArgumentError, match=r"cannot export to .tflite; use .onnx, .safetensors, .pt2"):
        export(own, tmp_path / "model.tflite")
    with pytest.raises(ArgumentError, match=r"export it to .pt2 or .onnx"):
        export(graph, tmp_path / "model.safetensors")
    (tmp_path / "model.tflite").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot read .tflite"):
        load(tmp_path / "model.tflite")


# modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [residual, concatenated, depthwise, grouped, squeeze_excite, dropped])
def test_graphmodule_and_own_class_compute_the_same(build: Any) -> None:
    from vfx.api import trace

    program = trace(edges(build, X), X[:2])
    for edge in range(2):
        graph, own = graph_module(program, edge), own_class(program, edge)
        assert difference(graph, program.select(edge)) < 1e-9
        assert difference(own, program.select(edge)) < 1e-9
        assert difference(own, program.select(1 - edge)) > 1e-3  # negative control
        own_keys = {k for k in own.state_dict() if not k.endswith("num_batches_tracked")}
        assert own_keys <= set(graph.state_dict())
        assert {n for n, _ in own.named_parameters()} == {n for n, _ in graph.named_parameters()}


def test_the_writer_knows_the_formats_that_the_reader_knows() -> None:
    assert set(files_module._WRITERS) <= set(files_module._READERS)
