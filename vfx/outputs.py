"""Output structures: what forward returns, as the containers a graph can hold, and compared by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_KEPT = (Tensor, fx.Node, torch.SymInt, torch.SymFloat, torch.SymBool, type(None), bool, int, float, str)


def plain(value: Any, dropped: list[str] | None = None) -> Any:
    """A nested output as tuples, lists and dicts of tensors and constants.

    Dataclasses, named tuples and mappings become dicts, without their empty (None) fields. Other objects (caches) are
    dropped, from dicts with their key, from tuples and lists by None; ``dropped`` collects a note for each.
    """
    found = _plain(value, "", dropped if dropped is not None else [])
    return None if found is _DROPPED else found


def named_tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a nested output by their path in it, e.g. ``['logits']``."""
    leaves, _ = pytree.tree_flatten_with_path(plain(value))
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


_DROPPED = object()


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
    found = {key: _plain(item, f"{path}.{key}" if path else str(key), dropped) for key, item in value.items()}
    return {key: item for key, item in found.items() if item is not _DROPPED}
