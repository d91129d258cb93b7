"""Functional forms of writing into a part of a tensor: the result is the untouched rest with the new part in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules import elementwise
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Shape
from vfx.analyse.terms import MAX_ENUMERATED
from vfx.operators import is_in_place


def copy(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Written in place the source ties to what it overwrites; the functional form only takes its shape from there."""
    if is_in_place(node):
        return elementwise.pointwise(t, node, a)
    return t.broadcast([t.shape(a["src"])], t.sizes(node))


def slice_scatter(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """self with the positions start:end:step of one axis taken from src."""
    x = t.shape(a["self"])
    d = normal(a.get("dim", 0), len(x.axes))
    if isinstance(a["start"], fx.Node) or isinstance(a["end"], fx.Node):
        return None
    return _replaced(t, x, t.shape(a["src"]), d, slice(a["start"], a["end"], a["step"]))


def select_scatter(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """self with one position of one axis taken from src, which lacks that axis."""
    x, source = t.shape(a["self"]), t.shape(a["src"])
    d = normal(a["dim"], len(x.axes))
    if isinstance(a["index"], fx.Node):
        return None
    place = slice(a["index"], a["index"] + 1) if a["index"] != -1 else slice(-1, None)
    return _replaced(t, x, Shape((*source.axes[:d], t.fresh(1), *source.axes[d:])), d, place)


def _replaced(t: ProgramTerms, x: Shape, source: Shape, d: int, place: slice) -> Shape:
    size = x.axes[d].size
    if t.is_opaque(x.axes[d]) or size > MAX_ENUMERATED:
        t.pin_dim(source, d, "written into a pinned axis")
        t.pin_dim(x, d, "a merged axis too long to analyse")
        result = t.opaque(size, "written into a pinned axis")
        others = _others(t, [x, source], d)
        return Shape((*others.axes[:d], result, *others.axes[d:]))
    written = np.arange(size)[place]
    if len(written) == size and (written == np.arange(size)).all():
        return source
    rest = np.setdiff1d(np.arange(size), written)
    old = t.slice(x, d, rest)
    joined = t.concatenate([t.axis(old, d), t.axis(source, d)])
    others = _others(t, [old, source], d)
    order = np.argsort(np.concatenate([rest, written]), kind="stable")
    return Shape((*others.axes[:d], t.take(joined, order), *others.axes[d:]))


def _others(t: ProgramTerms, shapes: list[Shape], d: int) -> Shape:
    """The axes beside the one that is written to, tied."""
    left = [Shape((*shape.axes[:d], *shape.axes[d + 1 :])) for shape in shapes]
    return t.broadcast(left, left[0].sizes)
