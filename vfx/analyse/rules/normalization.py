"""Normalization layers: statistics are symmetric, per-channel parameters tie to the channels they scale."""

from __future__ import annotations

from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Shape


def per_channel(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """batch_norm and instance_norm: x (N, C, …) with scale, shift and running statistics of size C."""
    x = t.shape(a["input"])
    channel = t.axis(x, 1)
    _tie_parameters(t, a, ("weight", "bias", "running_mean", "running_var"), [channel])
    return _result(node, x)


def layer_norm(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """layer_norm and rms_norm over the last axes: mean and variance do not see their order."""
    x = t.shape(a["input"])
    count = len(a["normalized_shape"])
    _tie_parameters(t, a, ("weight", "bias"), [t.axis(x, d) for d in range(len(x.axes) - count, len(x.axes))])
    return _result(node, x)


def group_norm(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """x (N, G·c, …): statistics of each group of channels; groups move whole."""
    x = t.shape(a["input"])
    channel = t.axis(x, 1)
    groups = int(a.get("num_groups") or a["group"])
    t.cut_axis(channel, groups, channel.size // groups)
    _tie_parameters(t, a, ("weight", "bias"), [channel])
    return _result(node, x)


def weight_norm(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """v scaled to the norm g along ``dim``; norms over the other axes see no order. Roles go on to v."""
    v, g = t.shape(a["v"]), t.shape(a["g"])
    result = t.broadcast([Shape(tuple(t.axis(v, d) for d in range(len(v.axes)))), g], v.sizes)
    for d, axis in enumerate(g.axes):
        if axis.size > 1:
            t.role(a["g"], d, "out")
    return _result(node, Shape(result.axes, v.origin))


def prelu(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """One slope for each channel, or one for all."""
    x = t.shape(a["self"])
    weight = t.shape(a["weight"])
    if weight.axes and weight.axes[0].size > 1:
        t.tie(t.axis(x, 1), t.axis(weight, 0))
        t.role(a["weight"], 0, "elementwise")
    return x


def softmax(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Shape:
    """Normalises along an axis without seeing its order."""
    x = t.shape(a["self"])
    t.axis(x, normal(int(a["dim"]), len(x.axes)))
    return x


def _tie_parameters(t: ProgramTerms, a: dict[str, Any], names: tuple[str, ...], axes: list[Any]) -> None:
    for name in names:
        if isinstance(a.get(name), fx.Node):
            shape = t.shape(a[name])
            for dim, axis in enumerate(axes):
                t.tie(axis, t.axis(shape, dim))
                t.role(a[name], dim, "elementwise")


def _result(node: fx.Node, x: Shape) -> Any:
    """Some overloads return statistics beside the result; where these are read, nothing is said."""
    value = node.meta["val"]
    if _reads_others(node):
        return None
    return [x, *[None] * (len(value) - 1)] if isinstance(value, list) else x


def _reads_others(node: fx.Node) -> bool:
    """Whether another result than the first is read."""
    several = isinstance(node.meta["val"], list)
    return several and any(user.args[1] != 0 and user.users for user in node.users)
