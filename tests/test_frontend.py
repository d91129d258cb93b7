"""The front end: keyword and nested inputs, constants, dataclass outputs, and the same through every door of vfx.

Graphs are compared with the modules to 1e-12 (float64) and files to 1e-5 (float32), relative to the largest value.
"""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import close
from micro_models import net
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from vfx import cli
from vfx.analyse.verify import verify
from vfx.api import collect, compile, layers, merge, profile, repair, symmetry, trace
from vfx.capture.outputs import named_tensors, plain
from vfx.emit.files import export, load
from vfx.emit.module import difference, emit, graph_module, own_class
from vfx.errors import ArchitectureError, ArgumentError, CaptureError, DataError
from vfx.operators import operator
from vfx.program import Program, casts
from vfx.proof import outputs_error

EXACT, FILES = 1e-12, 1e-5
BATCHES = (1, 2, 5)


class Cache:
    """A key-value cache: no tensor, and nothing that torch.export knows."""

    def __init__(self, value: Tensor):
        self.value = value


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None
    cache: Cache | None = None


class Scorer(nn.Module):
    """Token ids, an optional mask and a flag in, a dataclass with a cache out: a Hugging Face network in small."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.config = {"use_cache": True}
        self.activation = activation
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None, double: bool = False, **more: Any
    ) -> Output:
        hidden = self.activation(self.up(self.table(ids)))
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        if types is not None:
            hidden = hidden + types.unsqueeze(-1)
        if "shift" in more:
            hidden = hidden + more["shift"].unsqueeze(-1)
        logits = self.down(hidden.sum(1))
        return Output(
            2 * logits if double else logits, (hidden,), cache=Cache(hidden) if self.config["use_cache"] else None
        )


class Translator(nn.Module):
    """An encoder and a decoder that read sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.encoder, self.decoder, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        memory = torch.tanh(self.encoder(self.table(source)))
        query = torch.tanh(self.decoder(self.table(target)))
        attended = F.scaled_dot_product_attention(*(x.unsqueeze(1) for x in (query, memory, memory)))  # one head
        return {"logits": self.head(attended.squeeze(1) + query), "memory": memory}


class State(NamedTuple):
    hidden: Tensor
    cell: Tensor


