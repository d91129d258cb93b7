"""The configuration that a model keeps of its sizes (``model.config`` of Hugging Face), brought up to its layers'.

A configuration is right where the model's class, built from it, is the resized network once it holds its state dict.
Its numbers are changed one after the other, each to what the shapes became in proportion, as long as fewer shapes
differ (the class is built without memory, on the ``meta`` device); then the class is built and run. Sizes that differ
from layer to layer have no place in most configurations, nor have heads of another width than the class computes: it
stays as it was, and a note says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Shapes = Mapping[str, Sequence[int]]
Place = tuple[str, ...]  # the way to a number: its attribute, behind those of nested configurations


def has_config(module: nn.Module) -> bool:
    """Whether the model's class is built from a configuration that it keeps."""
    kind = getattr(type(module), "config_class", None)
    return isinstance(kind, type) and isinstance(getattr(module, "config", None), kind)


def fit_config(module: nn.Module, before: nn.Module, same: Callable[[nn.Module], bool]) -> bool:
    """Change the configuration of a resized model in place; False, and nothing changes, where it cannot say the sizes.

    ``before``: the model as it was; ``same``: whether a network gives the outputs of the resized one.
    """
    if not has_config(module):
        return True
    shapes = {name: tuple(parameter.shape) for name, parameter in before.named_parameters()}
    after = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    pairs = {(a, b) for name in after for a, b in zip(shapes.get(name, ()), after[name]) if a != b}
    if not pairs:
        return True
    first = _changes(type(module), module.config, after, pairs)
    for banned in (None, *(first or ())):  # half of the width may be heads of half the width, or half of the heads
        changes = _changes(type(module), module.config, after, pairs, banned) if banned else first
        if changes and _rebuilt(module, changes, same):
            put_config(module, changes)
            return True
    return False


def config_changes(before: nn.Module, after: nn.Module) -> dict[Place, Any]:
    """The numbers in which the configurations of two models of one class differ."""
    if not has_config(after):
        return {}
    new: Any = after.config
    return {place: _value(new, place) for place, value in _numbers(before.config) if value != _value(new, place)}


def _rebuilt(module: nn.Module, changes: Mapping[Place, Any], same: Callable[[nn.Module], bool]) -> bool:
    """Whether the class, built with the changes and given the state dict, is the network that the module is."""
    config = copy.deepcopy(module.config)
    for place, value in changes.items():
        _set(config, place, value)
    try:
        built = type(module)(config)
        built.load_state_dict(module.state_dict())
        return same(built.to(next(module.parameters()).dtype).eval())
    except Exception:  # the user's class raises any
        return False


def put_config(module: nn.Module, values: Mapping[Place, Any]) -> None:
    """Set numbers in the configuration, and in the copies of it that parts of the model keep."""
    if not values:
        return
    old = {place: _value(module.config, place) for place in values}
    parts = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    for config in parts.values():
        for place, value in values.items():
            if _value(config, place) == old[place]:
                _set(config, place, value)


def _changes(
    kind: type[nn.Module], config: Any, after: Shapes, pairs: set[tuple[int, int]], banned: Place | None = None
) -> dict[Place, Any] | None:
    """The numbers with which the class has the shapes, ``banned`` left as it is; None if there are none."""
    trial, changes = copy.deepcopy(config), dict[Place, Any]()
    left = _misfits(kind, trial, after)
    while left:
        options = list(_options(trial, pairs, {*changes, banned}))
        counts = [_misfits(kind, _with(trial, place, value), after) for place, value in options]
        if not counts or min(counts) >= left:
            return None
        left, (place, value) = min(counts), options[counts.index(min(counts))]
        trial, changes = _with(trial, place, value), {**changes, place: value}
    return changes


def _misfits(kind: type[nn.Module], config: Any, after: Shapes) -> int:
    """How many parameters of the class, built from a configuration, have other shapes."""
    try:
        with torch.device("meta"):
            built = kind(copy.deepcopy(config))
    except Exception:  # numbers that do not go together: the class raises what it likes
        return len(after) + 1
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    return sum(shapes.get(name) != shape for name, shape in after.items()) + len(shapes.keys() - after.keys())


def _options(config: Any, pairs: set[tuple[int, int]], changed: set[Place | None]) -> Iterator[tuple[Place, int]]:
    """Numbers of the configuration, each with what it may have become."""
    for place, value in _numbers(config):
        if place in changed:
            continue
        if value is None:  # computed by the class as long as nobody says it
            yield from ((place, new) for new in sorted({new for _, new in pairs}))
        else:
            grown = {value * new // old for old, new in pairs if value * new % old == 0}
            yield from ((place, new) for new in sorted(grown - {0, value}))


def _numbers(config: Any, place: Place = ()) -> Iterator[tuple[Place, int | None]]:
    """Whole numbers above 1, and attributes that hold nothing but may be sizes, also of nested configurations."""
    for name, value in sorted(vars(config).items()):
        if callable(getattr(value, "to_dict", None)):
            yield from _numbers(value, (*place, name))
        elif name.startswith("_") or name.endswith(("_id", "_ids")):
            continue
        elif (type(value) is int and value > 1) or (value is None and name in _UNSAID):
            yield (*place, name), value


_UNSAID = ("n_inner", "head_dim", "d_kv", "ffn_dim", "intermediate_size", "num_key_value_heads")


def _with(config: Any, place: Place, value: Any) -> Any:
    changed = copy.deepcopy(config)
    _set(changed, place, value)
    return changed


def _value(config: Any, place: Place) -> Any:
    for name in place:
        config = getattr(config, name, None)
    return config


def _set(config: Any, place: Place, value: Any) -> None:
    for name in place[:-1]:
        config = getattr(config, name)
    setattr(config, place[-1], value)
