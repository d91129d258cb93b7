"""Curves between two edges against merging and measuring at each α by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from tests.conftest import edges
from vfx.diagnosis.curve import Curve
from vfx.errors import ArgumentError, DataError

X = torch.randn(48, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(48) % 3


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


LABELLED = list(zip(X.split(16), Y.split(16)))


@pytest.fixture(scope="module")
def pair() -> list[nn.Module]:
    return edges(build, X)


@pytest.fixture(scope="module")
def found(pair: list[nn.Module]) -> Any:
    return vfx.barrier(pair, X[:2], data=LABELLED, points=4, progress=False)


@torch.no_grad()
def measured(model: nn.Module) -> tuple[float, float]:
    outputs = model(X)
    probabilities = outputs.softmax(1).numpy()
    loss = -np.log(probabilities[np.arange(len(Y)), Y.numpy()]).mean()
    return float(np.mean(outputs.argmax(1).numpy() == Y.numpy())), float(loss)


def test_every_point_is_a_merge_at_its_alpha(found: Any, pair: list[nn.Module]) -> None:
    program = vfx.trace(pair, X[:2])
    assert [(curve.match, curve.normalize) for curve in found] == [
        (match, normalize) for match in (None, "activation") for normalize in (None, "repair", "rescale")
    ]
    for curve in found:
        assert curve.alphas == (0.0, 1 / 3, 2 / 3, 1.0)
        for alpha, accuracy, loss in zip(curve.alphas, curve.accuracy, curve.loss):
            if alpha in (0, 1):
                model: nn.Module = pair[int(alpha)]
            else:
                model = vfx.merge(
                    program, data=LABELLED, match=curve.match, normalize=curve.normalize, weights=alpha, progress=False
                ).module  # fmt: skip
            np.testing.assert_allclose((accuracy, loss), measured(model), rtol=1e-10)
    assert found.curve("activation", None).loss != found.curve(None, None).loss
    assert found.target == "labels"
    assert found.samples == 48
    with pytest.raises(ArgumentError, match="no curve"):
        found.curve("weight", None)


def test_the_barrier_is_the_largest_gap_below_the_line() -> None:
    curve = Curve(None, None, (0.0, 0.25, 0.5, 1.0), (0.9, 0.5, 0.6, 0.8), (0.3, 1.0, 2.0, 0.5))
    assert curve.accuracy_barrier == pytest.approx(0.75 * 0.9 + 0.25 * 0.8 - 0.5)
    assert curve.loss_barrier == pytest.approx(2.0 - 0.4)
    bump = Curve(None, None, (0.0, 0.5, 1.0), (0.5, 0.9, 0.5), (1.0, 0.1, 1.0))
    assert (bump.accuracy_barrier, bump.loss_barrier) == (0.0, 0.0)


@torch.no_grad()
def test_without_labels_the_ensemble_is_the_target(pair: list[nn.Module]) -> None:
    found = vfx.barrier(
        pair, X[:2], data=X, match="weight", normalize=[None], points=3, before=False, progress=False
    )  # fmt: skip
    assert found.target == "ensemble"
    target = torch.stack([model(X).softmax(1) for model in pair]).mean(0)
    merged = vfx.merge(pair, X[:2], match="weight", normalize=None, progress=False).module
    (curve,) = found
    for model, accuracy, loss in zip((pair[0], merged, pair[1]), curve.accuracy, curve.loss):
        logs = model(X).log_softmax(1)
        assert accuracy == pytest.approx(float((logs.argmax(1) == target.argmax(1)).double().mean()), rel=1e-12)
        assert loss == pytest.approx(float(-(target * logs).sum(1).mean()), rel=1e-10)


class Tagger(nn.Module):
    """Tokens to classes, (N, T) to (N, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(ids)).relu())


@torch.no_grad()
def test_labels_of_positions_leave_out_padding() -> None:
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(0, 9, (12, 5), generator=generator), torch.randint(0, 4, (12, 5), generator=generator)
    labels[:, 3:] = -1
    taggers = [Tagger().double().eval() for _ in range(2)]
    found = vfx.barrier(
        taggers, ids[:2], data=ids, evaluate=[(ids, labels)], match=None, normalize=[None], points=3, progress=False
    )
    logits = taggers[1](ids)[:, :3].log_softmax(-1)
    (curve,) = found
    assert curve.accuracy[-1] == pytest.approx(float((logits.argmax(-1) == labels[:, :3]).double().mean()))
    assert curve.loss[-1] == pytest.approx(float(-logits.gather(2, labels[:, :3, None]).mean()), rel=1e-10)


def test_statistics_are_collected_once(pair: list[nn.Module]) -> None:
    class Counting(list[Tensor]):
        passes = 0

        def __iter__(self) -> Any:
            Counting.passes += 1
            return super().__iter__()

    data, test = Counting(X.split(16)), [(X, Y)]
    vfx.barrier(
        pair, X[:2], data=data, evaluate=test, normalize=[None, "bias_calibration"], points=5, progress=False
    )  # fmt: skip
    assert Counting.passes == 1  # no method reads the merged network's statistics


def test_preserved_layers_lower_the_barrier_to_the_ensemble(pair: list[nn.Module]) -> None:
    found = vfx.barrier(
        pair, X[:2], data=LABELLED, normalize=[None], points=3, preserve=3, before=False, progress=False
    )  # fmt: skip
    with torch.no_grad():
        outputs = (pair[0](X) + pair[1](X)) / 2
    accuracy = float((outputs.argmax(1) == Y).double().mean())
    assert found.curve("activation", None).accuracy[1] == pytest.approx(accuracy)


def test_what_cannot_be_measured_is_refused(pair: list[nn.Module]) -> None:
    with pytest.raises(ArgumentError, match="two edges"):
        vfx.barrier([*pair, pair[0]], X[:2], data=X, match=None, normalize=[None])
    with pytest.raises(ArgumentError, match="at least 3"):
        vfx.barrier(pair, X[:2], data=X, points=2)
    with pytest.raises(ArgumentError, match="unknown"):
        vfx.barrier(pair, X[:2], data=X, normalize=["nonsense"])
    with pytest.raises(DataError, match="no class labels"):
        vfx.barrier(
            pair, X[:2], data=X, evaluate=[(X, Y), X], match=None, normalize=[None], points=3, progress=False
        )  # fmt: skip


def test_files_and_figure(found: Any, tmp_path: Path) -> None:
    parsed = json.loads(found.to_json(tmp_path / "barrier.json"))
    assert parsed == json.loads((tmp_path / "barrier.json").read_text())
    assert parsed["curves"][0]["accuracy_barrier"] == found.curve(None, None).accuracy_barrier
    assert "activation" in str(found)
    assert "repair" in str(found)
    figure = found.figure()
    assert len(figure.axes[0].get_lines()) == len(found.curves)
