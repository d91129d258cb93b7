"""Networks of the benchmarks are trained once by their recipe; the page of the wide pairs says what was measured."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import headline, train
from benchmarks.fashion import RESULTS
from benchmarks.train import FAMILIES, Recipe
from vfx.models import accuracy

RECIPE = Recipe("vgg11", 1 / 32, 48, 1, 0.05, seed=0, batch=16)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 1, 32, 32, generator=generator), torch.arange(64) % 10
    parts = (images, labels, images[:20], labels[:20])
    monkeypatch.setattr(train, "images_of", lambda data, folder, device: parts)
    return parts


def test_another_recipe_is_another_file() -> None:
    others = {f.name: "cosine" if f.name == "schedule" else "vgg13" if f.name == "model" else 7 for f in fields(RECIPE)}
    names = {RECIPE.name, *(replace(RECIPE, **{name: value}).name for name, value in others.items())}
    assert len(names) == 1 + len(others)
    recipes = [recipe for family in FAMILIES.values() for found in family.values() for recipe in found]
    assert len({recipe.name for recipe in recipes}) == len(recipes)


def test_a_network_is_kept_with_what_made_it(data: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    percent, _ = train.train(RECIPE, tmp_path, tmp_path, "cpu")
    network = RECIPE.load(tmp_path)
    assert not network.training
    assert percent == pytest.approx(100 * accuracy(network, *data[2:]))
    assert RECIPE.percent(tmp_path) == pytest.approx(percent, abs=0.005)
    with safe_open(tmp_path / RECIPE.name, "pt") as file:
        assert Recipe(**json.loads(file.metadata()["recipe"])) == RECIPE
    before = load_file(tmp_path / RECIPE.name)
    train.train(RECIPE, tmp_path, tmp_path, "cpu")
    again = load_file(tmp_path / RECIPE.name)
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert not torch.equal(before["features.0.weight"], RECIPE.built().state_dict()["features.0.weight"])


def test_what_is_there_is_not_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(train, "ProcessPoolExecutor", started)
    with pytest.raises(AssertionError, match="trained"):
        train.trained([RECIPE], tmp_path, tmp_path)
    (tmp_path / RECIPE.name).touch()
    train.trained([RECIPE], tmp_path, tmp_path)


def test_the_page_of_wide_pairs_is_current() -> None:
    results = json.loads((RESULTS / "headline.json").read_text())
    assert set(results) == {key for name in headline.CUTS for key in headline.pairs(name)}
    assert headline.markdown(results) == (RESULTS / "headline.md").read_text()
