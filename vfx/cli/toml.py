"""TOML for recipes: the standard library reads it, and this writes what a recipe holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def toml_of(document: Mapping[str, Any]) -> str:
    """A document of numbers, texts, truth values, lists and tables; its tables stand behind all else.

    None, which TOML has not, is written as "none". Raises TypeError for other values.
    """
    plain = [f"{_key(key)} = {_value(x)}\n" for key, x in document.items() if not isinstance(x, Mapping)]
    tables = [(key, x) for key, x in document.items() if isinstance(x, Mapping)]
    parts = [
        f"\n[{_key(key)}]\n" + "".join(f"{_key(k)} = {_value(x)}\n" for k, x in table.items()) for key, table in tables
    ]
    return "".join([*plain, *parts])


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _text(text)


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(key))} = {_value(x)}" for key, x in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"a recipe holds no {type(value).__name__}")


def _text(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, but for the one of U+007F."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
