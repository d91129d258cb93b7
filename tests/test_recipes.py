"""Recipes: every option, equal bytes when they run again, and clear words for what they should not hold."""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import vfx
from vfx import api, cli
from vfx.cli.documents import read_document
from vfx.cli.recipe import ACTIONS, Recipe, read_recipe, resolved, values
from vfx.cli.toml import toml_of
from vfx.errors import ArgumentError
from vfx.models.named import build

MODEL = "net.py:make"
NETWORK = """from torch import nn


def make(c=8):
    first = [nn.Conv2d(1, c, 3), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3), nn.BatchNorm2d(c), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(c, c, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def wide():
    return make(12)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(build("./net.py:make").state_dict(), f"{seed}.pt")
    inputs = np.random.default_rng(0).standard_normal((24, 1, 8, 8)).astype(np.float32)
    np.savez("data.npz", inputs=inputs, labels=np.arange(24) % 10)
    return tmp_path


def _recipe(name: str, **document: Any) -> Path:
    path = Path(f"{name}.toml")
    path.write_text(toml_of({"model": MODEL, "input": ["1x8x8"]} | document))
    return path


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


RECIPES: dict[str, dict[str, Any]] = {
    "merge": {
        "action": "merge", "weights": ["0.pt", "1.pt"], "data": "data.npz", "evaluate": "data.npz",
        "options": {
            "match": {"name": "activation", "first_layers": 2}, "normalize": {"name": "reset", "layers": [1, 2]},
            "references": ["2.pt"],
        },
    },
    "dare": {
        "action": "merge", "weights": ["0.pt", "1.pt"],
        "options": {"base": "2.pt", "combine": {"name": "dare", "drop": 0.5, "by": {"name": "ties", "keep": 0.3}}},
    },
    "prune": {
        "action": "prune", "weights": ["0.pt"], "data": "data.npz",
        "options": {"sparsity": {"[03]": 0.5}, "score": {"name": "woodfisher", "block": 200}, "solve": "none"},
    },
    "structured": {
        "action": "prune_structured", "weights": ["0.pt"], "data": "data.npz", "evaluate": "data.npz",
        "options": {"budget": {"params": 0.5}, "score": "activation", "normalize": "none", "solve": "none"},
    },
    "branches": {
        "action": "merge", "weights": ["0.pt", "1.pt"],
        "options": {"match": "weight", "preserve": 2, "normalize": "none"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_running_again_gives_equal_bytes_and_the_network(name: str, folder: Path) -> None:
    path = _recipe(name, **RECIPES[name])
    _run(str(path), "one")
    _run("one/recipe.toml", "two")  # the recipe as resolved is a recipe
    files = sorted(file.name for file in Path("one").iterdir())
    network = ["model.pt2"] if name == "branches" else ["check.safetensors", "model.safetensors"]
    assert files == sorted(["README.md", "config.json", *network, "recipe.toml", "report.html", "report.json"])
    for file in files:
        assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes(), file
    report = json.loads(Path("one/report.json").read_text())
    assert "seconds" not in report
    assert ("evaluation" in report) == ("evaluate" in RECIPES[name])
    again = vfx.from_pretrained("one", model=None if name == "branches" else MODEL)
    with np.load("data.npz") as held:
        outputs = again(torch.from_numpy(held["inputs"]))
    assert outputs.shape == (24, 10)
    if "evaluation" in report:
        row = report["evaluation"]["networks"][-1]
        assert row["accuracy"] == float((outputs.argmax(1) == torch.arange(24) % 10).double().mean())


def test_networks_of_two_widths_have_a_model_each(folder: Path) -> None:
    torch.save(build("./net.py:wide").state_dict(), "wide.pt")
    document = {"action": "merge", "weights": ["wide.pt", "0.pt"], "options": {"match": "weight"}}
    _run(str(_recipe("widths", **document, model=["net.py:wide", MODEL])), "one")
    _run("one/recipe.toml", "two")
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    merged = vfx.from_pretrained("one", model="net.py:wide")
    assert merged[0].weight.shape[0] == 12
    assert "net.py:wide, net.py:make" in Path("one/README.md").read_text()
    with pytest.raises(ArgumentError, match="once for each of 2 checkpoints"):
        _run(str(_recipe("three", **document, model=[MODEL] * 3)), "three")


def test_the_same_recipe_in_yaml_gives_the_same_bytes(folder: Path) -> None:
    document = {"model": MODEL, "input": ["1x8x8"]} | RECIPES["merge"]
    Path("x.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    _run(str(_recipe("x", **RECIPES["merge"])), "toml")
    _run("x.yaml", "yaml")
    files = sorted(file.name for file in Path("toml").iterdir())
    assert files == sorted(file.name for file in Path("yaml").iterdir())
    for file in files:
        assert (Path("toml") / file).read_bytes() == (Path("yaml") / file).read_bytes(), file


def test_other_weights_give_other_bytes(folder: Path) -> None:
    """The control."""
    for name, weights in (("a", ["0.pt", "1.pt"]), ("b", ["0.pt", "2.pt"])):
        _run(str(_recipe(name, action="merge", weights=weights, options={"match": "weight"})), name)
    assert Path("a/model.safetensors").read_bytes() != Path("b/model.safetensors").read_bytes()
    said = json.loads(Path("a/config.json").read_text())["provenance"]
    assert [edge["file"] for edge in said["edges"]] == ["0.pt", "1.pt"]
    assert tomllib.loads(said["recipe"])["options"]["match"] == "weight"


@pytest.mark.parametrize("action", ACTIONS)
def test_resolved_recipes_hold_every_option(action: str, folder: Path) -> None:
    whole = resolved(read_recipe(_recipe("x", action=action, weights=["0.pt"])), "x.toml")
    known = inspect.signature(getattr(api, action)).parameters
    own = {"models", "model", "example_inputs", "data", "progress", "statistics", "checkpoint"}
    assert set(whole.options) == set(known) - own
    again = read_recipe(_recipe("y", **whole.to_dict()))
    Path("y.yml").write_text(yaml.safe_dump(whole.to_dict()))
    assert read_recipe(Path("y.yml")) == again
    found = values(again, lambda paths: paths, lambda name: name)
    for name, value in found.items():
        default = known[name].default
        assert value == (list(default) if isinstance(default, tuple) else default), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "melt"}, "action='melt' is unknown; choose one of merge, prune, prune_structured"),
        ({"colour": "red"}, "a recipe has no 'colour'"),
        ({"weights": "0.pt"}, "weights must be a list of texts, got '0.pt'"),
        ({"weights": []}, "lacks 'weights'"),
        ({"options": {"mach": "weight"}}, "merge takes no 'mach', it takes match"),
        ({"options": {"data": "digits"}}, "options.data is not an option of a recipe"),
        ({"options": {"match": {"restarts": 3}}}, "a table needs the name of the method"),
        ({"options": {"match": {"name": "magic"}}}, "match='magic' is unknown"),
        ({"options": {"match": {"name": "weight", "speed": 3}}}, "'weight' takes no such options"),
        ({"options": {"normalize": {"name": "repair", "speed": 3}}}, "options.normalize: .*'speed'"),
        ({"action": "prune", "options": {"sparsity": 0.5}}, "prune takes one network, the recipe names 2"),
        ({"evaluate": "nothing"}, "no data 'nothing'"),
    ],
)
def test_what_a_recipe_should_not_hold_is_named(change: dict[str, Any], message: str, folder: Path) -> None:
    path = _recipe("x", **{"action": "merge", "weights": ["0.pt", "1.pt"]} | change)
    with pytest.raises((ArgumentError, vfx.errors.DataError), match=message):
        _run(str(path), "out")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.toml", "a = = 1", r"x\.toml is no TOML: .*line 1"),
        ("x.yaml", "a: 1\nb: [", r"x\.yaml is no YAML: .*line 2"),
        ("x.yaml", "a: 1\na: 2", r"x\.yaml is no YAML: a stands twice \(at line 2, column 1\)"),
        ("x.yaml", "? [a]\n: 2", r"a key must be a text \(at line 1"),
        ("x.yaml", "a: !!python/object:os.system {}", r"is no YAML: could not determine a constructor .*line 1"),
        ("x.yaml", "a: &b [*b]", "recursive"),
        ("x.yaml", "- merge", "holds a list"),
        ("x.yaml", "", "holds nothing, not keys"),
        (
            "x.yaml",
            "options: {seed: !!timestamp 2024-01-01}",
            r"x\.yaml: options\.seed is a date .*holds texts, numbers",
        ),
        ("x.toml", "options = {seed = [2024-01-01]}", r"x\.toml: options\.seed\[0\] is a date"),
        ("x.yaml", "action: melt\nmodel: m\nweights: [a]", "x.yaml: action='melt' is unknown; choose one of merge"),
        ("x.txt", "a = 1", r"x\.txt: a recipe is TOML or YAML, in a file that ends in \.toml, \.yaml, \.yml"),
    ],
)
def test_files_that_are_no_recipe_are_named(name: str, text: str, message: str, folder: Path) -> None:
    Path(name).write_text(text)
    with pytest.raises(ArgumentError, match=message):
        _run(name, "out")


@pytest.mark.parametrize("name", ["none.toml", "none.yaml"])
def test_a_recipe_that_is_not_there_is_named(name: str, folder: Path) -> None:
    with pytest.raises(ArgumentError, match=f"{name} cannot be read: No such file"):
        _run(name, "out")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("010", "010"),
        ("1x8x8", "1x8x8"), ("'1'", "1"), ("=", "="), ("1e-5", 1e-5), ("-3", -3), ("1_000", 1000), ("0x10", 16),
        (".5", 0.5), ("-.inf", -math.inf), ("true", True), ("null", "none"), ("~", "none"), ("", "none"),
        ("{3: [a, null]}", {"3": ["a", "none"]}),
    ],
)  # fmt: skip
def test_yaml_is_read_as_its_core_schema_says(written: str, value: Any, folder: Path) -> None:
    Path("x.yaml").write_text(f"key: {written}\n")
    assert read_document(Path("x.yaml")) == {"key": value}
    assert type(read_document(Path("x.yaml"))["key"]) is type(value)


def test_toml_is_read_as_it_was_written() -> None:
    document = {
        "text": 'a "quoted" \\ line\n\x7f é', "number": 3, "share": 1e-05, "yes": True, "list": ["a", 1, [2.5]],
        "table": {"inner": {"[03]": 0.5}, "glob.*": False, "empty": []},
    }  # fmt: skip
    assert tomllib.loads(toml_of(document)) == document
    assert tomllib.loads(toml_of({"nothing": None})) == {"nothing": "none"}
    with pytest.raises(TypeError, match="holds no object"):
        toml_of({"x": object()})


def test_what_a_recipe_says_wins_over_the_defaults() -> None:
    said = {"match": "weight", "seed": 7}
    recipe = Recipe("merge", "vfx:vgg16", ["a.pt", "b.pt"], [], None, None, None, said)
    options = resolved(recipe, "recipe.toml").options
    assert {name: options[name] for name in said} == said
    assert options["normalize"] == "auto"
