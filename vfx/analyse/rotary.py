"""Rotary embeddings: what is left free of the inner axes of queries and keys that positions rotate.

Where queries and keys are turned by their positions before they meet (RoFormer, Su et al. 2021, §3.4.2), pairs of
channels form planes. Rotations and scalings of a plane commute with the turns: seen as complex numbers, a plane of the
queries may be multiplied by any z ≠ 0 and that of the keys by 1/z̄, one z for each plane of each head (Theus et al.
2025, §3, have it for transformers without them). No permutation is left, so such planes are no group of channels; they
are ``Symmetry.rotations``, of class ``Maps.ROTATIONS``: block-diagonal maps of 2×2 blocks [[a, −b], [b, a]].

They are found from what the operators do, whatever form the embedding is written in (halves or neighbours, one or two
dimensions, a part of the channels, keys shared by several heads): queries and keys are linear in the outputs of the
layers before them (``vfx.analyse.regions``), token by token. With L and M those maps for a head at tokens t and s, the
planes are the smallest sets of channels that Lᵀ_t M_s ties, and each must be of the form above for all t and s. A
random element must then leave all inner products as they are, in float64; and nothing else may read these channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.classes import Maps, contragredient, draw
from vfx.analyse.groups import Class, Group, Member, Side
from vfx.analyse.labelling import Labelling
from vfx.analyse.places import Index
from vfx.analyse.probes import Linear, Scores, channel_axis, probed, scores_of
from vfx.analyse.regions import call, sizes, tensors
from vfx.operators import arguments, is_layer, is_transposed, layer_arguments, operator, operator_of, output_axis

TOLERANCE = 1e-10


def rotations(labelling: Labelling) -> list[tuple[Group, Class]]:
    """The planes of every attention with rotary embeddings, as a group inside its heads and its class."""
    plane_groups: list[tuple[Group, Class]] = []
    for node in labelling.program.graph.nodes:
        scores = scores_of(node, labelling.terms)
        planes = _Planes(labelling, scores).find() if scores is not None else None
        if planes is not None:
            plane_groups.append(planes.group(len(labelling.groups) + len(plane_groups)))
    return plane_groups


@dataclass(frozen=True)
class Column:
    """Channels of one layer, two for each plane in turn: ``position`` (blocks, 2 · planes)."""

    layer: fx.Node
    position: Index
    dual: bool


class _Planes:
    """The search on one attention."""

    def __init__(self, labelling: Labelling, scores: Scores):
        self.labelling, self.scores = labelling, scores
        self.layers = tuple(dict.fromkeys((*scores.queries.layers, *scores.keys.layers)))
        self.columns: list[Column] = []

    def find(self) -> _Planes | None:
        """Planes that are proved, or None."""
        parameters = [_parameters(layer, self.labelling) for layer in self.layers]
        if any(x is None for x in parameters):
            return None
        try:
            sides = probed(self.scores, self.layers, self.tables)
        except (RuntimeError, TypeError, KeyError):  # an operator that does not run alone
            return None
        if sides is None:
            return None
        self.columns = list(_columns(*sides, self.layers, self.tables))
        return self if self.columns and self._in_one_piece() and self._alone() and self._proved() else None

    @cached_property
    def parent(self) -> Group | None:
        """The heads, if they may be permuted: the group whose blocks all layers' channels stand in."""
        names = [_parameters(layer, self.labelling) for layer in self.layers]
        for group in self.labelling.groups:
            places = {(m.fqn, m.dim) for m in group.members}
            if group.parent is None and all(x is not None and set(x) <= places | _bare(x) for x in names):
                return group
        return None

    @cached_property
    def tables(self) -> dict[fx.Node, Index]:
        """The channels of each layer (blocks, copies)."""
        position_of = {}
        for layer in self.layers:
            weight = next(iter(_parameters(layer, self.labelling) or {}))
            if self.parent is None:
                position_of[layer] = np.arange(sizes(layer, 1)[channel_axis(layer)])[None]
            else:
                position_of[layer] = next(m.position for m in self.parent.members if (m.fqn, m.dim) == weight)
        return position_of

    @property
    def planes(self) -> int:
        return self.columns[0].position.shape[1] // 2

    # proof ----------------------------------------------------------------------------------------------------------

    def _in_one_piece(self) -> bool:
        """Whether each column stands in one part of a bias that is put together, or in none."""
        for column in self.columns:
            for (fqn, dim), start in (_parameters(column.layer, self.labelling) or {}).items():
                inside = _within(column.position - start, self.labelling, fqn, dim)
                if inside.any() and not inside.all():
                    return False
        return True

    def _alone(self) -> bool:
        """Whether no channel is used twice, none of its parameters elsewhere, and nothing but the scores reads them."""
        for layer in self.layers:
            positions = [c.position for c in self.columns if c.layer is layer]
            if positions and not _once(np.concatenate([p.reshape(-1) for p in positions])):
                return False
        graph = self.labelling.program.graph
        fqns = [fqn for layer in self.layers for fqn, _ in _parameters(layer, self.labelling) or ()]
        users = [len(node.users) for node in graph.nodes if node.op == "get_attr" and str(node.target) in fqns]
        once = len(set(fqns)) == len(fqns) and all(count == 1 for count in users) and len(users) == len(set(fqns))
        return once and self._keep_columns() and not _Readers(self).others()

    def _keep_columns(self) -> bool:
        """Whether what else permutes these channels moves columns as they are (heads that share keys)."""
        for layer in self.layers:
            at = {int(p): k for c in self.columns if c.layer is layer for row in c.position for k, p in enumerate(row)}
            for place, offset in (_parameters(layer, self.labelling) or {}).items():
                moving = [m for g in self.labelling.groups for m in g.members if (m.fqn, m.dim) == place]
                copies = [copy + offset for member in moving for copy in member.position.T]
                if any(len({at.get(p) for p in copy.tolist()}) > 1 for copy in copies):
                    return False
        return True

    def _proved(self) -> bool:
        """A random element leaves the inner products as they are, at all tokens."""
        generator = torch.Generator().manual_seed(0)
        outputs = {x: torch.randn(sizes(x, 1), generator=generator, dtype=torch.float64) for x in self.layers}
        rng = np.random.default_rng(0)
        blocks = len(self.columns[0].position)
        maps = np.stack([draw(Maps.ROTATIONS, 2 * self.planes, rng) for _ in range(blocks)])
        before, after = (self._products(x) for x in (outputs, self._turned(outputs, maps)))
        scale = float(before.abs().max())
        return scale > 0 and float((before - after).abs().max()) <= TOLERANCE * scale

    def _turned(self, outputs: Mapping[fx.Node, Tensor], maps: np.ndarray) -> dict[fx.Node, Tensor]:
        result = {layer: value.clone() for layer, value in outputs.items()}
        duals = contragredient(maps)
        for column in self.columns:
            value = result[column.layer].movedim(channel_axis(column.layer), 0)
            for block, where in enumerate(column.position):
                rotation = torch.from_numpy((duals if column.dual else maps)[block])
                index = torch.from_numpy(where)
                value[index] = torch.tensordot(rotation, value[index], 1)
        return result

    def _products(self, outputs: Mapping[fx.Node, Tensor]) -> Tensor:
        left, right = self.scores.sides(*(side.run(outputs, 1)[side.end] for side in self.scores.regions))
        return left @ right.transpose(-1, -2)

    # result ---------------------------------------------------------------------------------------------------------

    def group(self, index: int) -> tuple[Group, Class]:
        """The planes as a group inside the blocks of its parent, and its class."""
        positions: dict[tuple[str, int], list[Index]] = {}
        duals: dict[tuple[str, int], list[int]] = {}
        for column in self.columns:
            for (fqn, dim), offset in (_parameters(column.layer, self.labelling) or {}).items():
                rows_inside = _inside(column.position - offset, self.labelling, fqn, dim)
                if rows_inside is not None:
                    positions.setdefault((fqn, dim), []).append(rows_inside.T)
                    duals.setdefault((fqn, dim), []).extend([int(column.dual)] * len(rows_inside))
        members = tuple(Member(fqn, dim, "out", np.concatenate(parts, 1)) for (fqn, dim), parts in positions.items())
        reason = f"{operator(self.scores.node)} ({self.scores.node.name})"
        slots = {place: (np.zeros(len(marks), np.int64), np.array(marks, np.int64)) for place, marks in duals.items()}
        held = tuple((fqn, dim, bool(d)) for (fqn, dim), marks in duals.items() for d in sorted(set(marks)))
        side = Side(0, Maps.ROTATIONS, reason, held)
        kind = Class(Maps.ROTATIONS, reason, (side,), None, slots, frozenset({0}))
        parent, outer = (None, 1) if self.parent is None else (self.parent.index, self.parent.size)
        return Group(index, 2 * self.planes, members, parent, outer), kind


