"""A .pt2 is data: hostile archives are refused before torch sees them, honest ones of every kind come back the same."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

from vfx.capture.capture import capture
from vfx.capture.exporting import exported
from vfx.capture.signature import Call
from vfx.cli import app
from vfx.data.arrays import read_inputs
from vfx.emit.files import export, load
from vfx.emit.module import graph_module
from vfx.emit.pt2 import read_program, write_program
from vfx.emit.pt2.expressions import checked_expression
from vfx.errors import ArgumentError, CaptureError, CheckpointError

MODEL = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
SAMPLES = "archive/data/sample_inputs/model.pt"
Files = dict[str, bytes]


class Mark(str):
    """Unpickling this makes an empty folder of its name: a harmless sign that a file's code ran."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self),)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Files:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("archive") / "good.pt2"
    export(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), path, torch.randn(2, 4))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _written(files: Files, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _pickled(value: Any, by_torch: bool = True) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue() if by_torch else pickle.dumps(value)


def _edited(files: Files, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads(files[name])
    change(value)
    files[name] = json.dumps(value).encode()


def _all(value: Any, key: str, new: Any) -> Any:
    if isinstance(value, dict):
        return {name: new if name == key else _all(item, key, new) for name, item in value.items()}
    return [_all(item, key, new) for item in value] if isinstance(value, list) else value


# hostile archives -----------------------------------------------------------------------------------------------------


def _samples(files: Files, mark: Mark) -> None:
    files[SAMPLES] = _pickled(mark)


def _nested_sample(files: Files, mark: Mark) -> None:
    files[SAMPLES] = _pickled(((torch.zeros(2, 4), mark), {}))


def _weight(files: Files, mark: Mark) -> None:
    _edited(files, WEIGHTS, lambda c: c["config"]["0.weight"].update(use_pickle=True))
    files["archive/data/weights/weight_0"] = _pickled(mark)


def _older_weights(files: Files, mark: Mark) -> None:
    files["archive/data/weights/model.pt"] = _pickled({"0.weight": mark})


def _older_constants(files: Files, mark: Mark) -> None:
    files["archive/data/constants/model.pt"] = _pickled({"c": mark})


def _constant(name: str, by_torch: bool) -> Callable[[Files, Mark], None]:
    def change(files: Files, mark: Mark) -> None:
        entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
        files[CONSTANTS] = json.dumps({"config": {"c": entry}}).encode()
        files["archive/data/constants/" + name] = _pickled(mark, by_torch)

    return change


def _expression(files: Files, mark: Mark) -> None:
    files[MODEL] = json.dumps(
        _all(json.loads(files[MODEL]), "expr_str", f"__import__('os').mkdir({str(mark)!r})")
    ).encode()


def _guards(files: Files, mark: Mark) -> None:
    _edited(files, MODEL, lambda m: m.update(guards_code=[f"__import__('os').mkdir({str(mark)!r}) or True"]))


def _node(change: Callable[[dict[str, Any], Mark], None]) -> Callable[[Files, Mark], None]:
    return lambda files, mark: _edited(files, MODEL, lambda m: change(m["graph_module"]["graph"]["nodes"][0], mark))


def _calls(target: str) -> Callable[[Files, Mark], None]:
    """A node without inputs, so that it would be evaluated as a constant when the file is loaded."""

    def change(files: Files, mark: Mark) -> None:
        def add(model: Any) -> None:
            graph = model["graph_module"]["graph"]
            text = {"name": "", "arg": {"as_string": str(mark)}, "kind": 1}
            output = {"as_tensor": {"name": "made"}}
            node = {"target": target, "inputs": [text], "outputs": [output], "metadata": {}, "name": "made"}
            graph["nodes"].insert(0, node)
            meta = _all(next(iter(graph["tensor_values"].values())), "as_expr", None)
            graph["tensor_values"]["made"] = {**meta, "sizes": [], "strides": []}
            graph["nodes"][1]["inputs"][0]["arg"] = output

        _edited(files, MODEL, add)

    return change


def _renamed(old: str, new: str) -> Callable[[Files, Mark], None]:
    def change(files: Files, mark: Mark) -> None:
        text = json.dumps(new.replace("MARK", repr(str(mark))))[1:-1].encode()
        files[MODEL] = files[MODEL].replace(b'"' + old.encode() + b'"', b'"' + text + b'"')
        files[WEIGHTS] = files[WEIGHTS].replace(b'"' + old.encode() + b'"', b'"' + text + b'"')

    return change


def _structure(kind: str, context: Callable[[Mark], Any]) -> Callable[[Files, Mark], None]:
    def change(files: Files, mark: Mark) -> None:
        leaf = {"type": None, "context": None, "children_spec": []}
        tree = json.dumps([1, {"type": kind, "context": context(mark), "children_spec": [leaf]}])

        def edit(model: Any) -> None:
            model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = tree

        _edited(files, MODEL, edit)

    return change


def _module(mark: Mark) -> str:
    """A module that leaves the mark when it is imported."""
    name = f"imported_by_{mark.rpartition('/')[2]}"
    Path(mark).with_name(f"{name}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nvalue = dict\n")
    return name


def _enum(mark: Mark) -> str:
    return json.dumps([{"__enum__": True, "fqn": f"{_module(mark)}:value", "name": "x"}])


def _factory(mark: Mark) -> dict[str, Any]:
    return {"default_factory_module": _module(mark), "default_factory_name": "value", "dict_context": [{}]}


def _library(files: Files, mark: Mark) -> None:
    files["archive/data/aotinductor/model/model.so"] = b"\x7fELF"


def _reads_a_file(files: Files, mark: Mark) -> None:
    _calls("torch.ops.aten.from_file.default")(files, mark)


HOSTILE: dict[str, tuple[Callable[[Files, Mark], None], str]] = {
    "sample inputs": (_samples, "needs code to be unpickled"),
    "one sample": (_nested_sample, "needs code to be unpickled"),
    "weight": (_weight, "'0.weight' is stored in 'weight_0' as a pickled object"),
    "weights in the older form": (_older_weights, "weights/model.pt needs code"),
    "constants in the older form": (_older_constants, "constants/model.pt needs code"),
    "constant": (_constant("tensor_0", True), "'c' is stored in 'tensor_0' as a pickled object"),
    "custom object": (_constant("custom_obj_0", False), "is no plain data|pickled object"),
    "opaque object": (_constant("opaque_obj_0", False), "is no plain data|pickled object"),
    "size": (_expression, "no expression of integers and symbols"),
    "operator of the system": (_calls("torch.os.mkdir"), "'torch.os.mkdir' is no operator of torch"),
    "operator of Python": (_calls("_operator.methodcaller"), "is no operator of torch"),
    "library of operators": (_calls("torch.ops.load_library"), "is no operator of torch"),
    "operator on files": (_reads_a_file, "reaches beyond tensors"),
    "operator with text": (_calls("torch.ops.torchvision.nms.default"), "takes text|is not known here"),
    "name of a value": (_renamed("linear", "y=__import__('os').mkdir(MARK)"), "is no name of a value"),
    "name of a parameter": (_renamed("0.weight", '"+__import__("os").mkdir(MARK)+"'), "is no name of a parameter"),
    "name of an input": (_renamed("input", "x=__import__('os').mkdir(MARK)"), "is no name of a value"),
    "enumeration": (_structure("builtins.dict", _enum), "does not name its 1 parts"),
    "factory": (_structure("collections.defaultdict", _factory), "does not name its 1 parts"),
    "compiled library": (_library, "it is a compiled library"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_in_an_archive_is_refused_and_never_run(
    name: str, good: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    files, mark = dict(good), Mark(tmp_path / "ran")
    change, why = HOSTILE[name]
    change(files, mark)
    assert files != good
    with pytest.raises(CheckpointError, match=why):
        load(_written(files, tmp_path / "model.pt2"))
    assert not Path(mark).exists()


def test_guards_are_left_out(good: Files, tmp_path: Path) -> None:
    files, mark = dict(good), Mark(tmp_path / "ran")
    _guards(files, mark)
    network = load(_written(files, tmp_path / "model.pt2"))
    network(torch.randn(3, 4))
    assert not Path(mark).exists()


@pytest.mark.parametrize(
    "name",
    ["sample inputs", "one sample", "weight", "weights in the older form", "constants in the older form", "constant",
     "opaque object", "size", "enumeration"],
)  # fmt: skip
def test_the_hostile_archives_are_real(name: str, good: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own reader runs their code: the test above can fail."""
    files, mark = dict(good), Mark(tmp_path / "ran")
    HOSTILE[name][0](files, mark)
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.suppress(Exception):
        program = torch.export.load(_written(files, tmp_path / "model.pt2"))
        program.graph_module(*program.state_dict.values(), torch.randn(2, 4))
    assert Path(mark).exists()


# damaged archives -----------------------------------------------------------------------------------------------------


def _sizes(sizes: list[int], strides: list[int]) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        meta = config["config"]["0.weight"]["tensor_meta"]
        meta["sizes"], meta["strides"] = ([{"as_int": n} for n in numbers] for numbers in (sizes, strides))

    return change


@pytest.mark.parametrize(
    ("member", "change", "why"),
    [
        (WEIGHTS, _sizes([60, 40], [40, 1]), "needs 9600 bytes, has 96"),
        (WEIGHTS, _sizes([6, 4], [-4, 1]), "not of fixed sizes"),
        (WEIGHTS, _sizes([1 << 40, 1 << 10], [0, 0]), "zip bomb"),
        (WEIGHTS, lambda c: c["config"].pop("0.weight"), "0.weight"),
        (WEIGHTS, lambda c: c["config"]["0.weight"].update(path_name="../../secret"), "pickled object"),
        (WEIGHTS, lambda c: c["config"]["0.weight"].update(is_param=1), "is '1', not bool"),
        (MODEL, lambda m: m["graph_module"]["graph"]["nodes"].pop(0), "damaged|not an exported program"),
        (MODEL, lambda m: m["graph_module"].update(module_call_graph=[]), "how it is called"),
        (MODEL, lambda m: m.pop("graph_module"), "lacks graph_module"),
        (MODEL, lambda m: m["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 1}), "no symbol"),
        (MODEL, lambda m: m["schema_version"].update(major=99), "schema version"),
        (MODEL, lambda m: m.update(verifiers=["EDGE"]), "checked by 'EDGE'"),
    ],
)
def test_damaged_archives_name_what_is_wrong(
    member: str, change: Callable[[Any], Any], why: str, good: Files, tmp_path: Path
) -> None:
    files = dict(good)
    _edited(files, member, change)
    with pytest.raises(CheckpointError, match=why):
        load(_written(files, tmp_path / "model.pt2"))


def test_members_that_are_missing_or_unknown_are_named(good: Files, tmp_path: Path) -> None:
    for name in (MODEL, WEIGHTS, SAMPLES, "archive/archive_version", "archive/data/weights/weight_0"):
        files = {key: content for key, content in good.items() if key != name}
        with pytest.raises(CheckpointError, match=f"lacks the member {name.removeprefix('archive/')}"):
            load(_written(files, tmp_path / "less.pt2"))
    for name in ("archive/code/net.py", "archive/data/weights/../../x", "other/models/model.json", "archive/data.pkl"):
        with pytest.raises(CheckpointError, match=r"member .* is no plain data"):
            load(_written({**good, name: b"x"}, tmp_path / "more.pt2"))
    load(_written({**good, "archive/extra/notes.txt": b"text for the user"}, tmp_path / "notes.pt2"))


def test_a_constant_that_asks_for_any_memory_is_refused(good: Files, tmp_path: Path) -> None:
    """The file says that ``full`` gives a scalar; it would give 4 TiB."""
    files = dict(good)

    def huge(model: Any) -> None:
        graph = model["graph_module"]["graph"]
        inputs = [("size", {"as_ints": [1 << 40]}), ("fill_value", {"as_int": 1})]
        graph["nodes"].insert(0, {
            "target": "torch.ops.aten.full.default", "name": "huge", "metadata": {},
            "inputs": [{"name": name, "arg": arg, "kind": 1} for name, arg in inputs],
            "outputs": [{"as_tensor": {"name": "huge"}}],
        })  # fmt: skip
        graph["nodes"][1]["inputs"][2]["arg"] = {"as_tensor": {"name": "huge"}}
        graph["tensor_values"]["huge"] = {
            "dtype": 7, "sizes": [], "strides": [], "requires_grad": False, "device": {"type": "cpu", "index": None},
            "storage_offset": {"as_int": 0}, "layout": 7,
        }  # fmt: skip

    _edited(files, MODEL, huge)
    with pytest.raises(CaptureError, match=r"node huge gives .*1099511627776"):
        load(_written(files, tmp_path / "model.pt2"))


class _Spectra(nn.Module):
    """A constant that takes a while, beside one that does not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        values = torch.full((self.size, self.size), 0.5)
        return x * torch.linalg.svdvals(values)[:3] + torch.arange(1, 4)


@pytest.mark.parametrize(("size", "folded"), [(100, True), (3000, False)])
def test_a_constant_that_asks_for_any_time_is_left_to_whoever_runs_the_network(size: int, folded: bool) -> None:
    program = capture(_Spectra(size), torch.randn(2, 3))
    left = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("aten.linalg_svdvals.default" not in left) == folded
    assert "aten.arange.start" not in left
    if folded:
        module, x = graph_module(program), torch.randn(4, 3)
        close(module(x), _Spectra(size)(x), 1e-6)


def test_a_constant_in_any_number_of_parts_is_not_computed_to_be_read(good: Files, tmp_path: Path) -> None:
    """The file says that ``unbind`` gives two tensors; it would give millions."""
    files = dict(good)

    def parts(model: Any) -> None:
        graph = model["graph_module"]["graph"]
        size = [{"name": "size", "arg": {"as_ints": [1 << 24]}, "kind": 1}]
        value = [{"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1}]
        source = [{"name": "self", "arg": {"as_tensor": {"name": "whole"}}, "kind": 1}]
        nodes = [
            ("full", "whole", size + value, [{"as_tensor": {"name": "whole"}}]),
            ("unbind", "parts", source, [{"as_tensors": [{"name": "first"}, {"name": "second"}]}]),
        ]
        graph["nodes"][:0] = [
            {"target": f"torch.ops.aten.{kind}.{'int' if kind == 'unbind' else 'default'}", "name": name,
             "metadata": {}, "inputs": inputs, "outputs": outputs}
            for kind, name, inputs, outputs in nodes
        ]  # fmt: skip
        graph["nodes"][2]["inputs"][2]["arg"] = {"as_tensor": {"name": "first"}}
        for name, sizes in (("whole", [1 << 24]), ("first", []), ("second", [])):
            graph["tensor_values"][name] = {
                "dtype": 7, "sizes": [{"as_int": n} for n in sizes], "strides": [{"as_int": 1} for _ in sizes],
                "requires_grad": False, "device": {"type": "cpu", "index": None}, "storage_offset": {"as_int": 0},
                "layout": 7,
            }  # fmt: skip

    _edited(files, MODEL, parts)
    assert isinstance(load(_written(files, tmp_path / "model.pt2")), nn.Module)


# zip bombs ------------------------------------------------------------------------------------------------------------


def _declaring(path: Path, member: str, size: int) -> Path:
    """A zip archive whose directory says that ``member`` unpacks to ``size`` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, bytes(1000))
        archive.infolist()[0].file_size = size
    return path


@pytest.mark.parametrize(("suffix", "member"), [(".pt2", "archive/models/model.json"), (".pt", "archive/data.pkl")])
def test_zip_bombs_are_refused_by_their_declared_sizes(suffix: str, member: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"would unpack to 3000000000: refused as a zip bomb"):
        load(_declaring(tmp_path / f"bomb{suffix}", member, 3_000_000_000))


def test_bombs_among_data_and_repeated_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="zip bomb"):
        read_inputs(_declaring(tmp_path / "data.npz", "x.npy", 3_000_000_000))
    torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "repeated.pt")
    for read in (load, read_inputs):
        with pytest.raises(CheckpointError, match=r"repeated.pt: 'x' .* would unpack to 4398046511104"):
            read(tmp_path / "repeated.pt")
    torch.save({"x": torch.zeros(1).expand(1 << 10, 1 << 10)}, tmp_path / "small.pt")
    assert load(tmp_path / "small.pt")["x"].numel() == 1 << 20


@pytest.mark.parametrize(("suffix", "read"), [(".pt2", load), (".pt", load), (".npz", read_inputs)])
def test_one_part_of_an_archive_in_several_is_refused(suffix: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = _written({"archive/data.pkl": b"x"}, tmp_path / f"part{suffix}")
    content, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
    path.write_bytes(content + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2) + end)  # of two disks
    with pytest.raises(CheckpointError, match="span multiple disks"):
        read(path)


def test_packed_archives_of_ordinary_size_are_read(good: Files, tmp_path: Path) -> None:
    load(_written(good, tmp_path / "model.pt2", zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="unknown way"):
        load(_written(good, tmp_path / "model.pt2", zipfile.ZIP_LZMA))


# sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(FloorDiv(Add(Symbol('s0', integer=True), Integer(-1)), Integer(2)), Integer(1))",
        "TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s53', integer=True))))",
        "StrictLessThan(Symbol('u1', integer=True), Mul(Integer(2), Symbol('s27', integer=True)))",
        "Pow(Symbol('s0', integer=True), Integer(2))",
        "Mod(Mul(Integer(-1), Symbol('s3', integer=True)), Integer(4))",
        "2*s0 + 1",
        "(s0 - 1)//2 % 3",
        "s0 >= 4",
        "s0**2",
        "Max(Integer(1), Min(s0, s1, 300))",
        "Add(" + ", ".join(f"Mul(Integer(4), Min(Integer(300), u{i}))" for i in range(90)) + ")",
        "((s0 - 1)//2 + 1)*((s1 - 1)//2 + 1)*(s2 + 3)//((s0 - 1)//2 + 1)",
        "Pow(Add(Symbol('s0', integer=True), Symbol('s1', integer=True), Integer(-1)), Integer(2))",
        "Pow(Add(s0, s1, s2, s3), s4)",
        "floor(Add(Mul(Rational(1, 2), floor(Add(Mul(Rational(1, 2), s0), Rational(1, 2)))), Rational(1, 2)))",
        "Add(" + ", ".join(f"Mul(Add(s0, u{i}), Add(s1, u{i}))" for i in range(20)) + ")",
    ],
)
def test_sizes_of_real_networks_are_expressions(text: str) -> None:
    assert checked_expression(checked_expression(text)) == checked_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "s0.__class__", "(lambda: 1)()", "[s0]", "s0 if s1 else s2", "'s0'", "f'{s0}'",
        "Symbol(s0)",        "Symbol('x.y')",
        "Symbol('s0', cls=s1)", "eval('1')", "Float('nan')", "Float('1e9999')", "s0 and s1", "s0[0]",
        "2**2**2", "2**65", "2**(s0 - s0 + 10**9)", "Pow(Integer(2), Add(Integer(9), Integer(999999999)))",
        "LShift(Integer(1), Integer(99999999999))", "Pow(Integer(2), Float('1e300', precision=53))", "9" * 5000,
        "(" * 500 + "s0" + ")" * 500, "-" * 500 + "s0", "s0+" * 10_000 + "s0", "s123456", "λ0", "Add(*[1])", "",
        "s0 s1",        "Add(s0, evaluate=False)", "Pow(Integer(2))", "print(s0)", "s0; s1", "s0 # s1\n+ s2 = 3",
        "Max(" + ", ".join(f"s{i}" for i in range(99)) + ")", "Pow(Integer(9), Rational(1, 2))", "sqrt(s0)",
    ],
)  # fmt: skip
def test_everything_else_is_no_size(text: str) -> None:
    with pytest.raises(CheckpointError, match="no expression of integers and symbols"):
        checked_expression(text)


PRODUCT = "Mul(" + ", ".join(f"Add(s0, u{i}, u{i + 1})" for i in range(9)) + ")"


@pytest.mark.parametrize(
    "text",
    [
        "FloorDiv(Pow(Add(s0, u1, u2, u3, u4), Integer(64)), Pow(Add(s0, u1, u2), Integer(60)))",
        "((s0 + u1 + u2 + u3)**64)//((s0 + u1)**60)",
        f"FloorDiv({PRODUCT}, {PRODUCT.replace('u1', 'u9')})",
        f"Mod({PRODUCT[4:-1].replace('), Add(', ') * Add(')}, s3)",
        "FloorDiv(Add(" + ", ".join(f"Mul(Add(s0, u{i}), Add(s1, u{i}))" for i in range(30)) + "), Add(s0, s1))",
        functools.reduce(lambda inner, n: f"floor(Add(Mul({inner}, Rational(1, {n})), {n}))", range(2, 20), "s0"),
        functools.reduce(lambda inner, n: f"ceiling(({inner} + {n})/{n})", range(2, 20), "s0"),
    ],
)  # fmt: skip
def test_sizes_that_take_long_to_evaluate_are_refused(text: str) -> None:
    """sympy multiplies out what it divides, and evaluates the floors in a floor again and again."""
    with pytest.raises(CheckpointError, match=r"multiplied out|floors of floors"):
        checked_expression(text)


def test_what_torch_says_of_a_damaged_archive_is_kept_back(
    good: Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = dict(good)
    symbol = "Symbol('s77', positive=True, integer=True)"
    text = f"Pow(Integer(-9), {symbol})"  # of which torch does not know the sign
    model = json.loads(files[MODEL])
    model["graph_module"]["graph"] = _all(model["graph_module"]["graph"], "expr_str", text)
    files[MODEL] = json.dumps(model).encode()
    with pytest.raises(CheckpointError):
        load(_written(files, tmp_path / "model.pt2"))
    assert capfd.readouterr() == ("", "")


# honest archives ------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])
pytree._register_namedtuple(Pair, serialized_type_name="test.Pair")


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)
        self.register_buffer("shift", torch.ones(3))
        self.register_buffer("steps", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1]) * self.shift + self.steps


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.layer(self.words(ids)))}


class _Odd(nn.Module):
    """Names with dashes and spaces, views of one storage, lifted constants, half and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv-1": nn.Conv1d(3, 4, 3, padding=1), "last one": nn.Linear(4, 4)})
        self.columns = nn.Parameter(torch.randn(8, 4)[2:6].t(), requires_grad=False)
        self.register_buffer("whole", torch.randn(6))
        self.register_buffer("end", self.whole[2:])
        self.short = nn.Parameter(torch.randn(4).half())
        self.waves = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts["last one"](self.parts["conv-1"](x).transpose(1, 2)) @ self.columns
        y = torch.fft.ifft(torch.fft.fft(y) @ self.waves).real + self.short.float() * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return y.clamp(-float("inf"), 1e30) + self.end + self.whole[:4]


class _Containers(nn.Module):
    def forward(self, x: Tensor, flag: bool, pair: Any) -> Any:
        with torch.no_grad():
            y = x * 2
        return OrderedDict(a=(y + pair[0], [x if flag else -x]), b=Pair(pair[1]["k"], x))


class _Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.interpolate(x, scale_factor=1.5, mode="bilinear")
        return y, F.pad(x, (1, 2, 1, 0)), F.max_pool2d(x, 2), x.flatten(2).mean(2) * (x.shape[2] // 2)


class _Chosen(nn.Module):
    def forward(self, x: Tensor) -> Any:
        found = torch.nonzero(x[0] > 0)
        return x[:, found[:, 0]], found.shape[0] * 2


BATCH = Dim("batch", min=1)
HONEST: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], Any]] = {
    "recurrent": (_Recurrent, (torch.randn(2, 5, 4),), ({0: BATCH},)),
    "tied": (_Tied, (torch.arange(8).reshape(2, 4),), ({0: BATCH},)),
    "odd": (_Odd, (torch.randn(2, 3, 4),), ({0: BATCH},)),
    "containers": (
        _Containers,
        (torch.randn(2, 4), True, (torch.randn(2, 4), {"k": torch.randn(2, 4)})),
        ({0: BATCH}, None, ({0: BATCH}, {"k": {0: BATCH}})),
    ),
    "sizes": (_Sizes, (torch.randn(2, 3, 8, 8),), ({0: BATCH, 2: Dim("height", min=4, max=400)},)),
    "chosen": (_Chosen, (torch.randn(3, 5),), ({0: BATCH},)),
}


@pytest.mark.parametrize("name", HONEST)
def test_archives_of_torch_are_read_as_torch_reads_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, args, shapes = HONEST[name]
    model = build().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, path := tmp_path / "model.pt2")
        torchs = torch.export.load(path)
        ours = read_program(path, path.name)
    assert str(ours.graph) == str(torchs.graph)
    assert ours.graph_signature == torchs.graph_signature
    assert ours.range_constraints == torchs.range_constraints
    assert {name: tensor.stride() for name, tensor in ours.state_dict.items()} == {
        name: tensor.stride() for name, tensor in torchs.state_dict.items()
    }
    network = load(path)
    with torch.no_grad():
        actual, expected = (pytree.tree_leaves(module(*args)) for module in (network, model))
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            close(one, other, 1e-6)


def test_a_tied_weight_stays_one_tensor(tmp_path: Path) -> None:
    program, _ = exported(_Tied().eval(), Call((torch.arange(8).reshape(2, 4),)))
    state = read_program(write_program(program), "model").state_dict
    assert state["words.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert state["words.weight"].data_ptr() != state["layer.linear1.weight"].data_ptr()


def test_the_older_form_of_weights_is_read_as_plain_tensors(good: Files, tmp_path: Path) -> None:
    files, x = dict(good), torch.randn(3, 4)
    expected = load(_written(good, tmp_path / "new.pt2"))
    files["archive/data/weights/model.pt"] = _pickled(dict(expected.named_parameters()))
    files["archive/data/constants/model.pt"] = _pickled({})
    with torch.no_grad():
        assert torch.equal(load(_written(files, tmp_path / "old.pt2"))(x), expected(x))


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    @torch.library.custom_op("vfx_test::spoken", mutates_args=())
    def spoken(x: Tensor, how: str) -> Tensor:
        return x + len(how)

    spoken.register_fake(lambda x, how: torch.empty_like(x))

    class Speaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spoken(x, "aloud")

    with pytest.raises(ArgumentError, match=r"cannot go to .pt2, .*vfx_test.spoken.default takes text"):
        export(Speaks(), tmp_path / "model.pt2", torch.randn(2, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "export CHECKPOINT -o OUT.onnx", "diagnose CHECKPOINT CHECKPOINT MODEL -d DATA",
        "diagnose GOOD CHECKPOINT MODEL -d DATA",
        "barrier CHECKPOINT GOOD MODEL -d DATA", "merge CHECKPOINT GOOD MODEL -o OUT.pt2",
        "compare CHECKPOINT GOOD MODEL -d DATA", "repair CHECKPOINT GOOD MODEL -d DATA -o OUT.pt2",
        "transfer CHECKPOINT GOOD GOOD MODEL -o OUT.pt2",
        "prune CHECKPOINT MODEL -o OUT.pt2", "prune-structured CHECKPOINT MODEL -o OUT.pt2",
    ],
)  # fmt: skip
def test_no_command_runs_code_from_an_archive(command: str, good: Files, tmp_path: Path) -> None:
    files, mark = dict(good), Mark(tmp_path / "ran")
    _weight(files, mark)
    np.save(tmp_path / "data.npy", np.zeros((4, 4), dtype=np.float32))
    words = {
        "CHECKPOINT": [str(_written(files, tmp_path / "hostile.pt2"))],
        "GOOD": [str(_written(good, tmp_path / "good.pt2"))],
        "MODEL": ["-m", "torch.nn:Linear", "-a", "in_features=4", "-a", "out_features=3"],
        "DATA": [str(tmp_path / "data.npy")],
    }
    arguments = [
        part.replace("OUT", str(tmp_path / "out")) for word in command.split() for part in words.get(word, [word])
    ]
    result = CliRunner().invoke(app, [*arguments, "-i", "4"])
    assert isinstance(result.exception, CheckpointError), result.output
    assert "hostile.pt2 cannot be read as an exported program: '0.weight' is stored" in str(result.exception)
    assert not Path(mark).exists()
    assert not list(tmp_path.glob("out*"))
