"""Sizes in operators' arguments, derived anew from the shapes of what they read and give.

The functions below are the kinds of ``Operator.resize``: one for each way in which arguments name sizes, positions or
numbers of groups. All other operators take their sizes from their operands (OPERANDS); that the kinds are right is
checked by running the resized graph (``vfx.resize.program``). What cannot be said with new sizes is refused with
PassError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.meaning import NUMBERS
from vfx.analyse.places import Index
from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import Digit, Shape
from vfx.errors import PassError
from vfx.operators import arguments, is_transposed, operator_of
from vfx.program import Value
from vfx.resize.implied import recurrent_width
from vfx.resize.layout import Layout


class Rewriter:
    """One graph being resized: ``layout`` of the old nodes, new nodes, and constants made on the way."""

    def __init__(self, layout: Layout, constant: Callable[[fx.Node], torch.Tensor | None]):
        self.layout, self.constant = layout, constant
        self.constants: dict[str, torch.Tensor] = {}

    def rewrite(self, node: fx.Node, new: fx.Node) -> None:
        """Bring the arguments of ``new``, a copy of ``node``, to the new sizes."""
        rewrite = REWRITES.get(operator_of(node).resize)
        if rewrite is not None:
            rewrite(self, node, new, arguments(node))
            new.meta["sizes"] = _told(node, new)

    def entry(self, node: Any, dim: int) -> Axis | Digit:
        shape = self.layout.shape(node)
        assert shape is not None
        return shape.axes[dim]

    def changed(self, node: Any, dim: int) -> bool:
        shape = self.layout.shape(node)
        return shape is not None and self.layout.changed(shape.axes[dim])

    def resized(self, node: fx.Node) -> bool:
        """Whether any axis of a node's value changes."""
        shape = self.layout.shapes.get(node)
        shapes = shape if isinstance(shape, (list, tuple)) else [shape]
        return any(isinstance(s, Shape) and any(map(self.layout.changed, s.axes)) for s in shapes)

    def add_constant(self, new: fx.Node, tensor: torch.Tensor) -> fx.Node:
        """A node in front of ``new`` that reads a tensor made here."""
        name = f"resized.{new.name}"
        self.constants[name] = tensor
        with new.graph.inserting_before(new):
            return new.graph.create_node("get_attr", name, name=f"{new.name}_index")


Rewrite = Callable[[Rewriter, fx.Node, fx.Node, dict[str, Any]], None]


