"""Partial zipping: each edge's last layers read the merged rest through that edge's own channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import close, edges, images, network
from micro_models import conv, net
from test_matching import Attention
from test_transform import Random
from torch import Tensor, nn
from vfx.passes.align import Align
from vfx.passes.duplicate_heads import DuplicateHeads
from vfx.passes.interpolate import Interpolate
from vfx.passes.transform import Transform

import vfx
from vfx.api import compile, layers, merge, trace
from vfx.data import tasks
from vfx.errors import ArchitectureError, ArgumentError, DataError
from vfx.program import Program

X = images(24, 8, dtype=torch.float64)


def chain(classes: int = 3, hidden: int = 5) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.b(self.a(x)).flatten(1)))

    return net(forward, a=conv(3, 6), b=conv(6, 4), mid=nn.Linear(4 * 64, hidden), fc=nn.Linear(hidden, classes))


def stream(classes: int = 3) -> nn.Module:
    """A residual stream that crosses every cut beside its branch, and two outputs."""

    def forward(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        s = self.stem(x)
        s = s + self.a2(self.a1(s))
        s = s + self.b2(self.b1(s))
        return {"logits": self.fc(s.mean((2, 3))), "map": self.side(s)}

    return net(forward, stem=conv(3, 6), a1=conv(6, 5), a2=conv(5, 6), b1=conv(6, 4), b2=conv(4, 6),
               side=conv(6, 2, 1), fc=nn.Linear(6, classes))  # fmt: skip


def lively(classes: int = 3) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = torch.relu(self.n0(self.stem(x)))
        s = torch.relu(s + self.n2(self.a2(torch.relu(self.n1(self.a1(s))))))
        return self.fc(s.mean((2, 3)))

    return net(forward, stem=conv(3, 6, bias=False), n0=nn.BatchNorm2d(6), a1=conv(6, 5), n1=nn.BatchNorm2d(5),
               a2=conv(5, 6), n2=nn.BatchNorm2d(6), fc=nn.Linear(6, classes))  # fmt: skip


LINEAR = {"chain": chain, "stream": stream}


def _tensors(value: object) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]  # type: ignore[list-item]


def _headed(program: Program, heads: int | str, alphas: list[float], output: str = "list") -> Program:
    for one in (Align(Random(), seed=1), DuplicateHeads(heads, alphas, output), Transform(), Interpolate(alphas)):  # type: ignore[arg-type]
        program = one(program)
    return program


@pytest.mark.parametrize("name", LINEAR)
def test_an_edges_head_behind_its_own_layers_is_the_edge(name: str) -> None:
    """With all the weight on one edge its head gives that edge's output exactly, at every cut and whatever the maps."""
    program = trace(edges(LINEAR[name], X), X[:2])
    for heads in range(1, len(layers(program))):
        for edge in range(2):
            alphas = [float(edge == 0), float(edge == 1)]
            found = _headed(program, heads, alphas)(X)
            assert len(found) == 2
            for ours, theirs in zip(_tensors(found[edge]), _tensors(program(X, edge=edge))):
                close(ours, theirs, 1e-10)
            other = _tensors(found[1 - edge])[0] - _tensors(program(X, edge=1 - edge))[0]
            assert other.abs().max() > 1e-3, "the other head reads features that are not its own"


def test_maps_go_into_the_first_layer_of_a_head_where_that_is_exact() -> None:
    program = trace(edges(chain, X), X[:2])
    assert not any("joins" in name for name in _headed(program, 1, [0.5, 0.5]).names())
    flat = [name for name in _headed(program, 2, [0.5, 0.5]).names() if "joins" in name]
    assert not flat, "the flattened channels are the linear layer's inputs"
    crossing = trace(edges(stream, X), X[:2])
    inside = _headed(crossing, 4, [0.5, 0.5]).names()
    assert [name for name in inside if "joins" in name], "the stream is read by an add as well"


def test_outputs_as_a_list_side_by_side_and_averaged() -> None:
    program = trace(edges(stream, X), X[:2])
    alphas = [0.3, 0.7]
    apart = _headed(program, 2, alphas)(X)
    together = _headed(program, 2, alphas, "cat")(X)
    mean = _headed(program, 2, alphas, "mean")(X)
    for name in ("logits", "map"):
        pair = [own[name] for own in apart]
        close(together[name], torch.cat(pair, 1), 0)
        close(mean[name], sum(a * own for a, own in zip(alphas, pair)), 1e-12)
    assert together["logits"].shape == (len(X), 6)


