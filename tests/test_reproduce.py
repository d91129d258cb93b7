"""The papers' tables: every cell is a call that exists, cells are measured once, a verdict is arithmetic."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vfx
from benchmarks import experiments, reproduce
from benchmarks.experiments import TABLES, Claim, Table, options_of
from benchmarks.reproduce import RESULTS, SCALES, Scale, claims, measure, page, verdict
from benchmarks.train import FAMILIES, Recipe

CLAIM = Claim("keeping layers helps", ("kept", "average"), ("all merged", "average"))


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_a_call_of_merge(name: str) -> None:
    table, names = TABLES[name], {*inspect.signature(vfx.merge).parameters, "samples", "independent", "recorded"}
    for row in table.rows.values():
        for column in table.columns.values():
            assert set(options_of(row, column)) <= names
    assert table.network in FAMILIES["digits"]
    assert all(0 < row.get("samples", 1.0) <= 1 for row in table.rows.values())
    for claim in table.claims:
        for row_name, column_name in (claim.better, claim.worse):
            assert row_name in table.rows
            assert column_name in table.columns


def test_a_sweep_is_applied_to_the_rows_method() -> None:
    options = options_of({"method": "rescale"}, {"sweep": "train", "solve": None})
    assert options == {"normalize": vfx.Normalization("rescale", sweep="train"), "solve": None}


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of two narrow networks that nobody trained."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 1, 32, 32, generator=generator), torch.arange(32) % 10
    recipes = [Recipe("vgg11", 1 / 32, 32, 1, 0.05, seed, data="digits") for seed in (0, 1)]
    monkeypatch.setitem(FAMILIES, "tiny", {"vgg11": recipes})
    monkeypatch.setitem(SCALES, "tiny", Scale("tiny", 2, 16, every_default=False))
    rows: dict[str, Any] = {"all merged": {}, "kept": {"preserve": 2}}
    columns: dict[str, Any] = {"average": {"match": None, "solve": None, "normalize": None}, "default": {}}
    monkeypatch.setitem(TABLES, "tiny", Table("A tiny table", "vgg11", rows, columns, (CLAIM,)))
    monkeypatch.setattr(reproduce, "trained", lambda *_: None)
    monkeypatch.setattr(Recipe, "load", lambda recipe, folder: recipe.built().eval())
    monkeypatch.setattr(reproduce, "images_of", lambda *_: (images, labels, images, labels))
    return tmp_path / "tiny.json"


def test_a_table_is_measured_once_and_written(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure("tiny", "tiny", setting.parent, setting.parent, setting, "cpu")
    results = json.loads(setting.read_text())
    [pair] = results["tiny"].values()
    assert set(pair["cells"]) == {"all merged|average", "kept|average"}
    assert pair["cells"]["all merged|average"]["params_ratio"] == 1
    assert pair["cells"]["kept|average"]["params_ratio"] > 1
    monkeypatch.setattr(reproduce.Pair, "cell", lambda *_: pytest.fail("measured again"))
    measure("tiny", "tiny", setting.parent, setting.parent, setting, "cpu")
    del pair["cells"]["kept|average"]
    setting.write_text(json.dumps(results))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measure("tiny", "tiny", setting.parent, setting.parent, setting, "cpu")
    assert "| kept | – |" in page("tiny", results)
    assert "keeping layers helps: not measured" in page("tiny", results)


def test_goals_of_another_network_and_recorded_goals_are_handed_over(
    setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [Recipe("vgg11", 1 / 32, 32, 1, 0.05, seed, data="digits") for seed in (0, 1, 2)]
    monkeypatch.setitem(FAMILIES, "tiny", {"vgg11": recipes})
    columns: dict[str, Any] = {
        "goals of a third": {"solve": None, "normalize": "rescale", "match": None, "independent": True},
        "recorded": {"solve": None, "normalize": "rescale", "match": None, "recorded": True},
    }
    monkeypatch.setitem(TABLES, "tiny", Table("A tiny table", "vgg11", {"all merged": {}}, columns))
    given: list[dict[str, Any]] = []
    merge = vfx.merge

    def seen(*args: Any, **options: Any) -> Any:
        given.append(options)
        return merge(*args, **options)

    monkeypatch.setattr(vfx, "merge", seen)
    measure("tiny", "tiny", setting.parent, setting.parent, setting, "cpu")
    _, independent, recorded = given
    third, images = recipes[2].built().eval(), torch.randn(32, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    [network] = independent["references"]
    assert torch.equal(network(images), third(images))
    first_layer, *_ = recorded["statistics"].layers.values()
    for recipe, moments in zip(recipes, first_layer):
        output = recipe.built().features[0](images)
        torch.testing.assert_close(moments.mean.float(), output.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)


def _pairs(*values: tuple[float, float], edge: float = 95.0) -> dict[str, Any]:
    return {
        str(index): {
            "edges": [{"accuracy": 95.0}, {"accuracy": edge}],
            "cells": {"kept|average": {"accuracy": a}, "all merged|average": {"accuracy": b}},
        }
        for index, (a, b) in enumerate(values)
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([(90, 80)], "**holds** (+10.00, one pair)"),
        ([(80, 80)], "**level** (+0.00, one pair)"),
        ([(90, 80), (91, 80), (92, 80)], "**holds** (+11.00 ± 0.58)"),
        ([(80, 90), (80, 91), (80, 92)], "**fails** (-11.00 ± 0.58)"),
        ([(90, 80), (80, 90), (86, 85)], "**level** (+0.33 ± 5.78)"),
    ],
)
def test_a_claim_holds_by_twice_its_error(values: list[tuple[float, float]], expected: str) -> None:
    assert verdict(CLAIM, _pairs(*values)) == expected


def test_networks_that_have_not_learned_tell_nothing() -> None:
    assert verdict(CLAIM, _pairs((90, 80), edge=10.2)) == "not judged: an edge has 10.20 %"


@pytest.mark.parametrize("name", [file.stem for file in (RESULTS / "reproduce").glob("*.json")])
def test_pages_of_results_are_current(name: str) -> None:
    folder = RESULTS / "reproduce"
    assert page(name, json.loads((folder / f"{name}.json").read_text())) == (folder / f"{name}.md").read_text()


def test_the_list_of_claims_is_current() -> None:
    assert claims(RESULTS / "reproduce") == (RESULTS / "reproduce" / "README.md").read_text()
    assert len({table.title for table in experiments.TABLES.values()}) == len(TABLES)
