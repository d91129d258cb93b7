"""Contractions named by letters: einsum, and the products that are one of its equations.

The same letter means the same axis: its occurrences are tied. A letter that the result lacks is summed over, which sees
no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Shape

Letters = Sequence[Any]  # a character for each axis, an int (counted from the right) for those under an ellipsis


def contract(t: ProgramTerms, operands: Sequence[tuple[Any, Letters]], result: Letters) -> Shape:
    """Axes of ``operands`` (nodes with their letters) tied by letter; the axes of ``result``."""
    axis_of: dict[Any, Axis] = {}
    for node, letters in operands:
        shape = t.shape(node)
        for d, letter in enumerate(letters):
            axis = t.axis(shape, d)
            if letter not in axis_of or axis_of[letter].size == 1:  # an axis of one position is broadcast
                axis_of[letter] = axis
            elif axis.size > 1:
                axis_of[letter] = t.tie(axis_of[letter], axis)
    _roles(t, operands, result)
    return Shape(tuple(axis_of[letter] for letter in result))


def _roles(t: ProgramTerms, operands: Sequence[tuple[Any, Letters]], result: Letters) -> None:
    for node, letters in operands:
        others = {letter for operand, names in operands if operand is not node for letter in names}
        for d, letter in enumerate(letters):
            kept = "elementwise" if letter in others else "out"
            t.role(node, d, kept if letter in result else "in")


def einsum(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    tensors = a["tensors"]
    terms, result = parse(a["equation"], [len(t.shape(x).axes) for x in tensors])
    return contract(t, list(zip(tensors, terms)), result)


def parse(equation: str, ranks: list[int]) -> tuple[list[Letters], Letters]:
    """The letters of each operand and of the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks)]
    widest = max((n for n, term in zip(hidden, terms) if "..." in term), default=0)
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        right = "..." * bool(widest) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    return [_letters(term, n) for term, n in zip(terms, hidden)], _letters(right, widest)


def _letters(term: str, hidden: int) -> Letters:
    before, dots, after = term.partition("...")
    return [*before, *(range(hidden - 1, -1, -1) if dots else ()), *after]


def bilinear(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """input1 (…, i), input2 (…, j), weight (o, i, j) -> (…, o)."""
    batch = list(range(len(t.shape(a["input1"]).axes) - 1))
    operands = [(a["input1"], [*batch, "i"]), (a["input2"], [*batch, "j"]), (a["weight"], "oij")]
    result = contract(t, operands, [*batch, "o"])
    if isinstance(a.get("bias"), fx.Node):
        t.tie(t.axis(result, len(batch)), t.axis(t.shape(a["bias"]), 0))
        t.role(a["bias"], 0, "out")
    return result


def tensordot(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    left, right = a["self"], a["other"]
    first = [f"a{d}" for d in range(len(t.shape(left).axes))]
    second = [f"b{d}" for d in range(len(t.shape(right).axes))]
    for i, j in zip(a["dims_self"], a["dims_other"]):
        second[normal(j, len(second))] = first[normal(i, len(first))]
    gone = set(first) & set(second)
    return contract(t, [(left, first), (right, second)], [x for x in (*first, *second) if x not in gone])


def _product(*letters: str) -> Any:
    """A rule for two vectors or matrices, the first two tensors of a call."""

    def rule(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
        tensors = [value for value in a.values() if isinstance(value, fx.Node)]
        return contract(t, list(zip(tensors, letters)), letters[-1])

    return rule


dot = _product("i", "i", "")
outer = _product("i", "j", "ij")


def distances(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """cdist: x1 (…, p, m), x2 (…, r, m) -> (…, p, r)."""
    left, right = a["x1"], a["x2"]
    if len(t.shape(left).axes) != len(t.shape(right).axes):
        return None
    batch = list(range(len(t.shape(left).axes) - 2))
    return contract(t, [(left, [*batch, "p", "m"]), (right, [*batch, "r", "m"])], [*batch, "p", "r"])


def products_sum(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """addmv, addr and addbmm: a tensor plus a product of two others."""
    bias, left, right = (value for value in a.values() if isinstance(value, fx.Node))
    ranks = len(t.shape(left).axes), len(t.shape(right).axes)
    letters = {(2, 1): ("ij", "j", "i"), (1, 1): ("i", "j", "ij"), (3, 3): ("bij", "bjk", "ik")}[ranks]
    result = contract(t, [(left, letters[0]), (right, letters[1])], letters[2])
    return t.broadcast([result, t.shape(bias)], t.sizes(node))
