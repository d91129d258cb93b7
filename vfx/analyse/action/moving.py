"""Operators that move positions: they are run on the slot numbers themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from vfx.analyse.action.contraction import sum_of
from vfx.analyse.action.entries import ANY, Entries, Ids, constant, padded, shrunk
from vfx.analyse.action.walk import SAMPLES, Walk
from vfx.analyse.rules.rule import normal
from vfx.operators import is_in_place
from vfx.program import Value

Arguments = dict[str, Any]


def moved(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """One tensor whose positions go elsewhere, or into several tensors."""
    x = _moving(w, node)
    return None if x is None or _stands_on_several(w, x) else _rearranged(w, node, x)


def viewed(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """The same positions in order under another shape."""
    x = _moving(w, node)
    return None if x is None or _stands_on_several(w, x) else _rearranged(w, node, x, view=True)


def turned(w: Walk, node: fx.Node, a: Arguments) -> Any:
    """Axes that change places, and with them the leaves that stand on several."""
    x = _moving(w, node)
    if x is None:
        return None
    return _turned(w, node, x) if _stands_on_several(w, x) else _rearranged(w, node, x)


def _moving(w: Walk, node: fx.Node) -> fx.Node | None:
    """The one operand whose slots go elsewhere; None where others have slots, too."""
    (x, *others) = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), Value)]
    return None if any(w.entries(tensor) for tensor in others) else x


def _stands_on_several(w: Walk, x: fx.Node) -> bool:
    return any(axis != ANY for _, axis in w.entries(x))


def _rearranged(w: Walk, node: fx.Node, x: fx.Node, view: bool = False) -> Any:
    entries = w.entries(x)
    value = node.meta["val"]
    ranks = [len(part.shape) for part in value] if isinstance(value, list) else [len(value.shape)]
    results: list[Entries] = [{} for _ in ranks]
    for key, ids in entries.items():
        if ids.size == 1:
            runs: list[Ids] = [constant(int(ids.flat[0]), rank) for rank in ranks]
        else:
            run = _run(w, node, x, ids, view)
            if run is None:
                return None
            runs = run
        for result, kept_ids in zip(results, runs):
            if (kept_ids >= 0).any():
                result[key] = kept_ids
    return results if isinstance(value, list) else results[0]


def _run(w: Walk, node: fx.Node, x: fx.Node, ids: Ids, view: bool) -> list[Ids] | None:
    """The operator on slot numbers: every position takes its slot with it."""
    tensor = torch.tensor(ids).expand(w.sizes(x))
    if view:
        return [_compact(tensor.reshape(w.sizes(node)))]
    try:
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda argument: tensor if argument is x else _known(w, argument)
        )
        out = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return None
    return [_compact(part) for part in (out if isinstance(out, (list, tuple)) else [out])]


def _known(w: Walk, node: fx.Node) -> Any:
    """A constant, or a size."""
    value = w.t.constant(node)
    if value is not None:
        return value
    size = node.meta["val"]
    if isinstance(size, Value):
        raise KeyError(node.name)
    return int(Value((size,), torch.int64).sizes(SAMPLES)[0])


def _compact(tensor: torch.Tensor) -> Ids:
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(d, 0, 1)
    return shrunk(tensor.numpy())


def _turned(w: Walk, node: fx.Node, x: fx.Node) -> Entries | None:
    """Axes change places, and with them the leaves that stand on several."""
    rank = len(w.sizes(x))
    marks = torch.zeros([2 + d for d in range(rank)])
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: marks if argument is x else _known(w, argument))
    order = [size - 2 for size in node.target(*args, **kwargs).shape]  # type: ignore[operator]
    return {
        (leaf, order.index(axis) if axis != ANY else ANY): ids.transpose(order)
        for (leaf, axis), ids in w.entries(x).items()
    }


def expanded(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    """Broadcasting: what does not vary goes on not varying."""
    x = next(operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Value))
    return _broadcast(w, x, w.t.shapes[node])


def broadcast_tensors(w: Walk, node: fx.Node, a: Arguments) -> list[Entries]:
    return [_broadcast(w, x, shape) for x, shape in zip(a["tensors"], w.t.shapes[node])]


def _broadcast(w: Walk, x: fx.Node, shape: Any) -> Entries:
    rank = len(shape.axes)
    gain = rank - len(w.sizes(x))
    wider = {
        (leaf, axis + gain if axis != ANY else ANY): padded(ids, rank) for (leaf, axis), ids in w.entries(x).items()
    }
    return w.uniform(shape, wider)


def concatenated(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    rank = len(w.sizes(node))
    tensors = [x for x in a["tensors"] if len(w.sizes(x)) == rank]
    return _beside(w, tensors, [w.entries(x) for x in tensors], normal(a["dim"], rank))


def stacked(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    d = normal(a["dim"], len(w.sizes(node)))
    return _beside(w, None, [_widened(w.entries(x), d) for x in a["tensors"]], d)


def _widened(entries: Entries, d: int) -> Entries:
    """A new axis of size 1."""
    return {
        (leaf, axis + (axis >= d) if axis != ANY else ANY): np.expand_dims(ids, d)
        for (leaf, axis), ids in entries.items()
    }


def _beside(w: Walk, tensors: list[fx.Node] | None, operands: list[Entries], d: int) -> Entries | None:
    """Arrays one after the other along an axis; -1 where a tensor has no slot."""
    result: Entries = {}
    sizes = [1] * len(operands) if tensors is None else [w.sizes(x)[d] for x in tensors]
    for key in dict.fromkeys(key for entries in operands for key in entries):
        if key[1] == d and sum(key in entries for entries in operands) < len(operands):
            return None
        arrays = [entries.get(key) for entries in operands]
        shape = np.broadcast_shapes(*(_without(ids, d) for ids in arrays if ids is not None))
        parts = [
            np.broadcast_to(-1 if ids is None else ids, (*shape[:d], size, *shape[d + 1 :]))
            for ids, size in zip(arrays, sizes)
        ]
        result[key] = shrunk(np.concatenate(parts, d))
    return result


def _without(ids: Ids, d: int) -> tuple[int, ...]:
    return tuple(1 if k == d else size for k, size in enumerate(ids.shape))


def padding(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """Zeros go through any map; another number through none along the axes that it is put on."""
    if a.get("mode", "constant") != "constant":
        return copied_padding(w, node, a)
    return _padded(w, node, a, zeros=True) if a.get("value") in (None, 0, 0.0) else None


def copied_padding(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """Positions that are repeated at both ends of an axis."""
    return _padded(w, node, a, zeros=False)


def _padded(w: Walk, node: fx.Node, a: Arguments, zeros: bool) -> Entries | None:
    x = a["self"]
    amounts = list(a.get("pad") or a.get("padding") or ())
    rank = len(w.sizes(node))
    if any(isinstance(amount, fx.Node) for amount in amounts):
        return None
    touched = {rank - 1 - index // 2 for index, amount in enumerate(amounts) if amount != 0}
    over = w.on(x, touched)
    result: Entries = {}
    for key, ids in w.entries(x).items():
        if key in over and not zeros:
            return None
        if key in over:
            sizes = [size if d in touched else ids.shape[d] for d, size in enumerate(w.sizes(x))]
            pairs = [(0, 0)] * rank
            for index in range(len(amounts) // 2):
                pairs[rank - 1 - index] = (amounts[2 * index], amounts[2 * index + 1])
            if any(amount < 0 for pair in pairs for amount in pair):
                return None
            result[key] = np.pad(np.broadcast_to(ids, sizes), pairs, constant_values=-1)
        else:
            result[key] = w.slots.collapse(ids, touched)
    return result


def one_kind(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    """Sampling, and windows written out or summed: linear in each channel, one map for all positions."""
    x = a.get("input", a.get("self"))
    rank = len(w.sizes(node))
    result: Entries = {}
    for key, ids in w.entries(x).items():
        ids = w.slots.collapse(ids, range(ids.ndim))
        result[key[0], ANY] = constant(int(ids.flat[0]), rank)
    return result


def sampled(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    return None if w.entries(a["grid"]) else one_kind(w, node, a)


def complex_pairs(w: Walk, node: fx.Node, a: Arguments) -> Entries | None:
    """Real maps do the same to real and imaginary parts."""
    entries = w.entries(a["self"])
    if any(ids.shape[-1] != 1 for ids in entries.values()):
        return None
    return {key: ids[..., 0] for key, ids in entries.items()}


def real_pairs(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    return {key: ids[..., None] for key, ids in w.entries(a["self"]).items()}


def copied(w: Walk, node: fx.Node, a: Arguments) -> Entries:
    """Written in place the source goes through the map of what it overwrites."""
    rank = len(w.sizes(node))
    names = ("self", "src") if is_in_place(node) else ("src",)
    return sum_of(w, [(w.entries(a[name]), len(w.sizes(a[name]))) for name in names], rank)
