"""Options of vfx.export: opset, names, float16, int8 on calibration data, compiled code; each refused where it errs."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import edges, images
from micro_models import conv, net
from torch import Tensor, nn

import vfx.emit.aoti as aoti
import vfx.emit.onnx_precision as onnx_precision
from vfx.api import merge
from vfx.cli.app import app
from vfx.emit.files import export, load
from vfx.emit.provenance import KEY
from vfx.errors import ArgumentError, CheckpointError, VerificationError
from vfx.options import ExportOptions, keywords

X = images(32, 8)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()  # fmt: skip


def attention() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 6, 8))  # type: ignore

    torch.manual_seed(0)
    return net(forward, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)).eval()


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return output


def facts(path: Path) -> dict[str, object]:
    return json.loads({one.key: one.value for one in load(path).metadata_props}[KEY])


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_the_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    path = export(network(), tmp_path / "m.onnx", X[:2], opset=opset)
    assert [one.version for one in load(path).opset_import if one.domain == ""] == [opset]
    np.testing.assert_allclose(run(path, X), network()(X).detach().numpy(), atol=1e-5)


def test_an_opset_that_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    for opset in (17, 400):
        with pytest.raises(ArgumentError, match="opset"):
            export(network(), tmp_path / "m.onnx", X[:2], opset=opset)
    assert not list(tmp_path.iterdir())


def test_attention_is_one_node_where_the_opset_has_it(tmp_path: Path) -> None:
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    merged = merge(edges(attention, x), x, progress=False)
    with torch.no_grad():
        expected = merged.module(x).numpy()
    for opset, fused in ((20, 0), (23, 1)):
        path = merged.save(tmp_path / f"{opset}.onnx", opset=opset)
        count = Counter(node.op_type for node in load(path).graph.node)
        assert (count["Attention"], count["Softmax"]) == (fused, 1 - fused)
        np.testing.assert_allclose(run(path, x), expected, atol=1e-5)


def test_inputs_outputs_and_axes_have_the_names_asked_for(tmp_path: Path) -> None:
    plain = load(export(network(), tmp_path / "p.onnx", X[:2])).graph
    assert [one.dim_param for one in plain.input[0].type.tensor_type.shape.dim] == ["batch", "", "", ""]
    named = {"input_names": ["picture"], "output_names": ["scores"], "axis_names": ["pictures"]}
    graph = load(export(network(), tmp_path / "m.onnx", X[:2], **named)).graph
    assert ([one.name for one in graph.input], [one.name for one in graph.output]) == (["picture"], ["scores"])
    for one in (graph.input[0], graph.output[0]):
        assert one.type.tensor_type.shape.dim[0].dim_param == "pictures"
    assert "s77" not in str(graph)


def test_sizes_left_open_are_named_in_their_order(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU()).eval(), torch.randn(2, 2, 9)
    shapes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    path = export(model, tmp_path / "m.onnx", x, dynamic_shapes=shapes, axis_names=["sounds", "length"])
    graph = load(path).graph
    assert [one.dim_param for one in graph.input[0].type.tensor_type.shape.dim] == ["sounds", "", "length"]
    assert [one.dim_param for one in graph.output[0].type.tensor_type.shape.dim] == ["sounds", "", "length - 2"]


@pytest.mark.parametrize(
    "names",
    [
        {"input_names": ["a", "b"]}, {"output_names": [""]}, {"axis_names": ["a", "b"]},
        {"input_names": ["a"], "output_names": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(names: dict[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="name"):
        export(network(), tmp_path / "m.onnx", X[:2], **names)
    assert not list(tmp_path.iterdir())


def test_float16_halves_the_weights_and_keeps_the_types_outside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 4)).eval()
    x = torch.randn(7, 20)
    path, whole = tmp_path / "half.onnx", tmp_path / "whole.onnx"
    export(model, path, x[:2], precision="float16")
    export(model, whole, x[:2])
    assert path.stat().st_size < 0.6 * whole.stat().st_size
    graph = load(path).graph
    floats = [one for one in graph.initializer if onnx.numpy_helper.to_array(one).dtype.kind == "f"]
    assert {one.data_type for one in floats} == {onnx.TensorProto.FLOAT16}
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    gap = np.abs(run(path, x) - model(x).detach().numpy()).max()
    assert 1e-6 < gap < 1e-2  # it is rounded, and not more
    assert facts(path)["precision"] == "float16"


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[7].weight[0, 0] = 1e5
    with pytest.raises(VerificationError, match="65,504"):
        export(model, tmp_path / "m.onnx", X[:2], precision="float16")
    assert not list(tmp_path.iterdir())


def test_int8_is_calibrated_on_data_and_says_how_far_it_is(tmp_path: Path) -> None:
    path = export(network(), tmp_path / "m.onnx", X[:2], precision="int8", data=X)
    model = load(path)
    assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] > 3
    kinds = {one.data_type for one in model.graph.initializer if len(one.dims) > 1}
    assert kinds == {onnx.TensorProto.INT8}
    expected = network()(X).detach().numpy()
    error = np.sqrt(((run(path, X) - expected) ** 2).mean()) / expected.std()
    assert facts(path)["noise"] == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < onnx_precision.NOISE
    narrow = export(network(), tmp_path / "n.onnx", X[:2], precision="int8", data=0.01 * X)
    assert np.abs(run(narrow, X) - expected).max() > 2 * np.abs(run(path, X) - expected).max()  # of other data


def test_int8_that_is_too_far_off_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_precision, "NOISE", 1e-6)
    with pytest.raises(VerificationError, match="int8"):
        export(network(), tmp_path / "m.onnx", X[:2], precision="int8", data=X)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("m.pt2", {"opset": 21}, "opset= is for .onnx"),
        ("m.safetensors", {"precision": "float16"}, "precision= is for .onnx"),
        ("m.onnx", {"precision": "int8"}, "data="),
        ("m.onnx", {"data": X}, "calibrates int8"),
        ("m.onnx", {"precision": "int4"}, "'float16' or 'int8'"),
    ],
)
def test_options_without_effect_are_refused(name: str, options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        export(network(), tmp_path / name, X[:2], **options)
    assert not list(tmp_path.iterdir())


def test_the_call_has_the_keywords_of_its_options() -> None:
    given = inspect.signature(export).parameters
    assert {one.name: given[one.name].default for one in keywords(ExportOptions).values()} == {
        one.name: one.default for one in keywords(ExportOptions).values()
    }


def test_the_command_line_has_the_same_options(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), "
        "nn.Linear(9, 4))\n"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    export(model, tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", X.numpy())
    command = f"export {tmp_path}/m.safetensors -m {tmp_path}/net.py:make -i 3x8x8 -o {tmp_path}/m.onnx"
    more = f"-o {tmp_path}/m.pt2 --opset 21 --precision int8 -d {tmp_path}/x.npy --input-name picture --axis-name n"
    app([*command.split(), *more.split()], standalone_mode=False)
    made = load(tmp_path / "m.onnx")
    assert made.graph.input[0].name == "picture"
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert facts(tmp_path / "m.onnx")["precision"] == "int8"
    assert (tmp_path / "m.pt2").stat().st_size > 0
    with pytest.raises(ArgumentError, match=r"for \.onnx"):
        app([*command.replace(".onnx", ".pt2").split(), "--opset", "21"], standalone_mode=False)


def test_compiled_code_is_run_apart_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.aoti"
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    made: list[bytes] = []
    place = aoti.move_into_place
    monkeypatch.setattr(aoti, "move_into_place", lambda draft, to: (made.append(draft.read_bytes()), place(draft, to)))
    export(model, path, x)
    assert [file.name for file in tmp_path.iterdir()] == ["m.aoti"]
    with path.open("rb") as file:
        network = torch._inductor.aoti_load_package(file)
    with torch.no_grad():
        for batch in (x, torch.cat([x, x[:1]])):
            torch.testing.assert_close(network(batch), model(batch))
    with pytest.raises(CheckpointError, match="compiled code"):
        load(path)

    def earlier(*args: object, **more: object) -> None:
        """A compiler that gives the package above, of another network, or none that can be read."""
        (args[3]).write_bytes(made[0])  # type: ignore[attr-defined]

    monkeypatch.setattr(aoti, "_compile", earlier)
    with pytest.raises(VerificationError, match="differs from the module"):
        export(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).eval(), tmp_path / "other.aoti", x)
    made[0] = made[0][:100]
    with pytest.raises(VerificationError, match="does not run"):
        export(model, path, x)
    assert [file.name for file in tmp_path.iterdir()] == ["m.aoti"]
