"""The index space of each kind of operator: its dimensions, the tensors that have them, and which it couples.

A dimension is *coupled* where a result depends on several of its positions: summed over, normalised over, or swept by a
window. The functions below are the kinds of ``Operator.space``; where it is UNKNOWN, groups inside blocks are not
looked for wherever the operator reads (``vfx.analyse.blocks``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from vfx.analyse.axis import Axis, Opaque
from vfx.analyse.named import part_of
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rows import distinct
from vfx.analyse.rules import einsum, routing
from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import Digit, Shape
from vfx.analyse.store import Rows, Store
from vfx.operators import arguments, is_transposed, operator_of


class Dim(NamedTuple):
    """One dimension: the leaves on it, the tensors that have it (any names), whether positions depend on each other.

    ``whole`` says that it is an axis; else it is a factor of one, and a leaf on it may stand on the other factors too.
    """

    leaves: frozenset[int]
    tensors: frozenset[str]
    coupled: bool = False
    whole: bool = True


class Spaces:
    """What the functions below need of a finished inference; ``named``: parts of namings stand on axes like leaves."""

    def __init__(self, inference: ProgramTerms, named: bool = False):
        self.t, self.named = inference, named and bool(inference.namings)
        self._leaves: dict[Axis | Digit, frozenset[int]] = {}

    def shape(self, node: Any) -> Shape | None:
        shape = self.t.shapes.get(node) if isinstance(node, fx.Node) else None
        return shape if isinstance(shape, Shape) else None

    def dim(self, axes: Iterable[Axis | Digit], tensors: str, coupled: bool = False) -> Dim:
        """One dimension that stands on these axes; ``tensors`` is a letter for each."""
        return Dim(frozenset().union(*map(self.leaves, axes)), frozenset(tensors), coupled)

    def leaves(self, entry: Axis | Digit) -> frozenset[int]:
        """The leaves that stand on an axis, or on its dimension of a block."""
        if entry not in self._leaves:
            part = part_of(entry) if self.named else 0
            self._leaves[entry] = frozenset([part]) if part else self._standing(entry)
        return self._leaves[entry]

    def _standing(self, entry: Axis | Digit) -> frozenset[int]:
        if isinstance(entry, Digit):
            return self._varying(entry.block.flat, entry.block.sizes)[entry.position]
        factors = (factor for factor in entry.factors if not isinstance(factor, Opaque))
        return frozenset().union(*(self.t.leaves.free_leaves(self.t.leaves.resolve(rows)) for rows in factors))

    def parts(self, axis: Axis | Digit, sizes: tuple[int, ...]) -> list[frozenset[int]] | None:
        """The leaves on each factor of an axis; None if it cannot be written out."""
        if isinstance(axis, Digit):  # one line of its block
            labels = axis.block.labels
            rows = labels[tuple(slice(None) if d == axis.position else 0 for d in range(labels.ndim - 1))]
            return self._varying(rows, sizes)
        row_table = self.t.rows(axis)
        return None if row_table is None else self._varying(row_table, sizes)

    def _varying(self, rows: Rows, sizes: tuple[int, ...]) -> list[frozenset[int]]:
        return self.t.leaves.once(varying, self.t.leaves.resolve(rows), sizes)


def varying(leaves: Store, rows: Rows, sizes: tuple[int, ...]) -> list[frozenset[int]]:
    """The leaves whose channel varies along each dimension of an axis seen as ``sizes``.

    A leaf that stands on some positions alone varies; that others stand beside it there or not does not matter.
    """
    digits = rows[:, 1:].reshape(*sizes, -1)
    owner = leaves.leaf_of(digits)
    leaves_of: list[set[int]] = [set() for _ in sizes]
    for leaf in distinct(owner):
        channels = np.sort(np.where(owner == leaf, digits, -1), axis=-1)
        for d, varying_leaves in enumerate(leaves_of):
            if (channels != np.take(channels, [0], axis=d)).any():
                varying_leaves.add(leaf)
    return [frozenset(leaves) for leaves in leaves_of]


Space = Callable[[Spaces, fx.Node, dict[str, Any]], "list[Dim] | None"]


def space_of(s: Spaces, node: fx.Node) -> list[Dim] | None:
    """The index space of a call, or None where nothing is known."""
    space = SPACES.get(operator_of(node).space)
    return space(s, node, arguments(node)) if space is not None else None


def nothing(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim]:
    """Values stay as they are, or are new: the labels of the result say where they stand."""
    return []


def pointwise(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim]:
    """Operands aligned to the right; one that is broadcast does not have the dimension."""
    shapes = [s.shape(x) for x in (node, *node.all_input_nodes)]
    return aligned(s, [shape for shape in shapes if shape is not None])


def aligned(s: Spaces, shapes: list[Shape], names: str = "") -> list[Dim]:
    """Dimensions of shapes aligned to the right, the first being the result's."""
    names = names or "".join(map(chr, range(97, 97 + len(shapes))))
    dims = []
    for back in range(1, len(shapes[0].axes) + 1):
        size = shapes[0].axes[-back].size
        named = [
            (x.axes[-back], n) for x, n in zip(shapes, names) if len(x.axes) >= back and x.axes[-back].size == size
        ]
        dims.append(s.dim([axis for axis, _ in named], "".join(name for _, name in named)))
    return dims