class Cell(nn.Module):
    """A step of a recurrence: nested states in, a named tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor, state: Any, extra: Any = None) -> State:
        hidden = torch.tanh(self.a(x) + self.b(state[0]))
        cell = hidden * torch.sigmoid(state[1])
        if extra is not None:
            cell = cell + self.c(extra["bias"]) * extra["gain"]
        return State(hidden, cell)


def ids(batch: int, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed + batch))


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + shape[0]), dtype=torch.float64)


def tokens(batch: int) -> dict[str, Tensor]:
    mask = (ids(batch, seed=9) > 2).double()
    return {"mask": mask, "ids": ids(batch)}  # not in forward's order


def sentences(batch: int) -> dict[str, Tensor]:
    return {"source": ids(batch, 7), "target": ids(batch, 5, seed=3)}


def step(batch: int) -> dict[str, Any]:
    state = (values(batch, 6), values(batch, 6, seed=1))
    return {"x": values(batch, 5), "state": state, "extra": {"bias": values(batch, 3), "gain": 0.5}}


def scorer(seed: int = 0, **options: Any) -> Scorer:
    torch.manual_seed(seed)
    return Scorer(**options).double().eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]], list[str]]] = {
    "keywords": (Scorer, tokens, ["ids", "mask"]),
    "two lengths": (Translator, sentences, ["source", "target"]),
    "nested": (Cell, step, ["x", "state_0", "state_1", "extra_bias"]),
}


def case(name: str, seed: int = 0) -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    torch.manual_seed(seed)
    return CASES[name][0]().double().eval(), CASES[name][1]


def operators(program: Program) -> list[str]:
    return [operator(node) for node in program.graph.nodes if node.op == "call_function"]


@torch.no_grad()
def same(found: Any, expected: Any, tolerance: float = EXACT) -> None:
    """The same tensors under the same names."""
    first, second = named_tensors(found), named_tensors(expected)
    assert list(first) == list(second)
    for name, tensor in first.items():
        close(tensor, second[name], tolerance)


# inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_graph_and_graphmodule_equal_the_module_at_any_batch(name: str) -> None:
    model, inputs = case(name)
    for example in (1, 3):
        program = trace(model, inputs(example))
        graph = graph_module(program)
        assert [node.target for node in program.placeholders] == program.signature.names == CASES[name][2]
        for batch in BATCHES:
            same(program(**inputs(batch)), model(**inputs(batch)))
            same(graph(**inputs(batch)), model(**inputs(batch)))


def test_positional_and_keyword_captures_are_one_graph() -> None:
    model, inputs = case("two lengths")
    named, placed = trace(model, inputs(2)), trace(model, tuple(inputs(2).values()))
    assert str(named.graph) == str(placed.graph)
    for program in (named, placed):
        for module in (program, graph_module(program)):
            same(module(*inputs(3).values()), model(**inputs(3)))
            same(module(**inputs(3)), model(**inputs(3)))
    with torch.no_grad():
        assert outputs_error(model(**inputs(3)), named(ids(3, 7, seed=5), ids(3, 5))) > 0.1  # negative control


def test_a_mapping_of_any_class_is_a_dict() -> None:
    """Tokenizers return such a class."""
    model = scorer()
    program = trace(model, UserDict(tokens(2)))
    same(program(**UserDict(tokens(3))), model(**tokens(3)))


def test_keywords_that_forward_takes_as_double_star_are_named() -> None:
    model = scorer()
    program = trace(model, {"shift": values(2, 7), "ids": ids(2)})
    assert program.signature.names == ["ids", "shift"]
    expected = model(ids(3), shift=values(3, 7))
    same(program(ids=ids(3), shift=values(3, 7)), expected)
    same(graph_module(program)(ids=ids(3), shift=values(3, 7)), expected)


def test_arguments_between_may_be_left_out() -> None:
    model = scorer()
    program = trace(model, {"ids": ids(2), "types": values(2, 7)})
    same(program(ids=ids(3), types=values(3, 7)), model(ids(3), types=values(3, 7)))
    assert program.signature.names == ["ids", "types"]


def test_one_tensor_for_each_placeholder_is_taken_too() -> None:
    model, inputs = case("nested")
    call = inputs(3)
    program = trace(model, inputs(2))
    same(program(call["x"], *call["state"], call["extra"]["bias"]), model(**call))


def test_a_tensor_without_the_batch_stays_fixed() -> None:
    model = net(lambda self, x, table: self.a(x) @ table, a=nn.Linear(5, 4))
    table = torch.randn(4, 3)
    program = trace(model, {"x": torch.randn(2, 5), "table": table})
    assert [node.meta["val"].shape[0] for node in program.placeholders][1] == 4
    close(program(x=torch.ones(6, 5), table=table), model(torch.ones(6, 5), table), 1e-6)


def test_a_single_sample_is_doubled_in_every_input() -> None:
    model, inputs = case("nested")
    program = trace(model, inputs(1))
    assert {len(x) for x in program.example_inputs} == {2}
    assert program.signature.call(program.example_inputs).kwargs["extra"]["gain"] == 0.5


# constants ------------------------------------------------------------------------------------------------------------


def test_constants_are_baked_in() -> None:
    model = scorer()
    plain_, doubled = (trace(model, {"ids": ids(2), "double": flag, "mask": None}) for flag in (False, True))
    for program, flag in ((plain_, False), (doubled, True)):
        graph = graph_module(program)
        expected = model(ids(3), double=flag)
        for module in (program, graph, pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
            same(module(ids=ids(3)), expected)
            same(module(ids=ids(3), double=flag, mask=None), expected)
            with pytest.raises(ArgumentError, match=f"double was captured as the constant {flag} and is {not flag}"):
                module(ids=ids(3), double=not flag)
            with pytest.raises(ArgumentError, match=r"mask was captured as the constant None and is \(3, 7\) now"):
                module(ids=ids(3), mask=values(3, 7))
    with torch.no_grad():
        assert outputs_error(plain_(ids=ids(3)), doubled(ids=ids(3))) > 0.1


def test_constants_inside_a_nested_argument_are_checked() -> None:
    model, inputs = case("nested")
    other = inputs(2) | {"extra": {"bias": values(2, 3), "gain": 2.0}}
    program = trace(model, inputs(2))
    for module in (program, graph_module(program)):
        with pytest.raises(ArgumentError, match=r"extra.* was captured as the constant 0.5 and is 2.0"):
            module(**other)


def test_a_constant_among_positional_arguments_keeps_its_place() -> None:
    model = net(lambda self, x, flag, y: self.a(x) + y if flag else y, a=nn.Linear(5, 4))
    x, y = torch.randn(3, 5), torch.randn(3, 4)
    graph = graph_module(trace(model, (torch.randn(2, 5), True, torch.randn(2, 4))))
    close(graph(x, True, y), model(x, True, y), 1e-6)
    with pytest.raises(ArgumentError, match="flag was captured as the constant True"):
        graph(x, False, y)


def test_nested_arguments_survive_copies_and_pickle() -> None:
    model, inputs = case("nested")
    graph = graph_module(trace(model, inputs(2)))
    for module in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        same(module(**inputs(3)), model(**inputs(3)))


def test_a_named_tuple_is_read_by_its_fields() -> None:
    model = net(lambda self, x, state: self.a(x) + state.hidden * state.cell, a=nn.Linear(5, 4))
    state = State(torch.randn(2, 4), torch.randn(2, 4))
    program = trace(model, (torch.randn(2, 5), state))
    assert program.signature.names == ["x", "state_hidden", "state_cell"]
    x = torch.randn(2, 5)
    close(graph_module(program)(x, state), model(x, state), 1e-6)


# outputs --------------------------------------------------------------------------------------------------------------


def test_dataclasses_become_dicts_and_caches_are_dropped_with_a_note() -> None:
    model = scorer()
    program = trace(model, tokens(2))
    out = program(**tokens(3))
    assert list(out) == ["logits", "hidden"]
    assert isinstance(out["hidden"], tuple)
    assert program.notes == ("output cache is Cache, not a tensor: dropped",)
    assert model.config == {"use_cache": True}
    model.config["use_cache"] = False
    assert trace(model, tokens(2)).notes == ()


def test_in_a_tuple_none_stands_for_what_was_dropped() -> None:
    model = net(lambda self, x: (self.a(x), Cache(x), [x, Cache(x)], 3), a=nn.Linear(5, 4))
    program = trace(model, torch.randn(2, 5))
    x = torch.randn(3, 5)
    out = program(x)
    assert out[1] is None
    assert out[2][1] is None
    assert out[3] == 3
    assert len(program.notes) == 2
    assert "output [1] is Cache" in program.notes[0]
    same(out, model(x), 1e-6)


def test_a_model_that_returns_no_tensor_at_all_has_an_empty_output() -> None:
    assert plain(Cache(torch.ones(1))) is None
    assert plain({"a": Cache(torch.ones(1)), "b": None}) == {"b": None}


def test_outputs_are_compared_by_key() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert outputs_error(Output(a, (b,)), {"hidden": (b,), "logits": a}) == 0
    assert outputs_error(Output(a, (b,)), {"hidden": (a,), "logits": b}) > 0.1
    assert outputs_error(Output(a, (b,)), {"logits": a}) == float("inf")
    assert outputs_error({"logits": a}, {"scores": a}) == float("inf")
    assert outputs_error({"logits": a}, {"logits": a[:2]}) == float("inf")


def test_edges_with_dataclass_outputs_are_told_apart() -> None:
    trace([scorer(0), scorer(1)], tokens(2))
    with pytest.raises(ArchitectureError, match=r"edge 1 \(Scorer\) has the tensors of edge 0 but is another network"):
        trace([scorer(0), scorer(1, activation=torch.tanh)], tokens(2))


def test_own_class_and_graphmodule_give_the_same() -> None:
    program = trace([scorer(0), scorer(1)], tokens(2))
    for edge in range(2):
        module, reason = emit(program, edge)
        assert (type(module), reason) == (Scorer, "")
        assert isinstance(module(**tokens(2)), Output)
        assert difference(graph_module(program, edge), program.select(edge)) < 1e-9
        assert difference(own_class(program, edge), program.select(1 - edge)) > 1e-3  # negative control


# precision and contexts -----------------------------------------------------------------------------------------------


def _norm(self: Any, x: Tensor) -> Tensor:
    wide = self.a(x).to(torch.float32)
    return self.b((wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(torch.float32))


def test_casts_follow_the_precision_that_a_check_asks_for() -> None:
    """A network that computes its norms in float32 is still proved in float64."""
    torch.manual_seed(0)
    models = [net(_norm, a=nn.Linear(5, 6), b=nn.Linear(6, 3)).eval() for _ in range(2)]
    program = trace(models, torch.randn(4, 5))
    exact = program.to(dtype=torch.float64)
    assert casts(program.graph)
    assert "float32" not in str(exact.graph)
    assert program.to(dtype=torch.float32).graph is program.graph
    assert not exact.structural
    assert exact(torch.randn(3, 5, dtype=torch.float64)).dtype == torch.float64
    assert verify(symmetry(program)) < 1e-12
    assert emit(program)[1] == ""
    assert difference(own_class(program, 1), program.select(0)) > 1e-9  # negative control


def _quietly(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        first, second = torch.tanh(2 * x), x + 1
        with torch.autocast("cpu", enabled=False):
            second = second * first
    return self.a(first) + second


def _checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda h: torch.tanh(self.a(h)), x, use_reentrant=False)


@pytest.mark.parametrize("forward", [_quietly, _checkpointed])
@pytest.mark.parametrize("exported", [False, True])
def test_contexts_that_change_no_value_are_inlined(forward: Any, exported: bool) -> None:
    model = net(forward, a=nn.Linear(5, 5)).eval()
    batch = {0: torch.export.Dim("batch", min=1)}
    program = trace(model, torch.randn(2, 5))
    if exported:  # with gradients on, torch.export keeps no_grad as a nested graph
        from vfx.capture.capture import capture

        whole = torch.export.export(model, (torch.randn(2, 5),), dynamic_shapes=(batch,), strict=False)
        program = capture(whole, torch.randn(2, 5))
    assert all(name.startswith("aten.") for name in operators(program))
    x = torch.randn(3, 5)
    close(program(x), model(x), 1e-6)


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.a(x)


def _branch(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))


@pytest.mark.parametrize(
    ("forward", "message"), [(_autocast, r"torch.autocast\('cpu', torch.bfloat16\)"), (_branch, "remove torch.cond")]
)
def test_contexts_that_change_values_are_refused(forward: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        trace(net(forward, a=nn.Linear(5, 5)).eval(), torch.randn(2, 5))


def test_an_empty_cache_leaves_no_trace() -> None:
    model = net(lambda self, x: self.a(torch.cat([torch.tensor([]), x], -1)), a=nn.Linear(5, 4))
    program = trace(model, torch.randn(2, 5))
    assert operators(program) == ["aten.linear"]
    assert list(program.weights[0]) == ["a.weight", "a.bias"]
    x = torch.randn(3, 5)
    close(program(x), model(x), 1e-6)


def test_masks_of_the_shape_alone_work_at_any_batch() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        position = torch.arange(length).expand(batch, -1)
        causal = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)
        h = self.table(ids) + self.place(position)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=causal)

    model = net(forward, table=nn.Embedding(11, 4), place=nn.Embedding(7, 4))
    program = trace(model, {"ids": ids(2)})
    for batch in BATCHES:
        close(program(ids=ids(batch)), model(ids(batch)), 1e-6)


# merging --------------------------------------------------------------------------------------------------------------


def _loader(inputs: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [inputs(4) | {"label": 1}, inputs(9), inputs(3)]


@pytest.mark.parametrize("name", CASES)
def test_merge_with_batches_of_dicts_and_of_tuples(name: str) -> None:
    _, inputs = case(name)
    models = [case(name, seed)[0] for seed in range(2)]
    data = _loader(inputs)
    names = [a.name for a in trace(models, inputs(2)).signature.inputs]
    result = merge(models, inputs(2), data=data, normalize="bias_calibration", progress=False)
    assert type(result.module) is type(models[0])
    same(result.module(**inputs(3)), result.program(**inputs(3)))
    tuples = [(*(batch[key] for key in names), "label") for batch in data]
    again = merge(models, inputs(2), data=tuples, normalize="bias_calibration", progress=False)
    same(again.module(**inputs(3)), result.module(**inputs(3)))
    with torch.no_grad():
        assert outputs_error(models[0](**inputs(3)), result.module(**inputs(3))) > 1e-3


def test_statistics_are_the_same_in_any_partition() -> None:
    models = [scorer(0), scorer(1)]
    whole = tokens(12)
    parts = [{key: value[start : start + 5] for key, value in whole.items()} for start in range(0, 12, 5)]
    first, second = (collect(models, tokens(2), data=d, progress=False) for d in ([whole], parts))
    assert first.samples == second.samples == 12
    for name, moments in first.layers.items():
        close(second.layers[name][1].mean, moments[1].mean, 1e-10)
    limited = collect(models, tokens(2), data=parts, max_samples=7, progress=False)
    assert limited.samples == 7


def test_batches_may_hold_a_tensor_without_the_batch_and_other_lengths() -> None:
    def forward(self: Any, ids: Tensor, table: Tensor) -> Tensor:
        return self.b(F.relu(self.a(F.embedding(ids, table)))).sum(1)

    models = [net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)) for _ in range(2)]
    table = torch.randn(11, 5)
    sizes = {"ids": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=99)}, "table": None}
    program = trace(models, {"ids": ids(2), "table": table}, dynamic_shapes=sizes)
    found = collect(program, data=[{"ids": ids(n, n), "table": table} for n in (4, 9)], max_samples=10, progress=False)
    assert found.samples == 10
    assert found.layers["linear"][0].count == 4 * 4 + 6 * 9
    fixed = trace(models, {"ids": ids(2), "table": table})
    for data, message in [(ids(4, 9), r"captured with \(batch, 7\)"), (ids(4), r"captured with \(11, 5\)")]:
        with pytest.raises(DataError, match=message):
            collect(fixed, data=[{"ids": data, "table": table[:4]}], progress=False)


def test_every_door_takes_keyword_inputs() -> None:
    models, data = [scorer(0), scorer(1)], [tokens(8)]
    assert verify(symmetry(models[0], tokens(2))) < 1e-12
    assert len(list(layers(models[0], tokens(2)))) == 2
    assert profile(models[0], tokens(2)).params == sum(p.numel() for p in models[0].parameters())
    assert compile(models[0], tokens(2), passes=[]).report.own_class
    for normalize in ("rescale", "repair"):
        merged = merge(models, tokens(2), data=data, normalize=normalize, progress=False)
        assert merged.report.notes == (
            "output cache is Cache, not a tensor: dropped",
            "what the network returns as hidden[0]: channels of up.weight stay as they are; outputs= names those that "
            "count",
        )
        repaired = repair(merged, models, data=data, progress=False)
        assert isinstance(repaired.module, Scorer)


def test_a_preserved_network_is_called_by_keyword() -> None:
    models = [scorer(0), scorer(1)]
    result = merge(models, tokens(2), data=[tokens(8)], preserve=1, progress=False)
    assert isinstance(result.module, fx.GraphModule)
    same(result.module(**tokens(3)), result.program(**tokens(3)))
    same(result.module(ids=ids(3), mask=tokens(3)["mask"]), result.program(**tokens(3)))


# files ----------------------------------------------------------------------------------------------------------------


def _single(call: dict[str, Any]) -> dict[str, Any]:
    cast = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    return torch.utils._pytree.tree_map(cast, call)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("own", [True, False], ids=["class", "graph"])
def test_files_are_called_like_the_module(name: str, own: bool, tmp_path: Path) -> None:
    model, inputs = case(name)
    model = model.float()
    module = model if own else graph_module(trace(model, _single(inputs(2))))
    call, expected = _single(inputs(5)), model(**_single(inputs(5)))
    export(module, tmp_path / "m.pt2", _single(inputs(1)))
    back = load(tmp_path / "m.pt2")
    same(back(**call), expected, FILES)
    again = export(back, tmp_path / "again.pt2", _single(inputs(2)))
    same(load(again)(**call), expected, FILES)
    export(module, tmp_path / "m.onnx", _single(inputs(1)))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [feed.name for feed in session.get_inputs()] == CASES[name][2]
    tensors = [
        x.numpy() for x in torch.utils._pytree.tree_leaves([call[a] for a in _order(name)]) if isinstance(x, Tensor)
    ]
    found = session.run(None, dict(zip(CASES[name][2], tensors)))
    for got, want in zip(found, named_tensors(expected).values(), strict=True):
        close(got, want.detach(), FILES)


def _order(name: str) -> list[str]:
    return list(dict.fromkeys(placeholder.split("_")[0] for placeholder in CASES[name][2]))


def test_onnx_outputs_carry_the_names_of_the_keys(tmp_path: Path) -> None:
    model = scorer().float()
    call = _single(tokens(2)) | {"double": True}
    export(merge([model, scorer(1).float()], call), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [out.name for out in session.get_outputs()] == ["logits", "hidden_0"]
    assert {feed.name for feed in session.get_inputs()} == {"ids", "mask"}


# the command line -----------------------------------------------------------------------------------------------------


def test_the_command_line_takes_named_integers(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.pt"))
        torch.save(case("two lengths", seed)[0].float().state_dict(), paths[-1])
    data = tmp_path / "data.npz"
    np.savez(data, target=ids(20, 5).numpy(), source=ids(20, 7).numpy(), labels=np.zeros(20))
    inputs = ["-m", "test_frontend:Translator", "-i", "target=5:11", "-i", "source=7:11"]
    out = tmp_path / "merged.pt2"
    run = lambda *arguments: CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)  # noqa: E731
    result = run("merge", *paths, *inputs, "--data", str(data), "-o", str(out))
    assert result.exit_code == 0, result.output
    assert load(out)(**sentences(3))["logits"].shape == (3, 5, 11)
    assert "verified" in run("symmetry", *inputs).output
    np.savez(data, source=ids(20, 7).numpy())
    with pytest.raises(DataError, match=r"lacks target; it holds source"):
        run("merge", *paths, *inputs, "--data", str(data))
    with pytest.raises(ArgumentError, match=r"integers below 1000 .* got 'source=7:many'"):
        run("symmetry", "-m", "test_frontend:Translator", "-i", "source=7:many")


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"id": ids(2)}, r"names 'id', which Translator.forward\(\) does not take; it takes source, target"),
        ({"source": ids(2)}, r"do not fit Translator.forward\(\): missing a required argument: 'target'"),
        ((ids(2), ids(2), ids(2)), r"do not fit Translator.forward\(\): too many positional"),
        ({"source": ids(2), "target": Cache(ids(2))}, "'target' is Cache, neither a tensor nor a constant"),
        ({"source": ids(2), "target": [ids(2), np.ones(2)]}, r"'target\[1\]' is ndarray, neither"),
        ({"source": [1, 2], "target": [3]}, "at least one tensor with a batch axis"),
        ({"source": ids(0), "target": ids(0)}, "empty batch"),
        ({}, "non-empty tuple"),
    ],
)
def test_unusable_inputs_name_the_argument(inputs: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        trace(Translator(), inputs)


def test_inputs_of_a_wrong_shape_are_shown_by_name() -> None:
    with pytest.raises(CaptureError, match=r"could not capture Cell with inputs x=\(2, 4\), state=tuple.*Way out"):
        trace(case("nested")[0], step(2) | {"x": values(2, 4)})


def test_a_network_tied_to_one_batch_is_refused_with_the_way_out() -> None:
    model = net(lambda self, x, y: self.a(x).view(2, 4) + y, a=nn.Linear(5, 4))
    with pytest.raises(CaptureError, match="dynamic_shapes="):
        trace(model, {"x": torch.randn(2, 5), "y": torch.randn(2, 4)})


def test_calls_that_differ_from_the_capture_are_refused() -> None:
    model, inputs = case("nested")
    program = trace(model, inputs(2))
    good = inputs(2)
    for change, message in [
        ({"state": values(2, 6)}, "'state' is nested as tensor"),
        ({"state": (values(2, 6), "x")}, "input 'state_1' is str, not a tensor"),
        ({"extra": None}, "'extra' is nested as None"),
        ({"speed": 1}, "was not captured with speed; it takes x, state, extra"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            program(**good | change)
    with pytest.raises(ArgumentError, match=r"takes 3 inputs \(x, state, extra\), got 1: state, extra missing"):
        program(x=good["x"])
    with pytest.raises(ArgumentError, match=r"takes 3 inputs .* got 5"):
        program(*[good["x"]] * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "input 'ids' is NoneType, not a tensor"),
        ({"mask": "all"}, "input 'mask' is str, not a tensor"),
        ({"mask": torch.ones(4, 7)}, "'mask' of a batch is torch.float32, the network takes torch.float64"),
        ({"ids": ids(4, 6)}, r"'ids' of a batch has shape \(4, 6\), the network was captured with \(batch, 7\)"),
        ({"ids": ids(3)}, r"differ in their number of samples: \{'ids': 3, 'mask': 4\}"),
        ({"mask": [values(4, 7)]}, "'mask' is nested as"),
    ],
)
def test_batches_that_do_not_fit_name_the_input(change: dict[str, Any], message: str) -> None:
    program = trace([scorer(0), scorer(1)], tokens(2))
    with pytest.raises(DataError, match=message):
        collect(program, data=[tokens(4), tokens(4) | change], progress=False)


def test_a_batch_without_an_input_names_it() -> None:
    program = trace([scorer(0), scorer(1)], tokens(2))
    with pytest.raises(DataError, match="a batch lacks mask; it has ids, labels"):
        collect(program, data=[{"ids": ids(4), "labels": ids(4)}], progress=False)
    with pytest.raises(DataError, match=r"holds 1 tensors, the network takes 2 inputs \(ids, mask\)"):
        collect(program, data=[(ids(4),)], progress=False)
    with pytest.raises(DataError, match="must be a tensor or an iterable of batches, got dict"):
        collect(program, data=tokens(4), progress=False)  # one batch, not a list of them


# transformers ---------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_hugging_face_networks(name: str) -> None:
    """Error 1e-10 in float64; the cache of a decoder needs no switch in the user's config."""
    config = getattr(transformers, f"{name}Config")(**SIZES)
    build = getattr(transformers, {"Bert": "BertModel", "Llama": "LlamaForCausalLM"}[name])
    models = [build(config).double().eval() for _ in range(2)]
    before = models[0].config.to_json_string()

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"input_ids": ids(batch), "attention_mask": torch.ones(batch, 7, dtype=torch.long)}

    program = trace(models, transformers.BatchEncoding(inputs(1)))
    assert any("DynamicCache, not a tensor" in note for note in program.notes) == (name == "Llama")
    with torch.no_grad():
        for batch in BATCHES:
            same(program(**inputs(batch)), models[0](**inputs(batch)), 1e-10)
            same(graph_module(program, 1)(**inputs(batch)), models[1](**inputs(batch)), 1e-10)
    assert models[0].config.to_json_string() == before
    merged = merge(models, inputs(2), data=[inputs(6)], normalize=None, progress=False)
    assert type(merged.module) is build
    symmetry(program)
