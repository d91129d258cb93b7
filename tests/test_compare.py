"""``vfx.compare`` goes on where it was stopped, reads shared statistics once, and writes its table in every form."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edges, images
from torch import nn

import vfx.api.aligning
import vfx.api.comparing
import vfx.api.sharing
from vfx.api import compare
from vfx.errors import ArgumentError
from vfx.models import vgg11

X = images(24, 32, 1)
DATA = [(X, torch.arange(24) % 10)]
GRID = {"normalize": ["repair", "rescale"], "preserve": [0, 3]}


@pytest.fixture(scope="module")
def pair() -> list[nn.Module]:
    return edges(lambda: vgg11(width=1 / 16, in_channels=1), X)


def _run(models: Any, **options: Any) -> Any:
    return compare(models, X[:2], data=DATA, grid=GRID, latency=False, progress=False, **options)


def _figures(found: Any) -> list[tuple[Any, ...]]:
    return [(p.name, p.accuracy, p.loss, p.params, p.flops) for p in found]


def _counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls: list[int] = []
    whole: Callable[..., Any] = getattr(module, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_statistics_are_collected_once_and_change_nothing(
    pair: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = _counted(monkeypatch, vfx.api.sharing, "collect")
    own = _counted(monkeypatch, vfx.api.aligning, "collect_statistics")
    together = _run(pair)
    assert (len(shared), len(own)) == (1, 0)
    monkeypatch.setattr(vfx.api.sharing.SharedStatistics, "given", lambda self, options: {})
    apart = _run(pair)
    assert len(own) == 4
    assert _figures(together) == _figures(apart)


def test_merges_that_need_their_own_statistics_get_none(pair: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _counted(monkeypatch, vfx.api.sharing, "collect")
    grid = {"match": ["weight", "zipit", None], "normalize": ["repair"]}
    found = compare(pair, X[:2], data=DATA, grid=grid, latency=False, progress=False)
    assert not shared
    assert all(point.accuracy is not None for point in found)


def test_a_stopped_comparison_goes_on(pair: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, made = tmp_path / "cells.json", []
    merge = vfx.api.comparing.merge

    @functools.wraps(merge)
    def stopping(*args: Any, **kwargs: Any) -> Any:
        made.append((kwargs["normalize"], kwargs["preserve"]))
        if len(made) == 3:
            raise KeyboardInterrupt
        return merge(*args, **kwargs)

    monkeypatch.setattr(vfx.api.comparing, "merge", stopping)
    with pytest.raises(KeyboardInterrupt):
        _run(pair, resume=file)
    assert len(json.loads(file.read_text())["cells"]) == 2
    found = _run(pair, resume=file)
    assert made == [("repair", 0), ("repair", 3), ("rescale", 0), ("rescale", 0), ("rescale", 3)]
    monkeypatch.undo()
    assert _figures(found) == _figures(_run(pair))
    assert _figures(_run(pair, resume=file)) == _figures(found)


def test_cells_of_something_else_are_refused(pair: list[nn.Module], tmp_path: Path) -> None:
    file = tmp_path / "cells.json"
    grid = {"solve": [None]}
    options: dict[str, Any] = {"grid": grid, "latency": False, "progress": False, "resume": file}
    compare(pair, X[:2], data=DATA, **options)
    for models, data, more in (
        (pair[::-1], DATA, {}),
        (pair, [(X, (torch.arange(24) + 1) % 10)], {}),
        (pair, DATA, {"match": "weight"}),
    ):
        with pytest.raises(ArgumentError, match="other networks, data, options"):
            compare(models, X[:2], data=data, **options, **more)
    file.write_text("{}")
    with pytest.raises(ArgumentError, match="no cells of a comparison"):
        compare(pair, X[:2], data=DATA, **options)


def test_the_table_in_every_form(pair: list[nn.Module]) -> None:
    found = compare(
        pair,
        X[:2],
        data=DATA,
        evaluate=DATA,
        grid={"preserve": [0, 99], "solve": [None]},
        progress=False,
        normalize=None,
    )
    shown = str(found)
    assert max(map(len, shown.splitlines())) <= 80
    assert "preserve=99" in shown
    made, failed = found.points[-2:]
    assert made.loss is not None
    assert made.seconds is not None
    assert made.seconds > 0
    assert failed.error
    lines = found.to_markdown().splitlines()
    assert lines[2].startswith("| network | % | loss |")
    assert lines[3] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert len(lines) == 4 + 5
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert [row["name"] for row in rows] == [point.name for point in found]
    assert json.loads(rows[-2]["options"]) == {"preserve": 0, "solve": None}
    assert float(rows[0]["accuracy"]) == found.points[0].accuracy


def test_losses_are_those_of_the_networks(pair: list[nn.Module]) -> None:
    found = compare(pair, X[:2], data=DATA, grid={"solve": [None]}, latency=False, progress=False)
    with torch.no_grad():
        logits = [edge(X).double() for edge in pair]
        mean = torch.stack(logits).mean(0)
    for point, scores in zip(found, [*logits, mean]):
        assert point.loss == pytest.approx(nn.functional.cross_entropy(scores, DATA[0][1]).item(), rel=1e-5)


def test_the_ensemble_is_that_of_the_mean_logits() -> None:
    """Logits (8, 6, 0) and (0, 2.5, 2): their mean decides for the second class, the mean of probabilities not."""
    x, networks = torch.zeros(4, 3), []
    for logits in ((8.0, 6.0, 0.0), (0.0, 2.5, 2.0)):
        layer = nn.Linear(3, 3)
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)
        networks.append(layer.eval())
    assert sum(layer(x).softmax(1) for layer in networks).argmax(1).unique().tolist() == [0]
    found = compare(networks, x[:2], data=x, grid={"solve": [None]}, match=None, latency=False, progress=False)
    assert [point.accuracy for point in found.points[:3]] == [0.0, 1.0, 1.0]