# parameters -----------------------------------------------------------------------------------------------------------


def _parameters(layer: fx.Node, labelling: Labelling) -> dict[tuple[str, int], int] | None:
    """(FQN, dim) of what makes a layer's channels, the weight first, and the channel at which each begins.

    A bias may be put together from several; parts that are zero are left out. None where one is computed otherwise.
    """
    a = layer_arguments(layer)
    weight, bias = a["weight"], a.get("bias")
    if weight.op != "get_attr" or not (is_layer(layer) and not is_transposed(layer)):
        return None
    part_starts = {(str(weight.target), output_axis(layer)): 0}
    pieces = [bias] if isinstance(bias, fx.Node) else []
    if pieces and operator_of(pieces[0]).ties == "concatenate":
        pieces = list(arguments(pieces[0])["tensors"])
    start = 0
    for piece in pieces:
        if piece.op != "get_attr":
            return None
        value = labelling.terms.constant(piece)
        if value is None:
            part_starts[str(piece.target), 0] = start
        elif value.any():
            return None
        start += sizes(piece, 1)[0]
    return part_starts if int(a.get("groups") or 1) == 1 else None


def _bare(part_starts: Mapping[tuple[str, int], int]) -> set[tuple[str, int]]:
    """All but the weight: parts of a bias stand where their channels do."""
    return set(list(part_starts)[1:])


