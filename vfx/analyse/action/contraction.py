"""Multilinear operators: products summed over some axes, channel by channel along others.

A leaf that is summed over in two operands goes through dual maps there; one that a single operand has passes through to
the result; one that several operands have and the result keeps (gains, gates, depthwise kernels) is multiplied channel
by channel; one that a single operand sums over is a sum over channels, which permutations alone leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.action.entries import ANY, Entries, Ids, Key, padded
from vfx.analyse.action.walk import Walk
from vfx.analyse.classes import Maps
from vfx.analyse.rows import unique_rows
from vfx.analyse.rules import einsum as letters_of
from vfx.analyse.rules import routing
from vfx.operators import is_transposed

Letter = Any
Place = tuple[int, Letter]  # a leaf, and the letter it stands on


@dataclass(frozen=True)
class Operand:
    """A factor: its letters, those it is not broadcast along, and the slots of each leaf on a letter."""

    letters: tuple[Letter, ...]
    has: frozenset[Letter]
    slots: dict[Place, Ids]
    power: int = 1


def operand(w: Walk, node: fx.Node, letters: Sequence[Letter], power: int = 1) -> Operand:
    """A tensor whose axes are named by letters."""
    stands = w.stands(node)
    has = frozenset(letter for letter, size in zip(letters, w.sizes(node)) if size > 1)
    return Operand(tuple(letters), has, placed(w, w.entries(node), letters, stands), power)


def placed(w: Walk, entries: Entries, letters: Sequence[Letter], stands: Sequence[frozenset[int]]) -> dict[Place, Ids]:
    """Entries by the letter that their leaf stands on; a leaf that no one letter holds is only permuted."""
    placed_ids: dict[Place, Ids] = {}
    for (leaf, axis), ids in entries.items():
        dims = [axis] if axis != ANY else [d for d, leaves in enumerate(stands) if leaf in leaves]
        names = {letters[d] for d in dims}
        if len(names) != 1:
            w.slots.restrict(ids, Maps.PERMUTATION)
        for name in names:
            placed_ids[leaf, name] = ids
    return placed_ids


def contract(w: Walk, operands: Sequence[Operand], result: Sequence[Letter]) -> dict[Place, Ids]:
    """Entries of Σ Π operands over the letters that ``result`` lacks."""
    names = tuple(dict.fromkeys([*result, *(x for operand in operands for x in operand.letters)]))
    entries: dict[Place, Ids] = {}
    for place in dict.fromkeys(place for operand in operands for place in operand.slots):
        factors = [
            (_aligned(operand.slots[place], operand.letters, names), operand.power)
            for operand in operands
            if place in operand.slots
        ]
        holders = sum(place[1] in operand.has for operand in operands)
        if place[1] in result:
            ids = factors[0][0] if len(factors) == 1 and factors[0][1] == 1 else multiplied(w, factors, place[0])
            ids = w.slots.collapse(ids, range(len(result), len(names)))
            entries[place] = ids.reshape(ids.shape[: len(result)])
        elif len(factors) == holders == 2:
            w.slots.equal([ids for ids, _ in factors], dual=True)
        elif len(factors) == holders > 2:
            multiplied(w, factors, place[0], summed=True)
        else:
            for ids, _ in factors:
                w.slots.restrict(ids, Maps.ORTHOGONAL_ONES)
    return entries


def _aligned(ids: Ids, letters: Sequence[Letter], names: Sequence[Letter]) -> Ids:
    order = sorted(range(len(letters)), key=lambda d: names.index(letters[d]))
    sizes = dict(zip(letters, ids.shape))
    return ids.transpose(order).reshape([sizes.get(name, 1) for name in names])


def multiplied(w: Walk, factors: Sequence[tuple[Ids, Any]], leaf: int, summed: bool = False, signs: bool = True) -> Ids:
    """Slots of a product of powers, channel by channel; ``summed``: of one whose sum over the channels stays."""
    if all(ids.size == 1 for ids, _ in factors):
        return np.full_like(
            factors[0][0], _power(w, [(int(ids.flat[0]), p) for ids, p in factors], leaf, summed, signs)
        )
    arrays = np.broadcast_arrays(*(ids for ids, _ in factors))
    rows, inverse = unique_rows(np.stack([ids.reshape(-1) for ids in arrays], axis=1))
    powers = [power for _, power in factors]
    products = [_power(w, list(zip(row, powers)), leaf, summed, signs) for row in rows.tolist()]
    return np.array(products)[inverse].reshape(arrays[0].shape)


def _power(w: Walk, factors: Sequence[tuple[int, Any]], leaf: int, summed: bool, signs: bool) -> int:
    terms = [(slot, power) for slot, power in factors if slot >= 0]
    if not terms:
        return -1
    result = -1 if summed else w.slots.fresh(leaf)
    w.slots.multiply(terms if summed else [*terms, (result, -1)], signs)
    return result


def entries(found: dict[Place, Ids], result: Sequence[Letter]) -> Entries:
    """Slots by letter as entries of a tensor whose axes these letters are."""
    leaves = [leaf for leaf, _ in found]
    return {(leaf, result.index(x) if leaves.count(leaf) > 1 else ANY): ids for (leaf, x), ids in found.items()}


def added(w: Walk, result: Entries, bias: Any, dim: int, rank: int) -> Entries:
    """The result with a vector added along one of its axes."""
    if not isinstance(bias, fx.Node):
        return result
    bias_ids = {key: ids.reshape([-1 if d == dim else 1 for d in range(rank)]) for key, ids in w.entries(bias).items()}
    bias_ids = {(leaf, dim if (leaf, dim) in result else ANY): ids for (leaf, _), ids in bias_ids.items()}
    return sum_of(w, [(result, rank), (bias_ids, rank)], rank)


def sum_of(w: Walk, terms: Sequence[tuple[Entries, int]], rank: int) -> Entries:
    """Tensors, each with its rank, aligned to the right and added: all carry one map; one without is uniform."""
    terms_of: dict[Key, list[Ids]] = {}
    for entries, own_rank in terms:
        for (leaf, axis), ids in entries.items():
            key = leaf, axis + rank - own_rank if axis != ANY else ANY
            terms_of.setdefault(key, []).append(padded(ids, rank))
    result: Entries = {}
    for key, arrays in terms_of.items():
        result[key] = w.slots.equal(arrays) if len(arrays) > 1 else arrays[0]
        if len(arrays) < len(terms):
            w.slots.restrict(result[key], Maps.ORTHOGONAL_ONES)
    return result


# operators ----------------------------------------------------------------------------------------------------------


def linear(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries:
    rank = len(w.sizes(node))
    batch = list(range(rank - 1))
    x, weight = operand(w, a["input"], [*batch, "i"]), operand(w, a["weight"], ["o", "i"])
    out = [*batch, "o"]
    return added(w, entries(contract(w, [x, weight], out), out), a.get("bias"), rank - 1, rank)


def matmul(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
    left, right = (v for v in a.values() if isinstance(v, fx.Node))
    return _matmul(w, node, left, right)


def _matmul(w: Walk, node: fx.Node, left: fx.Node, right: fx.Node) -> Entries:
    """Batch axes are counted from the right."""
    ranks = len(w.sizes(left)), len(w.sizes(right))
    first = [*(f"b{d}" for d in range(ranks[0] - 2, 0, -1)), "n", "k"][-ranks[0] :]
    second = [*(f"b{d}" for d in range(ranks[1] - 2, 0, -1)), "k", "m"] if ranks[1] > 1 else ["k"]
    batch = max(max(ranks) - 2, 0)
    out = [f"b{d}" for d in range(batch, 0, -1)] + ["n"] * (ranks[0] > 1) + ["m"] * (ranks[1] > 1)
    return entries(contract(w, [operand(w, left, first), operand(w, right, second)], out), out)


def grouped_product(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
    """Each row has the matrix of one expert."""
    rows, matrices, _ = routing.factors(a)
    for ids in w.on(matrices, {0}).values():
        w.slots.restrict(ids, Maps.PERMUTATION)
    return entries(contract(w, [operand(w, rows, "tk"), operand(w, matrices, "ekn")], "tn"), "tn")


def addmm(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
    bias, left, right = (v for v in a.values() if isinstance(v, fx.Node))
    result = _matmul(w, node, left, right)
    rank = len(w.sizes(node))
    return sum_of(w, [(result, rank), (w.entries(bias), len(w.sizes(bias)))], rank)


def embedding(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries:
    rank = len(w.sizes(node))
    for ids in w.entries(a["indices"]).values():
        w.slots.restrict(ids, Maps.PERMUTATION)
    indices = list(range(rank - 1))
    weight = operand(w, a["weight"], ["v", "c"])
    numbers = operand(w, a["indices"], indices)
    return entries(contract(w, [weight, numbers], [*indices, "c"]), [*indices, "c"])


def convolution(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
    """Letters: g groups, i and o channels of one; a kernel of one that neither strides nor pads keeps positions."""
    if isinstance(a["groups"], fx.Node):
        return None
    groups, rank = int(a["groups"]), len(w.sizes(node))
    kernels = len(w.sizes(a["weight"])) - 2
    channel = rank - kernels - 1
    keeps = w.sizes(a["input"])[channel + 1 :] == w.sizes(node)[channel + 1 :]
    keeps = keeps and all(size == 1 for size in w.sizes(a["weight"])[2:])
    spatial = [f"s{d}" for d in range(kernels)]
    batch = list(range(channel))
    x = _factored(w, a["input"], channel, groups, [*batch, "g", "i", *spatial])
    inside = ["i", "o"] if is_transposed(node) else ["o", "i"]
    weight = _factored(w, a["weight"], 0, groups, ["g", *inside, *(f"k{d}" for d in range(kernels))])
    if x is None or weight is None:
        return None
    out = [*batch, "g", "o", *(spatial if keeps else [f"t{d}" for d in range(kernels)])]
    products = contract(w, [x, weight], out)
    joined = {key: _joined(w, ids, channel, groups, w.sizes(node)[channel]) for key, ids in products.items()}
    names = [*batch, "c", *out[channel + 2 :]]
    result = entries({(leaf, "c" if x in ("g", "o") else x): ids for (leaf, x), ids in joined.items()}, names)
    return added(w, result, a.get("bias"), channel, rank)


def _factored(w: Walk, node: fx.Node, dim: int, groups: int, letters: list[Letter]) -> Operand | None:
    """A tensor whose axis ``dim`` is seen as groups × channels."""
    shape, sizes = w.shape(node), w.sizes(node)
    if shape is None:
        return Operand(tuple(letters), frozenset(letters), {})
    inner = sizes[dim] // groups
    stands: list[frozenset[int]] = w.stands(node)
    if groups == 1:
        parts: list[frozenset[int]] | None = [frozenset(), stands[dim]]
    else:
        parts = w.spaces.parts(shape.axes[dim], (groups, inner))
    if parts is None:
        return None
    cut: Entries = {}
    for (leaf, axis), ids in w.entries(node).items():
        size = ids.shape[dim]
        middle = (1, 1) if size == 1 else (groups, inner)
        new = ids.reshape((*ids.shape[:dim], *middle, *ids.shape[dim + 1 :]))
        if axis == dim:
            axis = dim + 1 if leaf in parts[1] else dim
        elif axis != ANY:
            axis += axis > dim
        cut[leaf, axis] = new
    wide = [*stands[:dim], *parts, *stands[dim + 1 :]]
    has = frozenset(letters) - ({"g"} if groups == 1 else set())
    return Operand(tuple(letters), has, placed(w, cut, letters, wide))


def _joined(w: Walk, ids: Ids, channel: int, groups: int, size: int) -> Ids:
    """Groups × channels as one axis again."""
    before, middle, after = ids.shape[:channel], ids.shape[channel : channel + 2], ids.shape[channel + 2 :]
    if middle != (1, 1):
        ids = np.broadcast_to(ids, (*before, groups, size // groups, *after))
        return ids.reshape((*before, size, *after))
    return ids.reshape((*before, 1, *after))


def attention(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries:
    """Queries and keys meet in an inner product, values pass; heads and tokens are only permuted (softmax)."""
    q, k, v = (a[name] for name in ("query", "key", "value"))
    rank = len(w.sizes(q))
    mask = a.get("attn_mask") or a.get("attn_bias")
    for x in (q, k, v, mask):
        inner = w.on(x, {rank - 1}) if x is not None and x is not mask else {}
        for key, ids in w.entries(x).items():
            if key not in inner:
                w.slots.restrict(ids, Maps.PERMUTATION)
    batch = list(range(rank - 2))
    names = ([*batch, "L", "e"], [*batch, "S", "e"], [*batch, "S", "d"])
    queries, keys, values = (_heads(w, operand(w, x, axes), a) for x, axes in zip((q, k, v), names))
    contract(w, [queries, keys], [*batch, "L", "S"])
    out = [*batch, "L", "d"]
    return entries(contract(w, [values], out), out)


def _heads(w: Walk, x: Operand, a: dict[str, Any]) -> Operand:
    """Where heads of keys serve several of queries, all go through one map."""
    if not a.get("enable_gqa"):
        return x
    return Operand(x.letters, x.has, {p: w.slots.collapse(ids, range(ids.ndim - 1)) for p, ids in x.slots.items()})


def fused_attention(w: Walk, node: fx.Node, a: dict[str, Any]) -> list[Any]:
    return [attention(w, node, a), *[None] * (len(node.meta["val"]) - 1)]


def einsum(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries | None:
    tensors = a["tensors"]
    terms, result = letters_of.parse(a["equation"], [len(w.sizes(x)) for x in tensors])
    if any(len(set(term)) < len(term) for term in terms):
        return None
    out = list(result)
    return entries(contract(w, [operand(w, x, list(term)) for x, term in zip(tensors, terms)], out), out)


def dot(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries:
    """Two vectors; those of spectral norm are kept at their length."""
    tensors = [value for value in a.values() if isinstance(value, fx.Node)]
    for x in tensors:
        for ids in w.entries(x).values():
            w.slots.restrict(ids, Maps.ORTHOGONAL)
    return entries(contract(w, [operand(w, x, ["i"]) for x in tensors], []), [])


def bilinear(w: Walk, node: fx.Node, a: dict[str, Any]) -> Entries:
    rank = len(w.sizes(node))
    batch = list(range(rank - 1))
    letters: dict[str, list[Letter]] = {"input1": [*batch, "i"], "input2": [*batch, "j"], "weight": ["o", "i", "j"]}
    factors = [operand(w, a[name], axes) for name, axes in letters.items()]
    return added(w, entries(contract(w, factors, [*batch, "o"]), [*batch, "o"]), a.get("bias"), rank - 1, rank)


def product(w: Walk, node: fx.Node, operands: Sequence[tuple[fx.Node, int]]) -> Entries:
    """Tensors to powers, aligned to the right and multiplied position by position."""
    rank = len(w.sizes(node))
    factors = [operand(w, x, range(rank - len(w.sizes(x)), rank), power) for x, power in operands]
    return entries(contract(w, factors, list(range(rank))), list(range(rank)))
