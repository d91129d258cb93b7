"""Output structures: what forward returns, as the containers a graph can hold, and compared by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vfx.errors import ArgumentError

_KEPT = (Tensor, fx.Node, torch.SymInt, torch.SymFloat, torch.SymBool, type(None), bool, int, float, str)


def plain(value: Any, dropped: list[str] | None = None) -> Any:
    """A nested output as tuples, lists and dicts of tensors and constants.

    Dataclasses, named tuples and mappings become dicts, without their empty (None) fields. Other objects (caches) are
    dropped, from dicts with their key, from tuples and lists by None; ``dropped`` collects a note for each.
    """
    plain_value = _plain(value, "", dropped if dropped is not None else [])
    return None if plain_value is _DROPPED else plain_value


def named_tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a nested output by their path in it, e.g. ``['logits']``."""
    leaves, _ = pytree.tree_flatten_with_path(plain(value))
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def spelled_tensors(value: Any) -> dict[str, Any]:
    """The tensors (or graph nodes) of a plain output by the names that messages use: ``logits``, ``states[2]``."""
    return {_spelled(path): leaf for path, leaf in _parts(value) if isinstance(leaf, (Tensor, fx.Node))}


def selected(value: Any, names: Sequence[int | str]) -> tuple[Any, list[str]]:
    """The parts of a plain output that ``names`` name, in the nesting it has, and the names of what goes.

    A name is a key or an index of the output, or a path in it, as ``named_tensors`` writes it (``['states'][2]``) or as
    messages do (``states[2]``). Whole parts (all states) may be named. Raises ArgumentError.
    """
    if not names:
        raise ArgumentError("outputs=[] leaves no output; name those that count, or leave it out for all")
    parts = [(path, part) for path, part in _parts(value) if path and _holds_tensors(part)]
    if not parts:
        raise ArgumentError(f"outputs={list(names)}: the network returns one tensor and nothing beside; leave it out")
    wanted = {_path_of(name, [path for path, _ in parts], value) for name in names}
    dropped: list[str] = []
    return _kept(value, (), wanted, dropped), dropped


_DROPPED = object()
_Path = tuple[tuple[bool, Any], ...]  # steps: whether the container is a dict, and the key or index taken of it


def _parts(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """A plain output and all that is inside it, each with its path."""
    yield path, value
    for step, item in _items_of(value):
        yield from _parts(item, (*path, step))


def _items_of(value: Any) -> list[tuple[tuple[bool, Any], Any]]:
    if isinstance(value, Mapping):
        return [((True, key), item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [((False, index), item) for index, item in enumerate(value)]
    return []


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, (Tensor, fx.Node)) for _, leaf in _parts(value))


def _spelled(path: _Path) -> str:
    first = str(path[0][1]) if path and path[0][0] else ""
    rest = path[1:] if first else path
    return first + "".join(f".{key}" if of_dict else f"[{key}]" for of_dict, key in rest)


def _path_of(name: int | str, paths: Sequence[_Path], value: Any) -> _Path:
    """The one path that a name means."""
    matches = [path for path in paths if str(name) in _names(path)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ArgumentError(f"outputs={name!r} may mean {' or '.join(map(_quoted, matches))}; write it like that")
    raise ArgumentError(
        f"outputs={name!r} is not returned by the network; it returns {', '.join(spelled_tensors(value))}"
    )


def _names(path: _Path) -> set[str]:
    return {_spelled(path), _quoted(path), *([str(path[0][1])] if len(path) == 1 else [])}


def _quoted(path: _Path) -> str:
    return "".join(f"[{key!r}]" for _, key in path)


def _kept(value: Any, path: _Path, wanted: set[_Path], dropped: list[str]) -> Any:
    """What is wanted of ``value``; ``dropped`` collects the names of the largest parts that go."""
    if path in wanted:
        return value
    if not any(chosen[: len(path)] == path for chosen in wanted):
        if _holds_tensors(value):
            dropped.append(_spelled(path))
        return _DROPPED
    items = [(step[1], _kept(item, (*path, step), wanted, dropped)) for step, item in _items_of(value)]
    items = [(key, item) for key, item in items if item is not _DROPPED]
    if isinstance(value, Mapping):
        return dict(items)
    return [item for _, item in items] if isinstance(value, list) else tuple(item for _, item in items)


def _plain(value: Any, path: str, dropped: list[str]) -> Any:
    if isinstance(value, _KEPT):
        return value
    if isinstance(value, Mapping):
        return _items(value, path, dropped)
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return _items({name: item for name, item in named.items() if item is not None}, path, dropped)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named = dict(zip(value._fields, value))
        return _items({name: item for name, item in named.items() if item is not None}, path, dropped)
    if isinstance(value, (tuple, list)):
        items = [_plain(item, f"{path}[{index}]", dropped) for index, item in enumerate(value)]
        kept = [None if item is _DROPPED else item for item in items]
        return kept if isinstance(value, list) else tuple(kept)
    dropped.append(f"output {path or '(the whole)'} is {type(value).__name__}, not a tensor: dropped")
    return _DROPPED


def _items(value: Mapping[Any, Any], path: str, dropped: list[str]) -> dict[Any, Any]:
    items = {key: _plain(item, f"{path}.{key}" if path else str(key), dropped) for key, item in value.items()}
    return {key: item for key, item in items.items() if item is not _DROPPED}
