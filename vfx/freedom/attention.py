"""The pairs of layers that meet inside attention: queries and keys, values and the output projection.

Scores depend on q·k alone: with q → T q and k → T⁻ᵀ k they stay, for any invertible T of each head; what a head adds to
the output depends on W_O W_V alone. From each product of two activations the operands are followed back to the layers
that write them, through views and constant factors only: rotary embeddings, q/k norms and feature maps stop the walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from vfx.analyse.rules import HARMLESS
from vfx.analyse.symmetry import Group, Index, Member, Symmetry
from vfx.freedom.names import CUTS, MOVED
from vfx.match.maps import places
from vfx.operators import arguments, is_layer, layer_arguments, operator, weight_name

ATTENTION = "aten.scaled_dot_product_attention"
PRODUCTS = {"aten.matmul", "aten.bmm", "aten.baddbmm"}
PARTS = {"getitem", "aten.select", "aten.slice", "aten.narrow"}


class Refused(Exception):
    """Why a pair admits no invertible map."""


@dataclass(frozen=True)
class Side:
    """A tensor's axis ``dim`` with the rows of one side of a pair: ``rows`` (heads, size, copies).

    With grouped queries several heads share keys and values, and a map of those is one for all their copies.
    """

    fqn: str
    dim: int
    rows: Index


@dataclass(frozen=True)
class Pair:
    """Two sides that meet along one inner axis: for each, its weight and, where it writes, its bias."""

    first: tuple[Side, ...]
    second: tuple[Side, ...]


def attention_pairs(symmetry: Symmetry) -> tuple[list[Pair], list[str]]:
    """Every pair that may be mapped, and why others may not."""
    found: list[Pair] = []
    notes: list[str] = []
    for node in symmetry.program.graph.nodes:
        for kind, find in (("queries and keys", _scores), ("values and output", _values)):
            if operator(node) == ATTENTION or operator(node) in PRODUCTS:
                try:
                    found += find(symmetry, node)
                except Refused as reason:
                    notes.append(f"{kind} of {node.name} left as they are: {reason}")
    return found, notes


def _scores(symmetry: Symmetry, node: fx.Node) -> Iterator[Pair]:
    """q and k of an attention call or of a product."""
    if operator(node) == ATTENTION:
        q, k = (_back(arguments(node)[name], node) for name in ("query", "key"))
    else:
        walks = [_attempt(x, node) for x in _operands(node)]
        if len(walks) != 2 or None in walks:
            return
        q, k = walks  # type: ignore[assignment]
    path = {*q, *k} | (set(_back(arguments(node)["value"], node)) if _shared(node, q[-1]) else set())
    _alone(path, node)
    layers = q[-1], k[-1]
    group = _group(symmetry, {_weight(layer) for layer in layers}, set(), layers)
    if layers[0] is layers[1]:
        sides = [tuple(_part(symmetry, group, name, part) for name in _own(layers[0])) for part in (0, 1)]
    else:
        sides = [tuple(_side(symmetry, group, name, "out") for name in _own(layer)) for layer in layers]
    yield Pair(*(tuple(s for s in side if s is not None) for side in sides))


def _values(symmetry: Symmetry, node: fx.Node) -> Iterator[Pair]:
    """v and the layer that reads the heads."""
    if operator(node) == ATTENTION:
        walks = [_back(arguments(node)["value"], node)]
    else:
        walks = [walk for walk in (_attempt(x, node) for x in _operands(node)) if walk is not None]
    if len(walks) != 1:
        return
    reader = _forward(node)
    if isinstance(reader, str):
        if operator(node) == ATTENTION:
            raise Refused(reader)
        return
    writer = walks[0][-1]
    group = _group(symmetry, {_weight(writer)}, {_weight(reader)}, (writer, reader), node)
    operands = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, fx.Node)]
    shared = {n for x in operands for n in _attempt(x, node) or () if n not in walks[0]}
    _alone({*walks[0], *shared}, node)
    first = tuple(_side(symmetry, group, name, "out") for name in _own(writer))
    second = _side(symmetry, group, _weight(reader), "in")
    assert second is not None
    yield Pair(tuple(s for s in first if s is not None), (second,))


# walks --------------------------------------------------------------------------------------------------------------


def _operands(node: fx.Node) -> list[fx.Node]:
    a = arguments(node)
    return [a.get("batch1", a.get("self")), a.get("batch2", a.get("mat2", a.get("other")))]  # type: ignore[list-item]


def _attempt(value: fx.Node, end: fx.Node) -> list[fx.Node] | None:
    try:
        return _back(value, end)
    except Refused:
        return None


def _back(value: Any, end: fx.Node) -> list[fx.Node]:
    """The values from an operand back to the layer that writes it, which comes last."""
    path = [value]
    while not is_layer(path[-1]):
        node = path[-1]
        name = operator(node)
        if not (name in MOVED or name in CUTS or name == "getitem" or _scaled(node)):
            raise Refused(f"{node.name} ({name or node.op}) stands before {end.name}")
        path.append(node.args[0])  # type: ignore[arg-type]
    return path


def _scaled(node: fx.Node) -> bool:
    """Whether a node multiplies by a constant."""
    return operator(node) in ("aten.mul", "aten.div") and isinstance(node.args[1], (int, float))


def _forward(node: fx.Node) -> fx.Node | str:
    """The layer that reads a product through views alone, or what else does."""
    while True:
        users = [user for user in node.users if operator(user) not in HARMLESS]
        if len(users) != 1:
            return f"{node.name} has {len(users)} readers"
        user = users[0]
        if is_layer(user):
            data = layer_arguments(user)["input"]
            return user if data is node else f"{user.name} reads it as a weight"
        if not (operator(user) in MOVED or _scaled(user)) or user.args[0] is not node:
            return f"{user.name} ({operator(user) or user.op}) reads it"
        node = user


def _shared(node: fx.Node, layer: fx.Node) -> bool:
    """Whether the values come from the same layer as the queries (packed qkv)."""
    walk = _attempt(arguments(node)["value"], node) if operator(node) == ATTENTION else None
    return walk is not None and walk[-1] is layer


def _alone(path: set[fx.Node], end: fx.Node) -> None:
    """Nobody beside the attention call reads the values on the way to it."""
    for value in path:
        for user in value.users:
            known = user in path or user is end or operator(user) in HARMLESS
            if not known and not _other_part(value, user, path):
                raise Refused(f"{user.name} ({operator(user) or user.op}) reads {value.name} too")


def _other_part(value: fx.Node, user: fx.Node, path: set[fx.Node]) -> bool:
    """Whether a reader takes another part of a packed layer than those on the way."""
    cuts = [other for other in value.users if other in path]
    alike = [other for other in cuts if operator(other) == operator(user)]
    return operator(user) in PARTS and len(alike) == len(cuts) > 0 and all(user.args[1:] != x.args[1:] for x in alike)


# members ------------------------------------------------------------------------------------------------------------


def _weight(layer: fx.Node) -> str:
    name = weight_name(layer)
    if name is None:
        raise Refused(f"the weight of {layer.name} is computed")
    return name


def _own(layer: fx.Node) -> list[str]:
    """A layer's weight, and its bias if it has one."""
    bias = weight_name(layer, "bias")
    return [_weight(layer), *([bias] if bias is not None else [])]


