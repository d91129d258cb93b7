"""The walk over a graph that finds which maps each operator lets pass.

A node's value is given by its entries (``vfx.analyse.action.entries``). Handlers, one for each kind of
``Operator.classes``, say how the slots of an operator's operands and result hang together. An operator without a
handler lets only permutations pass, which is what its rule has proved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.action.entries import ANY, Entries, Ids, Joint, Key, constant, shrunk
from vfx.analyse.classes import Maps
from vfx.analyse.places import places
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.spaces import Spaces
from vfx.analyse.shapes import Digit, Shape
from vfx.analyse.store import Rows, Store
from vfx.operators import arguments, is_in_place, operator_of
from vfx.program import Value

Result = Entries | list[Any] | None
Handler = Callable[["Walk", fx.Node, dict[str, Any]], Result]

SAMPLES = 2  # the batch size that arrays of slots are written out with


class Walk:
    """Slots of every parameter axis and activation of a finished inference.

    ``parameters[fqn, dim][leaf]`` is the slot of each copy of the leaf along that axis, in the order of
    ``vfx.analyse.places``. ``handlers`` act by kind; ``special`` ones for single nodes, by name, go before them: what
    would be if these nodes did something else.
    """

    def __init__(
        self,
        terms: ProgramTerms,
        labels: Mapping[tuple[str, int], Rows],
        handlers: Mapping[str, Handler],
        special: Mapping[str, Handler] | None = None,
    ):
        self.t, self.labels, self.spaces = terms, labels, Spaces(terms)
        self.handlers, self.special = handlers, special or {}
        self.slots = Joint()
        self.parameters: dict[tuple[str, int], dict[int, Ids]] = {}
        self.values: dict[fx.Node, Any] = {}
        self._own: dict[str, Entries] = {}
        self._still: dict[int, int] = {}

    def run(self) -> Walk:
        for node in self.t.shapes:
            self.slots.context = node.name
            if node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
        return self

    # for handlers -------------------------------------------------------------------------------------------------

    def entries(self, value: Any) -> Entries:
        """The entries of an argument; none for what is no tensor, or has no leaf."""
        held = self.values.get(value) if isinstance(value, fx.Node) else None
        return held if isinstance(held, dict) else {}

    def shape(self, node: Any) -> Shape | None:
        return self.spaces.shape(node)

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """A value's shape, with a batch of SAMPLES."""
        value = node.meta["val"]
        return value.sizes(SAMPLES) if isinstance(value, Value) else ()

    def stands(self, node: fx.Node) -> list[frozenset[int]]:
        """The leaves that stand on each axis of a value."""
        shape = self.shape(node)
        return [] if shape is None else [self.spaces.leaves(axis) for axis in shape.axes]

    def on(self, node: fx.Node, dims: set[int]) -> dict[Key, Ids]:
        """The entries whose leaf stands on one of some axes."""
        stands = self.stands(node)
        return {
            key: ids
            for key, ids in self.entries(node).items()
            if (key[1] in dims if key[1] != ANY else any(key[0] in stands[d] for d in dims))
        }

    def fresh(self, leaf: int, rank: int) -> Ids:
        return constant(self.slots.fresh(leaf), rank)

    # nodes --------------------------------------------------------------------------------------------------------

    def _attribute(self, node: fx.Node) -> Entries:
        """A parameter has slots of its own; constants are uniform along the leaves that stand on them, zeros free."""
        fqn = str(node.target)
        if fqn not in self.t.parameters:
            return self.standing(self.t.shapes[node], self.slots.fresh) if self._is_zero(fqn) else {}
        if fqn not in self._own:
            self._own[fqn] = self._parameter(fqn)
        return self._own[fqn]

    def _parameter(self, fqn: str) -> Entries:
        rank = len(self.t.parameters[fqn])
        standing: list[tuple[int, int, Ids]] = []
        for dim in range(rank):
            rows = self.labels[fqn, dim]
            slots_of = self.parameters[fqn, dim] = {}
            shape = [-1 if d == dim else 1 for d in range(rank)]
            for leaf, (count, copies, along, twice) in self.t.leaves.once(_copies, rows).items():
                slots = np.array([*(self.slots.fresh(leaf) for _ in range(count)), -1])
                if twice:
                    self.slots.restrict(slots, Maps.PERMUTATION)
                slots_of[leaf] = slots[copies]
                standing.append((leaf, dim, slots[along].reshape(shape)))
        leaves = [leaf for leaf, _, _ in standing]
        return {(leaf, dim if leaves.count(leaf) > 1 else ANY): ids for leaf, dim, ids in standing}

    def _call(self, node: fx.Node) -> Any:
        if operator_of(node).ties == "item":
            container = self.values.get(node.args[0])  # type: ignore[arg-type]
            return container[int(node.args[1])] if isinstance(container, list) else None  # type: ignore[arg-type]
        if not any(map(self._moves, node.all_input_nodes)):
            return None
        result = self._handled(node)
        result = self.still(node) if result is None else self._completed(node, result)
        if is_in_place(node) and isinstance(result, dict):
            result = self._in_place(node, result)
        return result

    def _moves(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        return any(value) if isinstance(value, list) else bool(value)

    def _handled(self, node: fx.Node) -> Result:
        value = node.meta["val"]
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, Value) or not first.dtype.is_floating_point:
            return None
        handler = self.special.get(node.name, self.handlers.get(operator_of(node).classes))
        return None if handler is None else handler(self, node, arguments(node))

    def _completed(self, node: fx.Node, result: Any) -> Any:
        """What a handler left out that stands on a result and on an operand: permuted and no more.

        Where values are uniform along a leaf instead, handlers say so with slots of -1.
        """
        if not isinstance(result, list):
            return self._complete(node, self.t.shapes[node], result)
        shapes = self.t.shapes[node]
        read = {int(user.args[1]) for user in node.users if user.users}  # type: ignore[arg-type]
        return [
            self._complete(node, shape, entries or {}) if k in read else entries
            for k, (shape, entries) in enumerate(zip(shapes, result))
        ]

    def _complete(self, node: fx.Node, shape: Any, entries: Entries) -> Entries:
        present = {leaf for leaf, _ in entries}
        operands = [self.values.get(operand) for operand in node.all_input_nodes]
        given = [key for operand in operands if isinstance(operand, dict) for key in operand if key[0] not in present]
        if given and isinstance(shape, Shape):
            stands = frozenset().union(*map(self.spaces.leaves, shape.axes))
            lost = {leaf for leaf, _ in given if leaf in stands}
            for entries_given in operands if lost else ():
                for key, ids in entries_given.items() if isinstance(entries_given, dict) else ():
                    if key[0] in lost:
                        self.slots.restrict(ids, Maps.PERMUTATION)
            entries = entries | self.standing(shape, self._still_slot, lost)
        return {key: ids for key, ids in entries.items() if (ids >= 0).any()}

    def _in_place(self, node: fx.Node, result: Entries) -> Entries:
        """Others see what was written: it must go through the map of what stood there."""
        before = self.entries(node.args[0])
        if len(self.sizes(node)) != len(self.sizes(node.args[0])):  # type: ignore[arg-type]
            return self.still(node)
        for key in {**before, **result}:
            if key in before and key in result:
                self.slots.equal([before[key], result[key]])
            else:
                self.slots.restrict(before.get(key, result.get(key)), Maps.PERMUTATION)  # type: ignore[arg-type]
        return before

    # only permutations --------------------------------------------------------------------------------------------

    def still(self, node: fx.Node) -> Any:
        """The operator lets permutations pass and no more."""
        for operand in node.all_input_nodes:
            self.hold(operand)
        return self.permuted(self.t.shapes[node])

    def hold(self, node: Any) -> None:
        """What stands in a value is permuted and no more."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        for entries in value if isinstance(value, list) else [value]:
            for ids in (entries or {}).values():
                self.slots.restrict(ids, Maps.PERMUTATION)

    def permuted(self, shape: Any) -> Any:
        """Entries of a result that only permutations move."""
        if isinstance(shape, (list, tuple)):
            return [self.permuted(part) for part in shape]
        return self.standing(shape, self._still_slot) if isinstance(shape, Shape) else None

    def uniform(self, shape: Any, entries: Entries | None = None) -> Entries:
        """Entries of a result that does not vary along any other leaf: what lends it a shape lends no values."""
        present = {leaf for leaf, _ in entries or ()}
        if not isinstance(shape, Shape):
            return entries or {}
        others = frozenset().union(*map(self.spaces.leaves, shape.axes)) - present
        return self.standing(shape, lambda leaf: -1, others) | (entries or {})

    def standing(self, shape: Shape, slot: Callable[[int], int], only: Collection[int] | None = None) -> Entries:
        """Entries with a slot for each leaf (of some) that stands on a tensor."""
        stands = [self.spaces.leaves(axis) for axis in shape.axes]
        held = frozenset().union(*stands)
        result: Entries = {}
        for leaf in sorted(held if only is None else held.intersection(only)):
            dims = [d for d, leaves in enumerate(stands) if leaf in leaves]
            for d in dims if len(dims) > 1 else [ANY]:
                mask = self._mask(shape, leaf, dims[0] if d == ANY else d)
                result[leaf, d] = np.where(mask, slot(leaf), -1)
        return result

    def _still_slot(self, leaf: int) -> int:
        if leaf not in self._still:
            self._still[leaf] = self.slots.fresh(leaf)
            self.slots.lower(self._still[leaf], Maps.PERMUTATION)
        return self._still[leaf]

    def _is_zero(self, fqn: str) -> bool:
        values = [weights.get(fqn) for weights in self.t.program.weights]
        return all(value is not None and not value.is_meta and not value.any() for value in values)

    def _mask(self, shape: Shape, leaf: int, dim: int) -> Any:
        """Where a leaf stands, as an array that broadcasts over the tensor."""
        rank, entry = len(shape.axes), shape.axes[dim]
        whole = np.ones((1,) * rank, bool)
        if isinstance(entry, Digit):
            labels = self.t.leaves.resolve(entry.block.flat)
            mask = (self.t.leaves.leaf_of(labels[:, 1:]) == leaf).any(axis=1)
            where = [d for d, e in enumerate(shape.axes) if isinstance(e, Digit) and e.block is entry.block]
            positions = [shape.axes[d].position for d in where]  # type: ignore[union-attr]
            sizes = entry.block.labels.shape[:-1]
            if mask.all() or len(positions) < len(sizes):
                return whole
            turned = mask.reshape(sizes).transpose(positions)
            return turned.reshape([s.size if d in where else 1 for d, s in enumerate(shape.axes)])
        if len(entry.factors) > 1 or not isinstance(entry.factors[0], np.ndarray):
            return whole
        rows = self.t.leaves.resolve(entry.factors[0])
        mask = (self.t.leaves.leaf_of(rows[:, 1:]) == leaf).any(axis=1)
        return whole if mask.all() else mask.reshape([-1 if d == dim else 1 for d in range(rank)])


def _copies(leaves: Store, rows: Rows) -> dict[int, tuple[int, Ids, Ids, bool]]:
    """For each leaf on an axis: how many tags its copies have, the tag of each copy, of each position, and a flag.

    Tags are numbered; -1 where the leaf does not stand, size 1 where all positions are alike. The flag says that the
    leaf stands twice on one position (an outer product with itself).
    """
    copies_of = {}
    for leaf, table in places(leaves, rows).items():
        assert table is not None
        tags, copies = np.unique(rows[table[0], 0], return_inverse=True)
        along = np.full(len(rows), -1, np.int64)
        along[table] = copies.reshape(-1)
        twice = rows.shape[1] > 2 and bool(((leaves.leaf_of(rows[:, 1:]) == leaf).sum(axis=1) > 1).any())
        copies_of[leaf] = len(tags), copies.reshape(-1), shrunk(along), twice
    return copies_of
