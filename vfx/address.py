"""``name:where?key=value&key=value``: how the command line and recipes name models and data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vfx.errors import ArgumentError


@dataclass(frozen=True)
class Address:
    """A name, what stands behind its colon, and options whose values are read as JSON where they are that."""

    name: str
    where: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def address(text: str) -> Address:
    """Take a text such as ``vfx:vgg16_bn?width=0.25`` apart. Raises ArgumentError for an option without a value."""
    place, _, query = text.partition("?")
    name, _, where = place.partition(":")
    return Address(name, where, dict(option(part, text) for part in query.split("&") if part))


def option(text: str, owner: str) -> tuple[str, Any]:
    """``key=value`` with the value read as JSON, or as a text where it is none. Raises ArgumentError."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ArgumentError(f"{owner} {text!r} must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def check_options(function: Callable[..., Any], options: Mapping[str, Any], owner: str) -> None:
    """Raise ArgumentError for an option that ``function`` does not take as a keyword-only argument."""
    accepted = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = next((name for name in options if name not in accepted), None)
    if unknown is not None:
        raise ArgumentError(f"{owner} takes no {unknown!r}; it takes {', '.join(accepted) or 'no options'}")
