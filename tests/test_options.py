"""Keywords of the public calls: one source, from which signatures, command line and recipes follow."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from vfx import api, cli
from vfx.cli.keywords import KINDS, spoken, values, with_keywords
from vfx.errors import ArgumentError
from vfx.options import (
    MergeOptions,
    PruneOptions,
    RepairOptions,
    StructuredOptions,
    Text,
    TransferOptions,
    keyword,
    keywords,
)

CALLS: dict[str, type] = {
    "merge": MergeOptions,
    "prune": PruneOptions,
    "prune_structured": StructuredOptions,
    "repair": RepairOptions,
    "transfer": TransferOptions,
}


def _signature(function: Any) -> dict[str, Any]:
    """The keywords of a call with their defaults; data, which repair cannot do without, has none."""
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    return {p.name: None if p.default is empty else p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_has_the_keywords_of_its_options(name: str) -> None:
    assert _signature(getattr(api, name)) == {one.name: one.default for one in keywords(CALLS[name]).values()}


def test_a_keyword_that_one_side_lacks_is_noticed() -> None:
    """The control."""

    @dataclass(frozen=True, kw_only=True)
    class More(MergeOptions):
        more: int = keyword(3)

    assert _signature(api.merge) != {one.name: one.default for one in keywords(More).values()}


@pytest.mark.parametrize("name", CALLS)
def test_the_command_has_an_option_for_each_keyword(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name.replace("_", "-")]  # type: ignore[attr-defined]
    options = {one.name: one for one in command.params}
    for keyword_name, (one, text) in spoken(CALLS[name]).items():
        option = options[keyword_name]
        assert option.help, keyword_name
        assert option.default == KINDS[text.kind].default(one.default), keyword_name
        assert set(text.flags) <= set(option.opts), keyword_name


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_said_is_the_default(name: str) -> None:
    known = spoken(CALLS[name])
    given = {one.name: KINDS[text.kind].default(one.default) for one, text in known.values()}
    for found, value in values(CALLS[name], given).items():
        assert value == known[found][0].default or (value, known[found][0].default) == ("none", None), found


def test_a_name_that_no_catalogue_holds_is_refused_before_the_command_runs() -> None:
    ran = []

    @with_keywords(MergeOptions)
    def command(given: dict[str, Any]) -> None:
        ran.append(given["match"])

    given = {one.name: KINDS[text.kind].default(one.default) for one, text in spoken(MergeOptions).values()}
    command(**given | {"match": "weight"})
    with pytest.raises(ArgumentError, match=r"--match 'wieght' is unknown; choose one of auto, none, weight"):
        command(**given | {"match": "wieght"})
    assert ran == ["weight"]


def test_every_keyword_that_is_written_says_what_it_is() -> None:
    assert all(len(spoken(options)) > 5 for options in CALLS.values())
    for options in CALLS.values():
        for one, text in spoken(options).values():
            assert isinstance(text, Text)
            assert one.help or text.names or text.catalogue, one.name


def test_the_page_of_the_interface_names_every_keyword_of_merge() -> None:
    page = Path(api.__file__).with_name("README.md").read_text(encoding="utf-8")
    table = page[page.index("## Options of `vfx.merge`") : page.index("## Limits")]
    rows = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    known = keywords(MergeOptions)
    assert rows <= set(known)
    assert set(known) - rows == {"data", "max_samples", "verify", "seed", "progress", "device"}