def reduction(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    x = s.shape(node.all_input_nodes[0])
    if x is None:
        return None
    gone = dims_of(a.get("dim"), len(x.axes))
    return [s.dim([axis], "x" if d in gone else "xy", d in gone) for d, axis in enumerate(x.axes)]


def along(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """softmax and scans: one axis is coupled."""
    x = s.shape(a["self"])
    if x is None:
        return None
    dims = dims_of(a["dim"], len(x.axes))
    return [s.dim([axis], "xy", d in dims) for d, axis in enumerate(x.axes)]


def per_channel(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    x = s.shape(a["input"])
    return None if x is None else [s.dim([axis], "xyw" if d == 1 else "xy", d > 1) for d, axis in enumerate(x.axes)]


def layer_norm(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    x = s.shape(a["input"])
    if x is None:
        return None
    first = len(x.axes) - len(a["normalized_shape"])
    affine = "w" if isinstance(a.get("weight"), fx.Node) or isinstance(a.get("bias"), fx.Node) else ""
    return [s.dim([axis], "xy" + (affine if d >= first else ""), d >= first) for d, axis in enumerate(x.axes)]


def group_norm(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """Groups are kept apart, the channels of one are coupled with each other and with all positions."""
    x = s.shape(a["input"])
    groups = int(a["num_groups"] if "num_groups" in a else a["group"])
    parts = s.parts(x.axes[1], (groups, x.axes[1].size // groups)) if x is not None else None
    if x is None or parts is None:
        return None
    outer, inner = (Dim(leaves, frozenset("xyw"), coupled, False) for leaves, coupled in zip(parts, (False, True)))
    return [s.dim([x.axes[0]], "xy"), outer, inner, *(s.dim([axis], "xy", True) for axis in x.axes[2:])]


def windows(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    x = s.shape(node.all_input_nodes[0])
    if x is None:
        return None
    first = len(x.axes) - operator_of(node).spatial
    return [s.dim([axis], "xy", d >= first) for d, axis in enumerate(x.axes)]


def linear(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    x, w = s.shape(a["input"]), s.shape(a["weight"])
    if x is None or w is None:
        return None
    batch = [s.dim([axis], "xy") for axis in x.axes[:-1]]
    return [*batch, s.dim([x.axes[-1], w.axes[1]], "xw", True), s.dim([w.axes[0]], "wby")]


def convolution(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """Groups are kept apart; within one, inputs are summed over."""
    x, w = s.shape(a["input"]), s.shape(a["weight"])
    if x is None or w is None or isinstance(a["groups"], fx.Node):
        return None
    groups = int(a["groups"])
    channel = len(x.axes) - len(w.axes) + 1
    parts = s.parts(w.axes[0], (groups, w.axes[0].size // groups))
    if parts is None:
        return None
    outer, whole = Dim(parts[0], frozenset("xwby"), whole=False), groups == 1
    inside = s.leaves(w.axes[1])
    summed, made = (parts[1], inside) if is_transposed(node) else (inside, parts[1])
    dims = [outer, Dim(summed, frozenset("xw"), True, whole), Dim(made, frozenset("wby"), False, whole)]
    dims += [s.dim([axis], "xy") for axis in x.axes[:channel]]
    return dims + [s.dim([axis], "xwy", True) for axis in (*x.axes[channel + 1 :], *w.axes[2:])]


def matmul(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    left, right = (s.shape(v) for v in [v for v in a.values() if isinstance(v, fx.Node)][-2:])
    result = s.shape(node)
    if left is None or right is None or result is None or min(len(left.axes), len(right.axes)) < 2:
        return None
    batch = aligned(s, [Shape(x.axes[:-2]) for x in (result, left, right)], "yab")
    summed = s.dim([left.axes[-1], right.axes[-2]], "ab", True)
    return [*batch, s.dim([left.axes[-2]], "ay"), summed, s.dim([right.axes[-1]], "by")]


def grouped_product(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """Each row has the matrix of one expert: the one that it names, if it does."""
    x, w = (s.shape(value) for value in routing.factors(a)[:2])
    if x is None or w is None:
        return None
    channels = [s.dim([x.axes[1], w.axes[1]], "xw", True), s.dim([w.axes[2]], "wy")]
    if part_of(x.axes[0]):
        return [s.dim([x.axes[0], w.axes[0]], "xwy"), *channels]
    return [s.dim([x.axes[0]], "xy"), s.dim([w.axes[0]], "w", True), *channels]


def addmm(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """The product; a bias that lacks a dimension of the result is added to it position by position."""
    bias, *factors = (v for v in a.values() if isinstance(v, fx.Node))
    dims = matmul(s, node, {"left": factors[0], "right": factors[1]})
    shape = s.shape(bias)
    if dims is None or shape is None:
        return None
    added = frozenset().union(*map(s.leaves, shape.axes))
    return [dim._replace(tensors=dim.tensors | {"c"}) if dim.leaves & added else dim for dim in dims]


def embedding(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    w, y = s.shape(a["weight"]), s.shape(node)
    if w is None or y is None:
        return None
    return [s.dim([w.axes[1]], "wy"), *(s.dim([axis], "iy") for axis in y.axes[:-1])]


def attention(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """Heads are kept apart; keys are summed over, and so is what queries and keys are compared on."""
    q, k, v = (s.shape(a[name]) for name in ("query", "key", "value"))
    result = s.t.shapes[node]
    y, mask = result[0] if isinstance(result, list) else result, s.shape(a.get("attn_mask") or a.get("attn_bias"))
    if q is None or k is None or v is None or y is None:
        return None
    rank = len(q.axes)
    heads = _grouped_heads(s, (y, q, k, v)) if a.get("enable_gqa") else None
    if heads is None:
        heads = aligned(s, [Shape(x.axes[:-2]) for x in (y, q, k, v)], "yqkv")
    if mask is not None:  # it lacks no dimension that it moves along
        mask_leaves = frozenset().union(*map(s.leaves, mask.axes))
        heads = [dim._replace(tensors=dim.tensors | {"m"}) if dim.leaves & mask_leaves else dim for dim in heads]
    masked = [mask.axes[-2], mask.axes[-1]] if mask is not None else []
    rows = s.dim([q.axes[rank - 2], *masked[:1]], "qy" + "m" * bool(masked))
    columns = s.dim([k.axes[rank - 2], v.axes[rank - 2], *masked[1:]], "kv" + "m" * bool(masked), True)
    summed = s.dim([q.axes[-1], k.axes[-1]], "qk", True)
    return [*heads, rows, columns, summed, s.dim([v.axes[-1]], "vy")]


def _grouped_heads(s: Spaces, shapes: tuple[Shape, ...]) -> list[Dim] | None:
    """Each head of keys and values serves several in a row of queries."""
    y, q, k, _ = shapes
    d = len(q.axes) - 3
    parts = s.parts(q.axes[d], (k.axes[d].size, q.axes[d].size // k.axes[d].size))
    if parts is None:
        return None
    outer = Dim(parts[0] | s.leaves(k.axes[d]), frozenset("yqkv"), whole=False)
    return [*(s.dim([x], "yqkv") for x in y.axes[:d]), outer, Dim(parts[1], frozenset("yq"), whole=False)]


def letters(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """einsum: a dimension for each letter."""
    shapes = [s.shape(x) for x in a["tensors"]]
    if any(shape is None for shape in shapes):
        return None
    terms, result = einsum.parse(a["equation"], [len(shape.axes) for shape in shapes])  # type: ignore[union-attr]
    dims = []
    for letter in dict.fromkeys(x for term in terms for x in term):
        axes = [shape.axes[d] for shape, term in zip(shapes, terms) for d, x in enumerate(term) if x == letter]  # type: ignore[union-attr]
        names = {str(k) for k, term in enumerate(terms) if letter in term} | ({"y"} if letter in result else set())
        leaves = frozenset().union(*map(s.leaves, axes))
        dims.append(Dim(leaves, frozenset(names), letter not in result))
    return dims


def prelu(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    x = s.shape(a["self"])
    return None if x is None else [s.dim([axis], "xyw" if d == 1 else "xy") for d, axis in enumerate(x.axes)]


def halves(s: Spaces, node: fx.Node, a: dict[str, Any]) -> list[Dim] | None:
    """glu: both halves of one axis are read at each position of the result."""
    x = s.shape(a["self"])
    if x is None:
        return None
    half = normal(a["dim"], len(x.axes))
    return [s.dim([axis], "xy") for d, axis in enumerate(x.axes) if d != half] + [s.dim([x.axes[half]], "xy")]


SPACES: dict[str, Space] = {
    "nothing": nothing,
    "elementwise": pointwise,
    "reduction": reduction,
    "along": along,
    "windows": windows,
    "halves": halves,
    "per channel": per_channel,
    "layer norm": layer_norm,
    "group norm": group_norm,
    "prelu": prelu,
    "linear": linear,
    "convolution": convolution,
    "product": matmul,
    "product and sum": addmm,
    "embedding": embedding,
    "attention": attention,
    "einsum": letters,
    "grouped product": grouped_product,
}
