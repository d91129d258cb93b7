"""JSON to the records of torch's export schema, each value of exactly the type that the schema names.

torch's own reader takes values as they come. Here every record is built anew from checked parts, so that nothing which
the schema does not know reaches torch, and ``rules`` say what a record may hold beyond its types.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from vfx.errors import CheckpointError

Rules = Mapping[type, Callable[[Any], Any]]
_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_LARGEST = 1 << 63


def read_record(kind: type, text: bytes, rules: Rules) -> Any:
    """The record of class ``kind`` that a JSON text holds; ``rules`` check or rewrite records of their class.

    Raises CheckpointError, and ValueError if the text is no JSON.
    """
    return _build(kind, json.loads(text.decode("utf-8"), parse_constant=_no_number), rules, kind.__name__)


def _build(kind: Any, value: Any, rules: Rules, where: str) -> Any:
    kind, arguments = _plain(kind)
    if kind is types.NoneType:
        return None if value is None else _refuse(value, "null", where)
    if kind is types.UnionType:
        return None if value is None else _build(arguments[0], value, rules, where)
    if kind is list:
        items = value if isinstance(value, list) else _refuse(value, "a list", where)
        return [_build(arguments[0], item, rules, where) for item in items]
    if kind is dict:
        return {key: _build(arguments[1], item, rules, where) for key, item in _object(value, where).items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        record = _chosen(kind, value, rules) if issubclass(kind, _Union) else _record(kind, value, rules)
        return rules[kind](record) if kind in rules else record
    return _scalar(kind, value, where)


def _record(kind: Any, value: Any, rules: Rules) -> Any:
    hints, given = _hints(kind), _object(value, kind.__name__)
    required = {field.name for field in dataclasses.fields(kind) if _required(field)}
    if missing := sorted(required - set(given)):
        raise CheckpointError(f"a {kind.__name__} lacks {', '.join(missing)}")
    fields = {name: _build(hints[name], item, rules, f"{kind.__name__}.{name}") for name, item in given.items()
              if name in hints}  # fmt: skip
    return kind(**fields)


def _chosen(kind: Any, value: Any, rules: Rules) -> Any:
    given = _object(value, kind.__name__)
    name = next(iter(given), None)
    if len(given) != 1 or name not in _hints(kind):
        raise CheckpointError(f"a {kind.__name__} is none of {', '.join(_hints(kind))}: {str(given)[:80]}")
    return kind.create(**{name: _build(_hints(kind)[name], given[name], rules, f"{kind.__name__}.{name}")})


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        value = _FLOATS.get(value, value) if isinstance(value, str) else value
        return float(value) if type(value) in (int, float) else _refuse(value, "a number", where)
    if issubclass(kind, IntEnum):
        return kind(value) if type(value) is int and value in _numbers(kind) else _refuse(value, kind.__name__, where)
    if type(value) is not kind or (kind is int and not -_LARGEST <= value < _LARGEST):
        return _refuse(value, kind.__name__, where)
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: hint for name, hint in typing.get_type_hints(kind, vars(schema)).items() if name in names}


@functools.cache
def _numbers(kind: type[IntEnum]) -> frozenset[int]:
    return frozenset(int(member) for member in kind)


def _plain(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """The class behind an annotation, and its type arguments."""
    if isinstance(kind, (str, typing.ForwardRef)):
        kind = getattr(schema, kind if isinstance(kind, str) else kind.__forward_arg__)
    origin = typing.get_origin(kind)
    return (types.UnionType if origin is typing.Union else origin or kind), typing.get_args(kind)


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _object(value: Any, where: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse(value, "an object", where)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _refuse(value: Any, expected: str, where: str) -> Any:
    raise CheckpointError(f"{where} is {str(value)[:80]!r}, not {expected}")