def test_a_wrong_map_in_front_of_a_head_is_seen() -> None:
    """Negative control."""
    program = trace(edges(chain, X), X[:2])
    aligned = Align(Random(), seed=1)(program)
    broken = {g: replace(own, dual=own.matrix.mT) for g, own in aligned.transport.elements[0].items()}
    wrong = replace(aligned, transport=replace(aligned.transport, elements=(broken, aligned.transport.elements[1])))
    for one in (DuplicateHeads(1, [1.0, 0.0]), Transform(), Interpolate([1.0, 0.0])):
        wrong = one(wrong)
    assert (wrong(X)[0] - program(X)).abs().max() > 1e-3


@pytest.mark.parametrize("match", ["weight", "activation", "zipit", "cca"])
def test_networks_with_other_classes(match: str, tmp_path: Path) -> None:
    """Three networks, three numbers of classes; a network's own features go to its own head."""
    models = [network(lambda c=c: lively(c), X, seed=c) for c in (3, 5, 2)]
    program, data = trace(models, X[:2], heads=1), X.split(8)
    result = merge(program, data=None if match == "weight" else data, match=match, heads=1, progress=False)
    assert [tuple(y.shape) for y in result.module(X)] == [(24, 3), (24, 5), (24, 2)]
    merged = merge(program, data=data, match=match, heads="fc", head_output="cat", preserve=1, progress=False)
    assert merged.module(X).shape == (24, 10)
    assert merged.report.params_ratio > result.report.params_ratio > 1
    if match in ("weight", "activation"):
        alone = merge(program, data=data, match=match, heads=1, weights=[0, 1, 0], normalize=None, progress=False)
        close(alone.module(X)[1], models[1](X), 1e-9)


def test_heads_are_exported(tmp_path: Path) -> None:
    models = [network(lambda c=c: lively(c), X.float(), seed=c) for c in (3, 5)]
    result = merge(models, X[:2].float(), data=X.float(), match="zipit", heads=2, progress=False)
    assert vfx.export(result, tmp_path / "heads.onnx").stat().st_size > 0  # compared with ONNX Runtime


def test_hidden_layers_of_heads_may_differ() -> None:
    models = [network(lambda h=h: chain(2 + h, h), X, seed=h) for h in (5, 8)]
    found = merge(models, X[:2], data=X, match="zipit", heads=2, weights=0.0, normalize=None, progress=False)
    assert [y.shape[1] for y in found.module(X)] == [7, 10]


def test_attention_below_heads() -> None:
    models = edges(Attention, X)
    result = merge(models, X[:2], data=X.split(8), match="cca", heads="head", normalize=None, progress=False)
    first, second = result.module(X)
    assert first.shape == second.shape == (24, 4)
    assert torch.isfinite(first).all()
    assert (first - second).abs().max() > 0


def test_what_cannot_be_done_is_refused() -> None:
    models = [network(lambda c=c: lively(c), X, seed=c) for c in (3, 5)]
    with pytest.raises(ArchitectureError, match="heads"):
        merge(models, X[:2], match="weight", progress=False)
    with pytest.raises(ArgumentError, match="averaged"):
        merge(models, X[:2], match="weight", heads=1, head_output="mean", progress=False)
    with pytest.raises(ArgumentError, match="between 0 and 3"):
        merge(models, X[:2], match="weight", heads=4, progress=False)
    with pytest.raises(ArgumentError, match="names no module"):
        merge(models, X[:2], match="weight", heads="head", progress=False)
    with pytest.raises(ArgumentError, match="overlap"):
        merge(models, X[:2], match="weight", preserve=3, heads=2, progress=False)
    with pytest.raises(ArgumentError, match="output must be 'list', 'cat' or 'mean'"):
        DuplicateHeads(1, output="sum")  # type: ignore[arg-type]
    wide = [network(lambda h=h: chain(3, h), X, seed=h) for h in (5, 8)]
    with pytest.raises(ArchitectureError, match="in front of the heads"):
        trace(wide, X[:2], heads=1)