def _inside(position: Index, labelling: Labelling, fqn: str, dim: int) -> Index | None:
    """Positions in one parameter; None where the channels stand in another part of the bias."""
    return position if _within(position, labelling, fqn, dim).all() else None


def _within(position: Index, labelling: Labelling, fqn: str, dim: int) -> np.ndarray:
    return (position >= 0) & (position < labelling.program.weights[0][fqn].shape[dim])


def _once(values: Index) -> bool:
    return len(np.unique(values)) == len(values)


# planes ---------------------------------------------------------------------------------------------------------------


def _columns(
    queries: Linear, keys: Linear, layers: Sequence[fx.Node], tables: Mapping[fx.Node, Index]
) -> Iterator[Column]:
    """The planes' channels, column by column; none where planes differ in what they stand on."""
    where = [(layer, copy) for layer in layers for copy in range(tables[layer].shape[1])]
    tried = (_plane(queries, keys, *tied) for tied in _tied(queries, keys))
    planes = [plane for plane in tried if plane is not None]
    shapes = {tuple((where[a][0], where[b][0], dual) for (a, b), dual in plane) for plane in planes}
    if len(shapes) != 1:
        return
    for k, (first, second, dual) in enumerate(next(iter(shapes))):
        if first is not second:
            return
        copies = [where[copy][1] for plane in planes for copy in plane[k][0]]
        yield Column(first, tables[first][:, copies], dual)


