"""Which entry a call has: all families in one table, looked up under any name, overload, in-place or out form."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx

from vfx.operators import (
    activations,
    attention,
    contractions,
    convolutions,
    copies,
    creation,
    elementwise,
    indexing,
    linear_algebra,
    losses,
    movement,
    normalization,
    ordering,
    recurrent,
    reductions,
    sizes,
    special,
    transforms,
    windows,
)
from vfx.operators.operator import Operator, unknown

FAMILIES = (
    elementwise,
    activations,
    copies,
    creation,
    reductions,
    windows,
    movement,
    indexing,
    ordering,
    contractions,
    convolutions,
    attention,
    recurrent,
    normalization,
    linear_algebra,
    transforms,
    losses,
    special,
    sizes,
)

REGISTRY: dict[str, Operator] = {}
_NAMED: dict[str, str] = {}  # what each name, alias or overload is called
_unknown = cache(unknown)


def enter(*entries: Operator) -> None:
    """Add entries, as for operators of one's own; one of the same name takes the other's place."""
    for entry in entries:
        REGISTRY[entry.name] = entry
        _NAMED.update(dict.fromkeys(entry.names, entry.name))
    _called.cache_clear()


def operator_of(node: fx.Node) -> Operator:
    """The entry of what a node calls; one that knows nothing where there is none, and where nothing is called.

    Aliases, overloads, in-place and out forms have the entry of the functional form (``is_in_place`` tells them apart).

    Example: ``operator_of(node).is_convolution`` for a node that calls ``aten.conv2d.default``.
    """
    return entry_of(node.target) if node.op == "call_function" else _unknown("")


def entry_of(target: Any) -> Operator:
    """The entry of a function that graphs call."""
    name, _ = _called(target)
    return REGISTRY.get(name) or _unknown(name)


def canonical(node: fx.Node) -> str:
    """The name of a call's operator in the registry: ``aten.neg`` for ``aten.negative_``, "" for no call."""
    return _called(node.target)[0] if node.op == "call_function" else ""


def is_in_place(node: fx.Node) -> bool:
    """Whether a call writes its result over its first operand, by the form that it has."""
    return node.op == "call_function" and _called(node.target)[1]


def operator(node: fx.Node) -> str:
    """What a call is named in reports: ``aten.conv2d`` for any overload of it, ``aten.relu_`` where it is in place.

    Aliases have one name: ``aten.neg`` for ``aten.negative``, ``aten.maximum`` for ``aten.max`` of two tensors. The
    function's name for what is no ATen operator, "" where nothing is called.
    """
    return written(node.target) if node.op == "call_function" else ""


def written(target: Any) -> str:
    """``operator`` of a function that graphs call."""
    name, in_place = _called(target)
    return name + "_" * in_place


@cache
def _called(target: Any) -> tuple[str, bool]:
    """The registry's name of a function, and whether it is an in-place form."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return getattr(target, "__name__", str(target)), False
    name = str(packet)
    in_place = name.endswith("_") and not name.endswith("__")
    functional = name[:-1] if in_place else name
    return _NAMED.get(str(target)) or _NAMED.get(functional, functional), in_place


for _family in FAMILIES:
    enter(*_family.OPERATORS)