def put(new: fx.Node, name: str, value: Any) -> None:
    """Set an argument of an ATen call by name."""
    for index, argument in enumerate(new.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name and index < len(new.args):
            new.update_arg(index, value)
            return
    new.update_kwarg(name, value)


def _told(node: fx.Node, new: fx.Node) -> tuple[tuple[int, int], ...]:
    """The numbers among a call's arguments before and after; of a call that is resized twice, before all of it."""
    before, after = arguments(node), arguments(new)
    after = after | {name[:-1]: value for name, value in after.items() if name == "split_sizes"}
    pairs: list[tuple[int, int]] = []
    for name, old in before.items():
        fresh = after.get(name)
        olds = list(old) if isinstance(old, (list, tuple)) else [old] * (len(fresh) if isinstance(fresh, list) else 1)
        news = list(fresh) if isinstance(fresh, (list, tuple)) else [fresh]
        pairs += [(x, y) for x, y in zip(olds, news) if type(x) is type(y) is int]
    earlier = node.meta.get("sizes")
    return tuple((first, dict(pairs).get(last, last)) for first, last in earlier) if earlier else tuple(pairs)


# sizes of the result --------------------------------------------------------------------------------------------------


def view(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """A list of sizes; a computed one of an axis that changes becomes -1, which views work out."""
    _sizes(r, node, new, a, free=True)


def made(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """expand, zeros: a list of sizes, one for each of the result's last axes."""
    _sizes(r, node, new, a, free=False)


def _sizes(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any], free: bool) -> None:
    name = "size" if "size" in a else "shape"
    shape = r.layout.shape(node)
    if name not in a or shape is None or not r.resized(node):  # a view without sizes reads the bits as another type
        return
    sizes = list(arguments(new)[name])
    for index, (size, entry) in enumerate(zip(sizes, shape.axes[len(shape.axes) - len(sizes) :])):
        if not r.layout.changed(entry) or size == -1:
            continue
        if isinstance(size, int):
            sizes[index] = r.layout.size(entry)
        elif free and -1 not in sizes:
            sizes[index] = -1
        else:
            raise PassError(f"{node.name}: a computed size of an axis that changes")
    put(new, name, sizes)


def unflatten(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    shape, x = r.layout.shape(node), r.layout.shape(a["self"])
    if shape is None or x is None or not r.resized(node):
        return
    first = normal(a["dim"], len(x.axes))
    sizes = [r.layout.size(e) if isinstance(s, int) and s != -1 else s for s, e in zip(a["sizes"], shape.axes[first:])]
    put(new, "sizes", sizes)


def repeat(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """Numbers of copies: the ratio of result and operand."""
    name = "repeats" if "repeats" in a else "dims"
    shape, x = r.layout.shape(node), r.layout.shape(a["self"])
    if shape is None or x is None or not r.resized(node):
        return
    rank = len(shape.axes)
    before = [1] * (rank - len(x.axes)) + [r.layout.size(e) for e in x.axes]
    copies = list(arguments(new)[name])
    offset = rank - len(copies)
    for index, count in enumerate(copies):
        entry = shape.axes[offset + index]
        if r.layout.changed(entry) and isinstance(count, int):
            copies[index] = r.layout.size(entry) // before[offset + index]
    put(new, name, copies)


def repeat_interleave(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    x, shape = r.layout.shape(a["self"]), r.layout.shape(node)
    if x is None or shape is None or not isinstance(a["repeats"], int) or not r.resized(node):
        return
    dim = normal(a["dim"] or 0, len(x.axes))
    old = r.layout.size(x.axes[dim]) if a["dim"] is not None else int(np.prod([r.layout.size(e) for e in x.axes]))
    put(new, "repeats", r.layout.size(shape.axes[dim]) // old)
    if a.get("output_size") is not None:
        put(new, "output_size", r.layout.size(shape.axes[dim]))


# positions ------------------------------------------------------------------------------------------------------------


def _kept_run(r: Rewriter, x: Any, dim: int, old: range) -> range | Index:
    """New positions of old ones: a range where they are evenly spaced, else an index."""
    where = np.flatnonzero(np.isin(r.layout.positions(r.entry(x, dim)), np.array(old)))
    steps = np.unique(np.diff(where))
    if len(where) and len(steps) < 2:
        step = int(steps[0]) if len(steps) else 1
        return range(int(where[0]), int(where[-1]) + 1, step)
    return where


def _changed_dim(r: Rewriter, a: dict[str, Any]) -> int | None:
    """The axis that a call is about, if it changes."""
    shape = r.layout.shape(a["self"])
    dim = None if shape is None else normal(a["dim"], len(shape.axes))
    return dim if dim is not None and r.changed(a["self"], dim) else None


def slice_(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """Start and end (of what is read, or written by slice_scatter) by the positions that are left."""
    x, dim = a["self"], _changed_dim(r, a)
    if dim is None:
        return
    if isinstance(a["start"], fx.Node) or isinstance(a["end"], fx.Node):
        raise PassError(f"{node.name}: a computed cut through an axis that changes")
    chosen = _kept_run(r, x, dim, range(*slice(a["start"], a["end"], a["step"]).indices(r.entry(x, dim).size)))
    if isinstance(chosen, range):
        put(new, "dim", dim)
        put(new, "start", chosen.start)
        put(new, "end", chosen.stop)
        put(new, "step", chosen.step)
    elif operator_of(node).ties == "slice":
        index = r.add_constant(new, torch.from_numpy(chosen))
        new.target, new.args, new.kwargs = torch.ops.aten.index_select.default, (new.args[0], dim, index), {}
    else:
        raise PassError(f"{node.name}: what is left of the written positions is not evenly spaced")


def narrow(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    dim = _changed_dim(r, a)
    if dim is None:
        return
    chosen = _kept_run(r, a["self"], dim, range(a["start"], a["start"] + a["length"]))
    if not isinstance(chosen, range) or chosen.step != 1:
        raise PassError(f"{node.name}: what is left is not one run of positions")
    put(new, "start", chosen.start)
    put(new, "length", len(chosen))


def select(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """One position, which nothing can remove (it is used apart from the rest), counted anew."""
    dim = _changed_dim(r, a)
    if dim is None:
        return
    axis = r.entry(a["self"], dim)
    where = np.flatnonzero(r.layout.positions(axis) == a["index"] % axis.size)
    if len(where) != 1:
        raise PassError(f"{node.name}: the selected position is not among those kept")
    put(new, "index", int(where[0]))


def split(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """split, chunk, split_with_sizes: sizes of the results, one by one."""
    dim = _changed_dim(r, a)
    if dim is None:
        return
    sizes = [r.layout.size(result.axes[dim]) for result in r.layout.shapes[node]]
    new.target, new.args, new.kwargs = torch.ops.aten.split_with_sizes.default, (new.args[0], sizes, dim), {}


def unbind(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    if _changed_dim(r, a) is not None:
        raise PassError(f"{node.name}: positions taken apart one by one cannot be removed")


def _names_kept(r: Rewriter, value: fx.Node) -> bool:
    """Whether values are numbers of positions that are counted anew by what gives them (a router's experts)."""
    shape = r.layout.shape(value)
    return shape is not None and shape.meaning is not None and shape.meaning.kind == NUMBERS


def index(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """A constant list of positions along an axis that changes: those that are left, counted anew."""
    x = r.layout.shape(a["self"])
    if x is None:
        return
    if "dim" in a:
        dims, values = [normal(a["dim"], len(x.axes))], [a["index"]]
    else:
        dims = [d for d, value in enumerate(a["indices"]) if value is not None]
        values = [a["indices"][d] for d in dims]
    if not any(r.changed(a["self"], d) for d in dims):
        return
    if len(dims) == 1 and _names_kept(r, values[0]):
        return
    places = r.constant(values[0])
    if len(dims) > 1 or places is None or places.ndim != 1:
        raise PassError(f"{node.name}: computed positions of an axis that changes")
    number = np.full(x.axes[dims[0]].size, -1, np.int64)
    left = r.layout.positions(x.axes[dims[0]])
    number[left] = np.arange(len(left))
    kept = number[places.cpu().numpy()[r.layout.positions(r.entry(node, dims[0]))]]
    if (kept < 0).any():
        raise PassError(f"{node.name}: a position that is read is not among those kept")
    fresh = r.add_constant(new, torch.from_numpy(kept).to(places.device))
    if "dim" in a:
        put(new, "index", fresh)
    else:
        put(new, "indices", [fresh if d == dims[0] else None for d in range(len(a["indices"]))])


def pad(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """Amounts on both sides of an axis: how many of the new positions are padding."""
    x = r.layout.shape(a["self"] if "self" in a else a["input"])
    name = "pad" if "pad" in a else "padding"
    if x is None or not r.resized(node):
        return
    amounts = list(a[name])
    for k in range(len(amounts) // 2):
        dim = len(x.axes) - 1 - k
        if not r.changed(node, dim):
            continue
        size = x.axes[dim].size
        old = r.layout.positions(r.entry(node, dim)) - amounts[2 * k]
        amounts[2 * k : 2 * k + 2] = int((old < 0).sum()), int((old >= size).sum())
    put(new, name, amounts)


def roll(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    x = r.layout.shape(a["self"])
    if x is None or not r.resized(node):
        return
    shifts = list(a["shifts"]) if isinstance(a["shifts"], (list, tuple)) else [a["shifts"]]
    if not a["dims"]:
        raise PassError(f"{node.name}: a roll over all axes at once, some of which change")
    for k, dim in enumerate(dims_of(a["dims"], len(x.axes))):
        if r.changed(a["self"], dim):
            size = x.axes[dim].size
            shifts[k] = int((r.layout.positions(x.axes[dim]) >= size - shifts[k] % size).sum())
    put(new, "shifts", shifts)


def squeeze(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """The axes that were of size 1, by number: another may have become so."""
    x = r.layout.shape(a["self"])
    if x is None or not r.resized(a["self"]):
        return
    dims = [d for d in dims_of(a.get("dim"), len(x.axes)) if x.axes[d].size == 1]
    new.target, new.args, new.kwargs = torch.ops.aten.squeeze.dims, (new.args[0], dims), {}


# groups and norms -----------------------------------------------------------------------------------------------------


def convolution(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """Number of groups: input channels over the weight's (output channels where transposed)."""
    if a["groups"] == 1 or isinstance(a["groups"], fx.Node):
        return
    x, w = r.layout.shape(a["input"]), r.layout.shape(a["weight"])
    assert x is not None
    assert w is not None
    channel = len(x.axes) - len(w.axes) + 1
    whole = r.entry(node, channel) if is_transposed(node) else x.axes[channel]
    groups, rest = divmod(r.layout.size(whole), r.layout.size(w.axes[1]))
    if rest:
        raise PassError(f"{node.name}: the groups of this convolution would differ in their number of channels")
    put(new, "groups", groups)


def group_norm(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    name = "num_groups" if "num_groups" in a else "group"
    shape = r.layout.shape(a["input"])
    if shape is None or not r.changed(a["input"], 1):
        return
    count, size = int(a[name]), shape.axes[1].size
    left = r.layout.positions(shape.axes[1]) // (size // count)
    channels = np.bincount(left)
    if len(np.unique(channels[channels > 0])) != 1:
        raise PassError(f"{node.name}: the groups of this norm would differ in their number of channels")
    put(new, name, int((channels > 0).sum()))
    if name == "group":
        put(new, "C", len(left))


def layer_norm(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    shape = r.layout.shape(a["input"])
    if shape is not None:
        axes = shape.axes[len(shape.axes) - len(a["normalized_shape"]) :]
        put(new, "normalized_shape", [r.layout.size(entry) for entry in axes])


def attention(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """The default scale is 1/√d of the queries: it stays that of the original network."""
    q = r.layout.shape(a["query"])
    if q is not None and a.get("scale") is None and r.changed(a["query"], len(q.axes) - 1):
        put(new, "scale", q.axes[-1].size ** -0.5)
        new.meta["default_scale"] = True  # in the user's class


def channel_shuffle(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    shape = r.layout.shape(a["self"])
    if shape is None or not r.changed(a["self"], 1):
        return
    size = shape.axes[1].size // a["groups"]
    put(new, "groups", len(np.unique(r.layout.positions(shape.axes[1]) // size)))


def recurrent(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """Initial states that are alike in all features tie nothing: they get the features' new number here."""
    states = a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    fresh = list(arguments(new)["hx"]) if isinstance(a["hx"], (list, tuple)) else [arguments(new)["hx"]]
    for k, (state, parameter) in enumerate(zip(states, recurrent_width(a))):
        size = r.layout.size(r.entry(parameter, 1))
        if r.layout.size(r.entry(state, 2)) != size:
            fresh[k] = _widened(new, fresh[k], size)
    put(new, "hx", fresh if isinstance(a["hx"], (list, tuple)) else fresh[0])


def _widened(new: fx.Node, state: fx.Node, size: int) -> fx.Node:
    """``size`` copies of a state's first feature."""
    value = state.meta["val"]
    with new.graph.inserting_before(new):
        first = new.graph.call_function(torch.ops.aten.slice.Tensor, (state, 2, 0, 1))
        wide = new.graph.call_function(torch.ops.aten.repeat.default, (first, [1, 1, size]))
    for made_node, width in ((first, 1), (wide, size)):
        made_node.meta["val"] = Value((*value.shape[:2], width), value.dtype)
    return wide


def histogram(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """An interval for each number that is left."""
    if r.changed(node, 0):
        size = r.layout.size(r.entry(node, 0))
        put(new, "bins", size)
        put(new, "max", size - 1)


def one_hot(r: Rewriter, node: fx.Node, new: fx.Node, a: dict[str, Any]) -> None:
    """A class for each number that is left."""
    last = len(node.meta["val"].shape) - 1
    if r.changed(node, last):
        put(new, "num_classes", r.layout.size(r.entry(node, last)))


REWRITES: dict[str, Rewrite] = {
    "view": view,
    "made": made,
    "unflatten": unflatten,
    "repeat": repeat,
    "repeat interleave": repeat_interleave,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "split": split,
    "unbind": unbind,
    "index": index,
    "pad": pad,
    "roll": roll,
    "squeeze": squeeze,
    "convolution": convolution,
    "group norm": group_norm,
    "layer norm": layer_norm,
    "attention": attention,
    "shuffle": channel_shuffle,
    "recurrent": recurrent,
    "histogram": histogram,
    "one hot": one_hot,
}