Plane = list[tuple[tuple[int, int], bool]]  # pairs of copies, and whether they are of the keys


def _tied(queries: Linear, keys: Linear) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest sets of copies that inner products tie: those of the queries and those of the keys."""
    graph = nx.Graph()
    for name, side in (("q", queries), ("k", keys)):
        for copy, head, channel in torch.nonzero((side.values != 0).any(2)).tolist():
            graph.add_edge((name, copy), (head, channel))
    for nodes in nx.connected_components(graph):
        copies_of = {name: sorted(copy for kind, copy in nodes if kind == name) for name in ("q", "k")}
        yield copies_of["q"], copies_of["k"]


def _plane(queries: Linear, keys: Linear, q: list[int], k: list[int]) -> Plane | None:
    """Pairs of the queries (one for each head that shares the keys), then the pair of the keys, orientated alike."""
    if len(k) != 2:
        return None
    first = torch.from_numpy(np.flatnonzero(queries.block == 0))
    reads = (queries.values[q][:, first] != 0).flatten(2).any(2)
    heads: dict[tuple[int, ...], list[int]] = {}
    for copy, row in zip(q, reads.tolist()):
        heads.setdefault(tuple(h for h, reads in enumerate(row) if reads), []).append(copy)
    result: Plane = []
    for _, pair in sorted(heads.items()):
        turned = next((p for p in (pair, pair[::-1]) if len(p) == 2 and _commutes(queries, keys, p, k)), None)
        if turned is None:
            return None
        result.append(((turned[0], turned[1]), False))
    return [*result, ((k[0], k[1]), True)]


def _commutes(queries: Linear, keys: Linear, q: list[int], k: list[int]) -> bool:
    """Whether all inner products of two channels of each have the form [[a, −b], [b, a]]."""
    table = torch.einsum("ahte,bhse->htsab", queries.values[q], keys.values[k])
    scale = TOLERANCE * float(table.abs().max())
    same = (table[..., 0, 0] - table[..., 1, 1]).abs().max() <= scale
    return scale > 0 and bool(same and (table[..., 0, 1] + table[..., 1, 0]).abs().max() <= scale)


class _Readers:
    """Who sees the planes' channels but the operator that takes the inner products."""

    def __init__(self, planes: _Planes):
        self.scores = planes.scores
        generator = torch.Generator().manual_seed(1)
        outputs = {}
        for layer in planes.layers:
            value = torch.zeros(sizes(layer, 1), dtype=torch.float64)
            front = value.movedim(channel_axis(layer), 0)
            for column in planes.columns:
                if column.layer is layer:
                    where = torch.from_numpy(column.position.reshape(-1))
                    front[where] = torch.randn(front[where].shape, generator=generator, dtype=torch.float64)
            outputs[layer] = value
        self.values: dict[fx.Node, Any] = {}
        for side in planes.scores.regions:
            self.values |= side.run(outputs, 1)
        self.inside = {*planes.layers, *(node for side in planes.scores.regions for node in side.nodes)}

    def others(self) -> bool:
        """Whether anyone does."""
        return any(self._escapes(node, user) for node in self.inside for user in node.users if user not in self.inside)

    def _escapes(self, node: fx.Node, reader: fx.Node) -> bool:
        if not any(tensor.any() for tensor in tensors(self.values[node])):
            return False
        if reader is self.scores.node:
            return node not in (side.end for side in self.scores.regions) or self._read_twice(node)
        if reader.op != "call_function":
            return True
        if reader not in self.values:
            try:
                self.values[reader] = call(reader, self.values, 1)
            except (KeyError, RuntimeError, TypeError):
                return True
        return any(self._escapes(reader, user) for user in reader.users)

    def _read_twice(self, node: fx.Node) -> bool:
        return sum(argument is node for argument in [*self.scores.node.args, *self.scores.node.kwargs.values()]) > 1
