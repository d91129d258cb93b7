"""Labels that cannot be used: refused where they are the measure, and else named in a note."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vfx.api import compare, merge, prune, prune_structured, repair
from vfx.diagnosis.barrier import barrier
from vfx.diagnosis.evaluation import evaluate
from vfx.diagnosis.select import select
from vfx.errors import DataError
from vfx.match.straight_through import StraightThrough

COUNT, CLASSES = 32, 3
X = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0))
GOOD = torch.arange(COUNT) % CLASSES


def _with(position: int, label: int) -> Tensor:
    return GOOD.index_fill(0, torch.tensor([position]), label)


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()


MODELS = [_model(0), _model(1)]
CHOOSING: dict[str, Callable[[Any], Any]] = {
    "merge": lambda data: merge(MODELS, X[:2], data=data, match="activation", progress=False),
    "merge, normalization alone": lambda data: merge(MODELS, X[:2], data=data, solve=None, progress=False),
    "prune": lambda data: prune(MODELS[0], X[:2], sparsity=0.5, data=data, progress=False),
    "prune_structured": lambda data: prune_structured(MODELS[0], X[:2], sparsity=0.5, data=data, progress=False),
    "repair": lambda data: repair(MODELS[0], MODELS[1:], X[:2], data=data, progress=False),
}


def _label_notes(result: Any) -> list[str]:
    return [note for note in result.report.notes if "label" in note]


@pytest.mark.parametrize("position", range(4))
def test_one_label_that_is_no_class_is_noted_wherever_it_stands(position: int) -> None:
    (note,) = _label_notes(CHOOSING["merge"]([(X, _with(position, 7))]))
    assert "labels are none of the 3 classes 0 to 2, such as 7" in note


@pytest.mark.parametrize("name", CHOOSING)
def test_every_choice_notes_labels_that_it_cannot_use(name: str) -> None:
    (note,) = _label_notes(CHOOSING[name]([(X, GOOD + 1)]))
    assert "labels of the data were not used to choose" in note
    assert "such as 3" in note
    assert not _label_notes(CHOOSING[name]([(X, GOOD)]))
    assert not _label_notes(CHOOSING[name]([X]))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (_with(3, -1), "such as -1"),
        (_with(3, -100), "-100, which stands for none"),
        (GOOD[:, None].repeat(1, 2), r"their shape is \(\d+, 2\); the outputs take one class for each of \(\d+,\)"),
    ],
    ids=["negative", "padding", "shape"],
)  # fmt: skip
def test_the_note_says_what_is_wrong(labels: Tensor, reason: str) -> None:
    (note,) = _label_notes(CHOOSING["merge"]([(X, labels)]))
    assert re.search(reason, note)


UNREAD = {
    "float": (GOOD.double(), r"they are torch.float64; classes are integers"),
    "nan": (torch.full((COUNT,), float("nan")), r"they are torch.float32, 32 of them NaN"),
    "length": (GOOD[:7], r"their shape is \(7,\), for a batch of 32 samples"),
    "names": ([str(x) for x in GOOD.tolist()], r"they are a list of 32, not 32 integers"),
}


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("kind", UNREAD)
def test_what_is_no_label_is_noted(name: str, kind: str) -> None:
    labels, reason = UNREAD[kind]
    (note,) = _label_notes(CHOOSING[name]([(X, labels)]))
    assert re.search(f"labels of the data were not used to choose: {reason}", note)


def test_measures_note_what_is_no_label() -> None:
    for labels, reason in UNREAD.values():
        found = evaluate(MODELS, X[:2], data=[(X, labels)], progress=False, latency=False)
        assert re.search(f"labels of the data were not used: {reason}", found.notes[0])
        ste = StraightThrough(epochs=1)
        merged = merge(MODELS, X[:2], data=[(X, labels)], match=ste, solve=None, normalize=None, progress=False)
        assert any(re.search(f"labels of the data were not used: {reason}", note) for note in merged.report.notes)
    assert not evaluate(MODELS, X[:2], data=[(X, GOOD)], progress=False, latency=False).notes


MEASURING: dict[str, Callable[[Any], Any]] = {
    "compare": lambda data: compare(MODELS, X[:2], data=data, grid={"match": [None]}, progress=False),
    "barrier": lambda data: barrier(MODELS, X[:2], data=data, points=3, normalize=[None], progress=False),
    "select": lambda data: select(data, 4, "hard", models=MODELS, progress=False),
    "ste": lambda data: merge(MODELS, X[:2], data=data, match=StraightThrough(epochs=1), solve=None, progress=False),
    "fisher": lambda data: prune(MODELS[0], X[:2], sparsity=0.5, score="fisher", data=data, progress=False),
    "woodfisher": lambda data: prune(MODELS[0], X[:2], sparsity=0.5, score="woodfisher", data=data, progress=False),
}


@pytest.mark.parametrize("name", MEASURING)
def test_labels_that_are_the_measure_must_be_classes(name: str) -> None:
    with pytest.raises(DataError, match="1 of 32 labels are none of the 3 classes 0 to 2, such as 7"):
        MEASURING[name]([(X, _with(5, 7))])
    MEASURING[name]([(X, GOOD)])


@pytest.mark.parametrize("name", ["compare", "barrier"])
def test_measures_refuse_labels_of_another_shape(name: str) -> None:
    with pytest.raises(
        DataError, match=r"batch 0 .*has labels of shape \(32, 3\); the outputs take one class for each"
    ):
        MEASURING[name]([(X, nn.functional.one_hot(GOOD, CLASSES))])


def test_samples_without_a_label_do_not_count_in_a_comparison() -> None:
    decided = MODELS[0](X).argmax(1)
    half = torch.where(torch.arange(COUNT) < COUNT // 2, decided, -100)
    (dense,) = compare(MODELS[0], X[:2], data=[(X, half)], grid={"sparsity": [0.5]}, progress=False).points[:1]
    assert dense.accuracy == 1.0
