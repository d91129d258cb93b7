"""Outputs that count: only those named are returned, and channels that leave the network in others are free."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import close, network
from micro_models import net
from torch import Tensor, fx, nn
from typer.testing import CliRunner

from vfx import cli
from vfx.analyse.verify import verify
from vfx.api import compare, compile, merge, prune, prune_structured, repair, symmetry, trace
from vfx.capture.outputs import named_tensors, selected
from vfx.diagnosis.diagnose import diagnose
from vfx.elements import act, permuted, random_permutations
from vfx.emit.files import export, load
from vfx.errors import ArgumentError

X = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
QUIET: dict[str, Any] = {"progress": False}


class Encoder(nn.Module):
    """Pre-norm attention and MLP blocks that return their stream behind each block, as Hugging Face encoders do."""

    def __init__(self, width: int = 12, depth: int = 2):
        super().__init__()
        self.embed, self.norm = nn.Linear(4, width), nn.LayerNorm(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 3, batch_first=True) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 10) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(10, width) for _ in range(depth))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.embed(x)
        states = [h]
        for index, attention in enumerate(self.attention):
            a = self.norms[2 * index](h)
            h = h + attention(a, a, a, need_weights=False)[0]
            h = h + self.down[index](torch.relu(self.up[index](self.norms[2 * index + 1](h))))
            states.append(h)
        h = self.norm(h)
        pooled = torch.tanh(self.pooler(h[:, 0]))
        return {"last": h, "pooled": pooled, "states": tuple(states), "logits": self.head(h.mean(1))}


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Encoder().double().eval()


STREAM = 12  # channels


def _as_dict(h: Tensor, g: Tensor, y: Tensor) -> Any:
    return {"h": h, "more": {"g": (g, h)}, "y": y}


def _as_tuple(h: Tensor, g: Tensor, y: Tensor) -> Any:
    return h, y, g


def _nested(h: Tensor, g: Tensor, y: Tensor) -> Any:
    return [h, {"g": g, "deep": (y, h)}]


FORMS: dict[str, Callable[..., Any]] = {"dict": _as_dict, "tuple": _as_tuple, "nested": _nested}
# by the form: names that mean y, the output that is left of them, and a part with h in it
NAMES: dict[str, tuple[list[Any], Callable[[Tensor], Any], Any]] = {
    "dict": (["y", "['y']"], lambda y: {"y": y}, "more"),
    "tuple": ([1, "1", "[1]"], lambda y: (y,), 0),
    "nested": (["[1].deep[0]", "[1]['deep'][0]"], lambda y: [{"deep": (y,)}], "[1].deep"),
}


def small(form: str, seed: int = 0) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        g = torch.relu(self.b(h))
        return FORMS[form](h, g, self.c(g))

    torch.manual_seed(seed)
    return net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3)).double().eval()


def _moved(model: nn.Module, outputs: list[Any], seed: int = 0) -> nn.Module:
    """A copy whose free groups are permuted at random."""
    facts = symmetry(model, X[:2], outputs=outputs)
    weights = act(
        facts, permuted(random_permutations(facts.groups, np.random.default_rng(seed))), facts.program.weights[0]
    )
    twin = copy.deepcopy(model)
    twin.load_state_dict({name: weights[name] for name in model.state_dict()})
    return twin


def _same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    first, second = named_tensors(actual), named_tensors(expected)
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        close(tensor, second[name], tolerance)


# what a name means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_only_the_named_output_is_returned_in_its_nesting(form: str) -> None:
    model = small(form)
    y = model.c(torch.relu(model.b(torch.relu(model.a(X)))))
    names, left, _ = NAMES[form]
    for name in names:
        program = trace(model, X[:2], outputs=[name])
        _same(program(X), left(y), 1e-12)
        assert len(symmetry(program).groups) == 2, "h and g are free"
        assert verify(symmetry(program)) <= 1e-12
        assert any("left out" in note for note in program.notes)
    assert symmetry(model, X[:2]).groups == (), "all outputs pin both"


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_part_can_be_named_and_holds_what_is_in_it(form: str) -> None:
    model, part = small(form), NAMES[form][2]
    program = trace(model, X[:2], outputs=[part])
    _same(program(X), program.returned(model(X)), 1e-12)
    pinned = {pin.fqn for pin in symmetry(program).pinned if pin.node == "output"}
    assert "a.weight" in pinned


def test_several_outputs_stand_in_the_order_of_forward() -> None:
    model = small("dict")
    program = trace(model, X[:2], outputs=["y", "more.g[1]"])
    output = program(X)
    assert list(output) == ["more", "y"]
    _same(output, {"more": {"g": (model(X)["h"],)}, "y": model(X)["y"]}, 1e-12)


def test_naming_every_output_leaves_nothing_out() -> None:
    program = trace(small("tuple"), X[:2], outputs=[0, 1, 2])
    assert program.notes == ()
    _same(program(X), small("tuple")(X), 1e-12)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["logits"], r"'logits' is not returned.*h, more\.g\[0\], more\.g\[1\], y"),
        ([0], "0 is not returned"),
        (["more.g[2]"], "not returned"),
        ([], "leaves no output"),
        ("y", "must be a list of"),
        ([1.5], "must be a list of"),
    ],
)
def test_a_name_that_means_no_output_is_refused_with_those_there_are(outputs: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        trace(small("dict"), X[:2], outputs=outputs)


def test_one_tensor_leaves_nothing_to_choose() -> None:
    model = net(lambda self, x: self.a(x), a=nn.Linear(4, 3)).double()
    with pytest.raises(ArgumentError, match="one tensor"):
        trace(model, X[:2], outputs=[0])


def test_an_ambiguous_name_is_refused_with_the_ways_to_write_it() -> None:
    value = {0: X, "0": X + 1}
    with pytest.raises(ArgumentError, match=r"\[0\] or \['0'\]"):
        selected(value, [0])
    assert selected(value, ["['0']"]) == ({"0": value["0"]}, ["0"])


def test_constants_are_no_outputs() -> None:
    model = net(lambda self, x: {"y": self.a(x), "kind": "rows", "size": 3}, a=nn.Linear(4, 3)).double()
    with pytest.raises(ArgumentError, match="it returns y"):
        trace(model, X[:2], outputs=["kind"])


def test_a_captured_program_takes_no_outputs() -> None:
    program = trace(small("dict"), X[:2])
    for call in (
        lambda: symmetry(program, outputs=["y"]),
        lambda: prune_structured(program, sparsity=0.5, outputs=["y"], **QUIET),
    ):
        with pytest.raises(ArgumentError, match="outputs= belongs to the capture"):
            call()


# a part that only other outputs need ----------------------------------------------------------------------------------


def test_writes_that_only_other_outputs_read_hold_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        marked = h.clone()
        marked[:, :, 0] = 1.0
        marked[:, :, 1:].mul_(2)
        return {"marked": marked, "sorted": h.sort(-1)[0], "y": self.b(h)}

    torch.manual_seed(0)
    model = net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3)).double()
    assert [group.size for group in symmetry(model, X[:2], outputs=["y"]).groups] == [8]
    assert not symmetry(model, X[:2]).groups
    _same(trace(model, X[:2], outputs=["y"])(X), {"y": model(X)["y"]}, 1e-12)


def test_edges_may_differ_in_what_does_not_count() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        return {"y": self.b(h), "extra": torch.relu(h - 1) if self.odd else torch.tanh(h)}

    def made(odd: bool) -> nn.Module:
        torch.manual_seed(int(odd))
        model = net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3)).double()
        model.odd = odd  # type: ignore[assignment]
        return model

    assert trace([made(False), made(True)], X[:2], outputs=["y"]).edges == 2
    with pytest.raises(Exception, match="another network"):
        trace([made(False), made(True)], X[:2])


# encoders -------------------------------------------------------------------------------------------------------------


def test_the_stream_of_an_encoder_is_free_without_its_states() -> None:
    model = encoder()
    free = symmetry(model, X[:2], outputs=["logits"])
    assert STREAM in [group.size for group in free.groups if "embed.weight" in {m.fqn for m in group.members}]
    assert verify(free) <= 1e-10
    held = symmetry(model, X[:2])
    assert not any("embed.weight" in {m.fqn for m in group.members} for group in held.groups)
    reasons = {pin.reason for pin in held.pinned if pin.fqn == "embed.weight"}
    assert "model output states[0]" in reasons or "model output last" in reasons


def test_an_encoder_is_pruned_along_its_stream() -> None:
    model = encoder()
    result = prune_structured(model, X[:2], sparsity=0.5, outputs=["logits"], **QUIET)
    assert result.report.error <= 1e-10
    assert isinstance(result.module, fx.GraphModule)
    assert list(result.module(X)) == ["logits"]
    _same(result.module(X), result.program(X))
    assert result.state_dict()["embed.weight"].shape == (STREAM // 2, 4)
    assert not any(name.startswith("pooler") for name in result.state_dict())
    held = prune_structured(model, X[:2], sparsity=0.5, **QUIET)
    assert held.state_dict()["embed.weight"].shape == (STREAM, 4)
    (note,) = [note for note in held.report.notes if "what the network returns" in note]
    assert "embed.weight" in note
    assert "outputs= names those that count" in note


def test_a_permuted_encoder_comes_back_on_the_named_output_alone() -> None:
    model = encoder()
    twin = _moved(model, ["logits"])
    _same(twin(X)["logits"], model(X)["logits"])
    merged = merge([model, twin], X[:2], match="weight", outputs=["logits"], **QUIET)
    assert type(merged.module) is Encoder
    _same(merged.program(X), {"logits": model(X)["logits"]})
    _same(merged.module(X)["logits"], model(X)["logits"])
    assert any("states" in note and "left out" in note for note in merged.report.notes)
    assert not any("what the network returns" in note for note in merged.report.notes)
    held = merge([model, twin], X[:2], match="weight", **QUIET)
    far = (held.module(X)["logits"] - model(X)["logits"]).detach().abs().max()
    assert float(far) > 1e-2, "with all outputs the stream cannot be brought back"
    assert any("outputs= names those that count" in note for note in held.report.notes)


def test_masks_go_back_into_the_own_class_and_the_rest_stays() -> None:
    model = encoder()
    result = prune(model, X[:2], sparsity=0.5, outputs=["logits"], **QUIET)
    assert type(result.module) is Encoder
    _same(result.module(X)["logits"], result.program(X)["logits"])
    assert torch.equal(result.module.pooler.weight, model.pooler.weight)
    assert (result.module.up[0].weight == 0).any()


def test_by_groups_prune_passes_outputs_on() -> None:
    result = prune(encoder(), X[:2], sparsity=0.5, scope="group", outputs=["logits"], **QUIET)
    assert result.state_dict()["embed.weight"].shape == (STREAM // 2, 4)


def test_networks_of_other_widths_are_merged_for_the_named_output() -> None:
    models = [network(lambda w=w: Encoder(width=w), X) for w in (12, 9)]  # type: ignore[misc]
    result = merge(models, X[:2], match="weight", outputs=["logits"], **QUIET)
    assert list(result.program(X)) == ["logits"]


def test_what_follows_a_merge_keeps_to_the_named_outputs() -> None:
    model = encoder()
    edges, data = [model, _moved(model, ["logits"])], [X]
    merged = merge(edges, X[:2], match="weight", outputs=["logits"], **QUIET)
    repaired = repair(merged, edges, data=data, method="rescale", solve=None, match="weight", **QUIET)
    assert repaired.program.outputs == ("logits",)
    _same(repaired.module(X)["logits"], model(X)["logits"], 1e-6)
    diagnosis = diagnose(merged, edges, data=data, match="weight", **QUIET)
    assert diagnosis.rows
    table = compare(edges, X[:2], data=data, grid={"solve": [None]}, outputs=["logits"], **QUIET)
    assert not [point.error for point in table.points if point.error]


def test_compile_takes_outputs() -> None:
    result = compile(encoder(), X[:2], passes=[], outputs=["logits"])
    assert result.report.own_class
    assert list(result.program(X)) == ["logits"]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_files_of_a_pruned_encoder_hold_the_named_output(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = prune_structured(Encoder(), X[:2].float(), sparsity=0.5, outputs=["logits"], **QUIET)
    path = export(result, tmp_path / f"small{suffix}")
    if suffix == ".pt2":
        _same(load(path)(X.float()), result.module(X.float()), 1e-5)
    else:
        import onnx

        assert [output.name for output in onnx.load(path).graph.output] == ["logits"]


@pytest.mark.filterwarnings("ignore::vfx.errors.ConfigNote")  # its pooler has the width of the stream
def test_an_encoder_of_hugging_face_is_freed_by_what_counts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 10}
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=20, output_hidden_states=True, max_position_embeddings=8, **sizes)
    ).eval()
    call = {"input_ids": torch.randint(0, 20, (2, 6))}
    result = prune_structured(model, call, sparsity=0.5, outputs=["pooler_output"], **QUIET)
    assert list(result.module(**call)) == ["pooler_output"]
    assert result.state_dict()["embeddings.word_embeddings.weight"].shape == (20, 6)
    held = prune_structured(model, call, sparsity=0.5, **QUIET)
    assert held.state_dict()["embeddings.word_embeddings.weight"].shape == (20, 12)


# the command line -----------------------------------------------------------------------------------------------------


def test_the_command_line_takes_outputs(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"edge{seed}.pt")
        torch.save(Encoder().state_dict(), paths[-1])
    model = ["-m", f"{__name__}:Encoder", "-i", "5x4", "--outputs", "logits"]
    for command in (
        ["symmetry", *model],
        ["prune-structured", str(paths[0]), *model, "-s", "0.5"],
        ["prune", str(paths[0]), *model, "-s", "0.5"],
        ["merge", *map(str, paths), *model],
    ):
        result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        words = " ".join(result.output.split())
        assert "model output states" not in words
        assert command[0] == "symmetry" or "left out" in words