def test_no_heads_change_nothing() -> None:
    program = trace(edges(chain, X), X[:2])
    assert DuplicateHeads(0)(program) is program
    result = compile(program, passes=[Align("weight"), DuplicateHeads(1), Interpolate()])
    assert np.allclose([y.shape[1] for y in result.module(X)], 3)


def _tasks() -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Networks of 3 and of 5 classes, and labels of each that it finds right for all samples but its first two."""
    models = [network(lambda c=c: lively(c), X, seed=c) for c in (3, 5)]
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for model in models:
        with torch.no_grad():
            model.fc.bias -= model(X).mean(0)
        labels = model(X).argmax(1)
        assert len(labels.unique()) > 1
        labels[:2] = (labels[:2] + 1) % 3
        parts.append(list(zip(X.split(10), labels.split(10))))
    return models, parts[0], parts[1]


def test_networks_with_other_classes_are_compared_by_task() -> None:
    models, first, second = _tasks()
    grid = {"heads": [1, "fc", 0], "solve": [None], "match": [None]}
    asked = {"grid": grid, "latency": False, "progress": False}
    found = vfx.compare(models, X[:2], data=X, evaluate=tasks(first, second), normalize=None, weights=0.0, **asked)
    assert (found.target, found.samples) == ("labels", 48)
    edge, other, together, kept, named, none = found
    assert edge.accuracy == other.accuracy == together.accuracy == 22 / 24
    assert together.each == (22 / 24, 22 / 24)
    sizes = [sum(x.numel() for x in model.parameters()) for model in models]
    assert other.params == pytest.approx(sizes[1] / sizes[0], rel=1e-12)
    alone = vfx.profile(models[1], X[:2]).ratio(vfx.profile(models[0], X[:2]))
    assert (other.params, other.flops) == (alone["params"], alone["flops"])
    assert kept.each[0] == 22 / 24  # all weight lies on the first edge, whose head reads its own features
    assert kept.each[1] == pytest.approx(
        sum(int((merge(models, X[:2], heads=1, weights=0.0, match=None, normalize=None, solve=None, progress=False)
                 .module(x)[1].argmax(1) == y).sum()) for x, y in second) / 24
    )  # fmt: skip
    assert (named.accuracy, named.each) == (kept.accuracy, kept.each)
    assert none.accuracy is None
    assert "heads" in none.error
    joined = vfx.compare(
        models, X[:2], evaluate=tasks(first, second), normalize=None, weights=0.0, head_output="cat", **asked
    )
    assert joined.points[3].each == kept.each
    assert "| edge 1 | 91.67" in found.to_markdown()
    assert "| all edges | 91.67 (91.67 / 91.67) |" in found.to_markdown()


def test_labels_of_other_classes_are_not_guessed() -> None:
    """Labels that say not whose classes they are leave the edges' own decisions; the control has other weights."""
    models, first, _ = _tasks()
    asked = {"grid": {"heads": [1], "match": [None]}, "normalize": None, "solve": None, "latency": False}
    found = vfx.compare(models, X[:2], evaluate=first, weights=0.0, progress=False, **asked)
    assert found.target == "edges"
    assert "vfx.data.tasks" in found.note
    assert found.note in found.to_markdown()
    assert found.points[3].each[0] == 1.0
    assert found.points[3].loss is None
    control = vfx.compare(models, X[:2], evaluate=first, weights=1.0, progress=False, **asked)
    assert control.points[3].each[1] == 1.0
    assert control.points[3].each[0] < 1.0
    wrong = tasks(first, [(x, torch.full_like(y, 7)) for x, y in first])
    with pytest.raises(DataError, match="none of the 5 classes"):
        vfx.compare(models, X[:2], evaluate=wrong, progress=False, **asked)
    with pytest.raises(DataError, match="task 0"):
        list(tasks([X], [X]))


@pytest.mark.parametrize("match", ["c2m3", "iterated", "ste", "learned"])
def test_matchings_that_read_whole_means_refuse_heads_of_other_classes(match: str) -> None:
    x = images(8, 8)
    models = [network(chain, x, seed=0), network(lambda: chain(4), x, seed=1)]
    with pytest.raises(ArgumentError, match=r"shape \(3, 5\) in edge 0 and \(4, 5\) in edge 1.*'zipit'"):
        merge(models, x, data=x, match=match, heads=1, progress=False)
    same = edges(chain, x)
    assert len(merge(same, x, data=x, match=match, heads=1, progress=False)(x)) == 2
