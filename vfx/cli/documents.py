"""A recipe's text: TOML or YAML by the file's ending, read into one and the same document.

YAML is read as its version 1.2 says (the core schema), so that both give the same values: ``no``, ``2024-01-01`` and
``010`` are texts, ``1e-5`` is a number, keys are texts as they are written, a key stands once. ``null`` is "none".
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vfx.errors import ArgumentError


def read_document(path: Path) -> dict[str, Any]:
    """The tables, lists, texts, numbers and truth values in a ``.toml``, ``.yaml`` or ``.yml`` file.

    Raises ArgumentError, which names the file, and the line where the text itself is wrong.

    >>> read_document(Path("recipe.yaml"))  # doctest: +SKIP
    """
    kind, parse = _PARSERS.get(path.suffix.lower(), ("", None))
    if parse is None:
        raise ArgumentError(f"{path}: a recipe is TOML or YAML, in a file that ends in {', '.join(_PARSERS)}")
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is no {kind}: {error}") from error
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is no {kind}: {_said(error)}") from error
    if not isinstance(document, dict):
        raise ArgumentError(f"{path} holds {_word(document)}, not keys and their values")
    return {name: _plain(value, f"{path}: {name}") for name, value in document.items()}


def _plain(value: Any, place: str) -> Any:
    """A value as recipes hold them; ``place`` is where it stands. Raises ArgumentError."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return {name: _plain(item, f"{place}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, (str, bool, int, float)) or (isinstance(value, float) and math.isnan(value)):
        raise ArgumentError(
            f"{place} is {_word(value)}; a recipe holds texts, numbers, true, false, lists and tables of these"
        )
    return value


def _word(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__} ({str(value)[:40]})"


class _Core(yaml.SafeLoader):
    """YAML 1.2's core schema, where PyYAML reads 1.1; nothing but plain values is made."""

    yaml_implicit_resolvers: Mapping[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Keys as they are written, each once."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "a table is expected", node.start_mark)
        table: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
            if key.value in table:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            table[key.value] = self.construct_object(value, deep=True)
        return table


for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _starts)


def _said(error: yaml.YAMLError) -> str:
    """What is wrong and in which line, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = problem or str(error).splitlines()[0]
    return text if mark is None else f"{text} (at line {mark.line + 1}, column {mark.column + 1})"


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Core)  # a SafeLoader


_PARSERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    ".toml": ("TOML", tomllib.loads),
    ".yaml": ("YAML", _yaml),
    ".yml": ("YAML", _yaml),
}
