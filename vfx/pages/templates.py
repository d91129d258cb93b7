"""Templates of pages, filled: the files ``*.jinja`` beside this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vfx.terminal import percent, shown


def filled(template: str, view: Mapping[str, Any]) -> str:
    """A template with the values of a view in it, which HTML escapes; a value that is missing raises."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": _count, "percent": percent, "setting": setting, "shown": shown}
    return environment.get_template(template).render(view)


def setting(value: Any) -> str:
    """An option's value as a reader writes it."""
    if value in (None, "none", [], {}):
        return "none"
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