def _group(
    symmetry: Symmetry, written: set[str], read: set[str], layers: tuple[fx.Node, ...], end: fx.Node | None = None
) -> Group:
    """The innermost group that exactly these layers write and read, and that stands on the last axis of ``end``."""
    known = {name for layer in layers for name in _own(layer)}
    fits = [
        g for g in symmetry.groups if _fits(g, written, read) and not any(o.parent == g.index for o in symmetry.groups)
    ]
    if end is not None:
        inner = symmetry.positions(end, len(end.meta["val"].shape) - 1)
        fits = [g for g in fits if g.index in inner]
    if len(fits) != 1:
        raise Refused(
            f"no channels of {', '.join(sorted(written | read))} are free to be mapped (rotary or normalised?)"
        )
    strangers = [m.fqn for m in fits[0].members if m.fqn not in known]
    if strangers:
        raise Refused(f"{strangers[0]} acts on them too")
    return fits[0]


def _fits(group: Group, written: set[str], read: set[str]) -> bool:
    out = {m.fqn for m in group.members if m.role == "out"}
    into = {m.fqn for m in group.members if m.role == "in"}
    return written <= out and into == read and len(out & into) == 0


def _side(symmetry: Symmetry, group: Group, fqn: str, role: str) -> Side | None:
    """One side's rows in a tensor; None where a bias has no part in the group."""
    found: list[Member] = [m for m in group.members if m.fqn == fqn and m.role == role]
    if not found:
        return None
    table = places(symmetry, dict(symmetry.axes_of(fqn))[found[0].dim], group)
    if len(found) != 1 or table is None:
        raise Refused(f"{fqn} does not hold whole heads")
    return Side(fqn, found[0].dim, table)


def _part(symmetry: Symmetry, group: Group, fqn: str, part: int) -> Side | None:
    """The queries (0) or keys (1) of a packed layer."""
    side = _side(symmetry, group, fqn, "out")
    if side is not None and side.rows.shape[2] != 2:
        raise Refused(f"{fqn} holds {side.rows.shape[2]} parts of the heads, not queries and keys alone")
    return None if side is None else Side(fqn, side.dim, side.rows[:, :, part : part + 1])
