"""Normalization layers: what their statistics leave, and gains that take one scale in and give another out."""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.action.contraction import multiplied, sum_of
from vfx.analyse.action.entries import ANY, Entries, Ids
from vfx.analyse.action.walk import Walk
from vfx.analyse.classes import Maps

Arguments = dict[str, Any]


def per_channel(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """batch_norm by running statistics: x, mean and shift scale, the gain takes up the ratio, the variance stays.

    Statistics of the batch, and instance_norm's, take a scale away, but for the ε beside the variance: signs pass.
    """
    x = a["input"]
    rank = len(w.sizes(x))
    running = isinstance(a.get("running_mean"), fx.Node) and isinstance(a.get("running_var"), fx.Node)
    running = running and not a.get("training", a.get("use_input_stats", False))
    result: Entries = {}
    channels = w.on(x, {1})
    mean = {key[0]: _placed(ids, 1, rank) for key, ids in w.entries(a.get("running_mean")).items()}
    for ids in w.entries(a.get("running_var")).values():
        w.slots.restrict(ids, Maps.PERMUTATION)
    for key, ids in w.entries(x).items():
        if key not in channels:
            w.slots.restrict(ids, Maps.PERMUTATION)
            result[key] = ids
            continue
        ids = w.slots.collapse(ids, [d for d in range(rank) if d != 1])
        w.slots.restrict(ids, Maps.MONOMIAL if running else Maps.SIGNED)
        result[key] = w.slots.equal([ids, mean[key[0]]]) if key[0] in mean else ids
    return _listed(node, _affine(w, result, a, 1, rank))


def layer_norm(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Over the last axes: orthogonal maps keep the length; with a mean taken off they must fix the all-ones vector."""
    x = a["input"]
    rank = len(w.sizes(x))
    first = rank - len(a["normalized_shape"])
    centred = "rms" not in str(node.target)
    over = w.on(x, set(range(first, rank)))
    for key, ids in w.entries(x).items():
        if key not in over:
            w.slots.restrict(ids, Maps.PERMUTATION)
        else:
            w.slots.restrict(ids, Maps.ORTHOGONAL_ONES if centred else Maps.ORTHOGONAL)
    result = {key: w.slots.collapse(ids, range(first)) if key in over else ids for key, ids in w.entries(x).items()}
    return _listed(node, _affine(w, result, a, first, rank))


def group_norm(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """As LayerNorm inside each group; the groups themselves are permuted."""
    x = a["input"]
    shape = w.shape(x)
    groups = int(a.get("num_groups") or a["group"])
    rank, channels = len(w.sizes(x)), w.sizes(x)[1]
    parts = w.spaces.parts(shape.axes[1], (groups, channels // groups)) if shape is not None else None
    if parts is None:
        return None
    inside = {key for key in w.on(x, {1}) if key[0] in parts[1] and key[0] not in parts[0]}
    for key, ids in w.entries(x).items():
        w.slots.restrict(ids, Maps.ORTHOGONAL_ONES if key in inside else Maps.PERMUTATION)
    result = {key: w.slots.collapse(ids, [0, *range(2, rank)]) for key, ids in w.entries(x).items()}
    return _listed(node, _affine(w, result, a, 1, rank))


def weight_norm(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """v to the length g along one axis: g scales there, and orthogonal maps of the other axes keep the length."""
    v, g = w.entries(a["v"]), w.entries(a["g"])
    result: Entries = {}
    for key, ids in v.items():
        gain = g.get(key, g.get((key[0], ANY)))
        if gain is None:
            w.slots.restrict(ids, Maps.ORTHOGONAL)
            result[key] = ids
        else:
            w.slots.restrict(ids, Maps.SIGNED)
            result[key] = multiplied(w, [(ids, 1), (gain, 1)], key[0])
    return [result, g] if isinstance(node.meta["val"], list) else result


def softmax(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    result = w.entries(a["self"])
    for ids in result.values():
        w.slots.restrict(ids, Maps.PERMUTATION)
    return result


def _affine(w: Walk, result: Entries, a: Arguments, first: int, rank: int) -> Entries:
    """Gain and shift on the axes from ``first``; channels of BatchNorm and GroupNorm stand on axis 1.

    A leaf along which the normalized value is uniform is left out: it is only permuted.
    """
    weight, bias = (
        {leaf: _placed(ids, first, rank) for (leaf, _), ids in w.entries(a.get(name)).items()}
        for name in ("weight", "bias")
    )
    for key, ids in result.items():
        if key[0] in weight:
            result[key] = multiplied(w, [(ids, 1), (weight[key[0]], 1)], key[0])
    if isinstance(a.get("bias"), fx.Node):
        shift = {key: bias[key[0]] for key in result if key[0] in bias}
        result = sum_of(w, [(result, rank), (shift, rank)], rank)
    return result


def _placed(ids: Ids, first: int, rank: int) -> Ids:
    """A parameter of the normalized axes, aligned with a tensor."""
    return ids.reshape((1,) * first + ids.shape + (1,) * (rank - first - ids.ndim))


def _listed(node: fx.Node, result: Entries) -> Any:
    value = node.meta["val"]
    return [result, *[None] * (len(value) - 1)] if isinstance(value, list) else result
