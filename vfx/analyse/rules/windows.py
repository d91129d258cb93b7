"""Windows written out: unfold and fold, sampling at coordinates."""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Shape
from vfx.operators import operator_of

WINDOW = "a window over positions"


def windows(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Tensor.unfold: one axis becomes the windows, their insides a new last axis."""
    x = t.shape(a["self"])
    d = normal(a["dimension"], len(x.axes))
    sizes = t.sizes(node)
    t.pin_dim(x, d, WINDOW)
    return Shape((*x.axes[:d], t.opaque(sizes[d], WINDOW), *x.axes[d + 1 :], t.opaque(sizes[-1], WINDOW)))


def columns(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """im2col: (N, C, H, W) -> (N, C·k·k, L)."""
    x = t.shape(a["self"])
    if len(x.axes) != 4:
        return None
    for d in (2, 3):
        t.pin_dim(x, d, WINDOW)
    _, width, count = t.sizes(node)
    channel = t.axis(x, 1)
    inside = t.opaque(width // channel.size, WINDOW)
    return Shape((x.axes[0], Axis((*channel.factors, *inside.factors)), t.opaque(count, WINDOW)))


def image(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape | None:
    """col2im: (N, C·k·k, L) -> (N, C, H, W)."""
    x = t.shape(a["self"])
    if len(x.axes) != 3:
        return None
    sizes = t.sizes(node)
    channel, inside = t.cut_axis(t.axis(x, 1), sizes[1], x.axes[1].size // sizes[1])
    t.pin(inside, WINDOW)
    t.pin_dim(x, 2, WINDOW)
    return Shape((x.axes[0], channel, t.opaque(sizes[2], WINDOW), t.opaque(sizes[3], WINDOW)))


def sampled(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """grid_sampler: x (N, C, …) read at grid (N, …, coordinates) -> (N, C, …)."""
    x, grid = t.shape(a["input"]), t.shape(a["grid"])
    for d in range(2, len(x.axes)):
        t.pin_dim(x, d, WINDOW)
    t.pin_dim(grid, len(grid.axes) - 1, "coordinates")
    t.tie(t.axis(x, 0), t.axis(grid, 0))
    return Shape((x.axes[0], x.axes[1], *(t.axis(grid, d) for d in range(1, len(grid.axes) - 1))))


def unpooled(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """max_unpool: values (…, positions) put where the indices of a pool say; other axes pass."""
    x, places = t.shape(a["self"]), t.shape(a["indices"])
    first = len(x.axes) - operator_of(node).spatial
    for d in range(first, len(x.axes)):
        t.pin_dim(x, d, WINDOW)
        t.pin_dim(places, d, WINDOW)
    both = t.broadcast([Shape(x.axes[:first]), Shape(places.axes[:first])], x.sizes[:first])
    return Shape((*both.axes, *(t.opaque(size, WINDOW) for size in t.sizes(node)[first:])))
