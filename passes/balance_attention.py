"""BalanceAttention: queries and keys, values and outputs in the basis of their singular vectors.

Attention sees W_QᵀW_K and W_O W_V of each head, so each pair is free up to an invertible T: W_Q → T W_Q, W_K → T⁻ᵀ
W_K. Its canonical form is balanced: of M = W_Qᵀ W_K = U S Vᵀ the sides become √S Uᵀ and √S Vᵀ, channels by falling
singular value and each channel's sign by the largest entry of its first side (``vfx.analyse.balance``). Of all pairs
with the same product it has the smallest sum of squares. Biases are columns of their weights ([W b] acts on [x; 1]) and
are carried along. Pairs are the groups that stand inside the products of two activations; those whose class is less
than linear (rotary embeddings, normalised queries or keys) are left with a note, and so are heads whose product has a
rank below their size. With grouped queries one T acts on all the heads that share a key or value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from vfx.analyse.balance import deficient, in_turn, rewritten
from vfx.analyse.classes import Maps
from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.arguments import checked
from vfx.operators import arguments, operator_of
from vfx.program import Program
from vfx.rewrite import Pass, PassResult


class BalanceAttention(Pass[None]):
    """Balance q–k and v–o pairs of every head, in every weight set."""

    needs = (symmetry,)
    preserves_function = True
    changes_values = True

    @checked
    def __init__(self, verify: bool = True):
        self.verify = verify

    def apply(self, program: Program) -> PassResult[None]:
        facts = symmetry(program)
        pairs, notes = _pairs(facts)
        left = [[deficient(facts, group, weights) for group in pairs] for weights in program.weights]
        for edge, unbalanced in enumerate(left):
            notes += [_short(group, heads, edge) for group, heads in zip(pairs, unbalanced) if heads]
        pairs = [group for group, *heads_of in zip(pairs, *left) if any(len(heads) < group.outer for heads in heads_of)]
        sets = [
            rewritten(facts, weights, lambda tensors: in_turn(facts, tensors, None, pairs))
            for weights in program.weights
        ]
        result = program.with_weights(sets, f"BalanceAttention({len(pairs)} pairs)")
        return PassResult(result.with_notes(notes))


def _pairs(facts: Symmetry) -> tuple[list[Group], list[str]]:
    """The groups that stand inside the products of two activations, and why others cannot be mapped."""
    paired: dict[int, Group] = {}
    notes: dict[str, None] = {}
    for node in facts.program.graph.nodes:
        for what, value, dim in _inner(node):
            groups = [facts.groups[index] for index in facts.classes.on(value, dim)]
            free = [group for group in groups if facts.classes[group.index].kind is Maps.LINEAR]
            paired |= {group.index: group for group in free if _two_sided(group)}
            why = [f"{group.reason} allows {group.kind.title} maps" for group in groups if group not in free]
            if not groups and operator_of(node).ties == "attention":
                why = ["none of their channels are free (rotary embeddings?)"]
            notes |= dict.fromkeys(f"{what} of {node.name} left as they are: {reason}" for reason in why)
    return [paired[index] for index in sorted(paired)], list(notes)


def _inner(node: fx.Node) -> Iterator[tuple[str, fx.Node, int]]:
    """The axes along which operands of a product meet, and those of values that it passes on."""
    a, entry = arguments(node), operator_of(node)
    if entry.ties == "attention":
        yield "queries and keys", a["query"], -1
        yield "values and output", a["value"], -1
    elif entry.batched:
        left, right = a[entry.roles["input"]], a[entry.roles["weight"]]
        if _computed(left) and _computed(right):
            yield "queries and keys", left, -1
            yield "values and output", right, -1


def _computed(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and len(value.meta["val"].shape) > 1


def _two_sided(group: Group) -> bool:
    """Whether what it makes is read: else no map is undone."""
    return {dual for side in group.sides for _, _, dual in side.members} == {False, True}


def _short(group: Group, heads: list[int], edge: int) -> str:
    """Heads whose pair has no balanced form."""
    which = ", ".join(map(str, heads))
    return f"edge {edge}: heads {which} of {group.name} left as they are: their product has a rank below {group.size}"
