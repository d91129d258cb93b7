"""A recipe: one merge or pruning written down, with every option of ``vfx.merge``, ``prune`` or ``prune_structured``.

    action = "merge"
    model = "vfx:vgg16?width=0.25&in_channels=1"
    weights = ["a.safetensors", "b.safetensors"]
    input = ["1x32x32"]
    data = "digits"
    evaluate = "digits"

    [options]
    budget = {params = 1.2}

The same in YAML, with ``options`` as one more key. ``model`` is a list of names where networks of several widths are
merged, one for each of ``weights``. Paths are those of the working folder, as on the command line.
"none" stands for None. ``match``, ``combine``, ``score`` and ``normalize`` take a name, or a table of it and its
options: ``score = {name = "woodfisher", block = 500}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vfx.cli.documents import read_document
from vfx.cli.inputs import optional
from vfx.errors import ArgumentError
from vfx.names import check_known
from vfx.options import MergeOptions, PruneOptions, StructuredOptions, keywords

ACTIONS: dict[str, type] = {"merge": MergeOptions, "prune": PruneOptions, "prune_structured": StructuredOptions}


@dataclass(frozen=True)
class Recipe:
    """What a recipe holds: networks, data and ``options`` as they are written."""

    action: str
    model: str | list[str]
    weights: list[str]
    input: list[str]
    entry: str | None
    data: str | None
    evaluate: str | None
    options: dict[str, Any]

    @property
    def models(self) -> list[str]:
        """What builds the networks: one for all of ``weights``, or one for each."""
        return [self.model] if isinstance(self.model, str) else self.model

    def to_dict(self) -> dict[str, Any]:
        """The document, what is None left out."""
        return {name: value for name, value in vars(self).items() if value not in (None, []) or name == "options"}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML or YAML file. Raises ArgumentError for what it lacks, and names what it should not hold."""
    document = {name: value for name, value in read_document(path).items() if value != "none"}
    kinds: dict[str, Any] = {
        "action": str, "model": str | list, "weights": list, "input": list, "entry": str, "data": str, "evaluate": str,
        "options": dict,
    }  # fmt: skip
    for name, value in document.items():
        if name not in kinds:
            raise ArgumentError(f"{path}: a recipe has no {name!r}; it has {', '.join(kinds)}")
        if not isinstance(value, kinds[name]) or (
            isinstance(value, list) and not all(isinstance(x, str) for x in value)
        ):
            words: dict[Any, str] = {
                str: "a text", list: "a list of texts", str | list: "a text or a list of texts", dict: "a table",
            }  # fmt: skip
            raise ArgumentError(f"{path}: {name} must be {words[kinds[name]]}, got {value!r}")
    missing = next((name for name in ("action", "model", "weights") if not document.get(name)), None)
    if missing:
        raise ArgumentError(f"{path} lacks {missing!r}")
    if document["action"] not in ACTIONS:
        raise ArgumentError(f"{path}: action={document['action']!r} is unknown; choose one of {', '.join(ACTIONS)}")
    empty: dict[Any, Any] = {list: [], dict: {}}
    filled: dict[str, Any] = {name: document.get(name, empty.get(kind)) for name, kind in kinds.items()}
    return Recipe(**filled)


def resolved(recipe: Recipe, source: str) -> Recipe:
    """The recipe with every option of its action written down. Raises ArgumentError for an unknown one."""
    accepted = keywords(ACTIONS[recipe.action])
    check_known(f"{source}: options", recipe.action, recipe.options, accepted)
    outside = next((name for name in recipe.options if not accepted[name].recipe), None)
    if outside is not None:
        raise ArgumentError(
            f"{source}: options.{outside} is not an option of a recipe; data and input stand above [options]"
        )
    defaults = {
        name: list(keyword.default) if isinstance(keyword.default, tuple) else keyword.default
        for name, keyword in accepted.items()
        if keyword.recipe
    }
    return replace(recipe, options=defaults | recipe.options)


def values(recipe: Recipe, load: Callable[[list[str]], Any], read: Callable[[str], Any]) -> dict[str, Any]:
    """The options as the function takes them; ``load`` makes networks of paths, ``read`` data of their name."""
    options: dict[str, Any] = {
        name: optional(value) if isinstance(value, str) else value for name, value in recipe.options.items()
    }
    for name, make in _MADE.items():
        if isinstance(options.get(name), Mapping):
            options[name] = make(dict(options[name]))
    if options.get("references"):
        options["references"] = load(options["references"])
    if isinstance(options.get("held_out"), str):
        options["held_out"] = read(options["held_out"])
    return options


def _named(table: dict[str, Any], option: str) -> str:
    name = table.pop("name", None)
    if not isinstance(name, str):
        raise ArgumentError(f"options.{option}: a table needs the name of the method, as in {{name = …}}")
    return name


def _normalization(table: dict[str, Any]) -> Any:
    from vfx.normalize.catalogue import Normalization

    try:
        return Normalization(_named(table, "normalize"), **table)
    except TypeError as error:
        raise ArgumentError(f"options.normalize: {error}") from error


def _score(table: dict[str, Any]) -> Any:
    from vfx.pruning.scores.catalogue import score_named

    return score_named(_named(table, "score"), **table)


def _match(table: dict[str, Any]) -> Any:
    from vfx.match.catalogue import matcher_named
    from vfx.match.first_layers import FirstLayers

    name, count = _named(table, "match"), table.pop("first_layers", None)
    matcher = matcher_named(name, **table)
    return matcher if count is None else FirstLayers(matcher, count)


def _combine(table: dict[str, Any]) -> Any:
    from vfx.combine.catalogue import combiner_named

    return combiner_named(_named(table, "combine"), **table)


_MADE: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "normalize": _normalization,
    "score": _score,
    "match": _match,
    "combine": _combine,
}
