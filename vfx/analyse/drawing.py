"""The tie graph of a network: which parameter axes move together, as a networkx graph and as a picture."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import networkx as nx

from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.extras import needed_for
from vfx.files import write_atomic

_COLOURS = {"out": "#1f77b4", "in": "#d95f02", "elementwise": "#7a7a7a"}  # apart for colour-blind eyes too
_MOST = 400  # groups, or weights, that still make a legible picture
FORMATS = (".png", ".svg", ".pdf")


def to_networkx(symmetry: Symmetry) -> nx.MultiGraph:
    """Groups (``kind="group"``, named by index) and weights (``kind="weight"``, by FQN), an edge for each member.

    A group has its class of maps and what lowered it as ``maps`` and ``reason``. Edges carry ``dim``, ``role`` and
    ``copies``; an inner group has an edge of role ``inside`` to the group of its blocks. Pinned axes are a weight's
    attribute ``pinned``, {dim: reason}.
    """
    graph = nx.MultiGraph()
    for group in symmetry.groups:
        about = {"size": group.size, "name": group.name, "blocks": group.blocks}
        graph.add_node(group.index, kind="group", **about, maps=group.kind.title, reason=group.reason)
        for member in group.members:
            graph.add_node(member.fqn, kind="weight")
            edge = {"dim": member.dim, "role": member.role, "copies": member.position.shape[1]}
            graph.add_edge(group.index, member.fqn, **edge)
    for group in symmetry.groups:
        if group.parent is not None:
            graph.add_edge(group.index, group.parent, role="inside")
    for pin in symmetry.pinned:
        graph.add_node(pin.fqn, kind="weight")
        graph.nodes[pin.fqn].setdefault("pinned", {})[pin.dim] = pin.reason
    return graph


@checked
def draw(symmetry: Symmetry, path: str | Path) -> Path:
    """Write a picture (.png, .svg or .pdf): a row for each group, a column for each parameter in the graph's order.

    A mark says that the group moves an axis of the weight; its colour is the role, its number the axis. Raises
    ArgumentError for another kind of file, or a network too large to be read.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError(f"a drawing is one of {', '.join(FORMATS)}, not {path.name!r}")
    order = symmetry.program.names()
    moved = {member.fqn for group in symmetry.groups for member in group.members}
    weights = [name for name in order if name in moved and name not in symmetry.program.buffers]
    if max(len(weights), len(symmetry.groups)) > _MOST:
        raise ArgumentError(
            f"{len(symmetry.groups)} groups over {len(weights)} weights make no legible drawing (at most {_MOST}); "
            "use to_networkx() and draw the part you want"
        )
    figure = _figure(symmetry, weights)
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=110, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
    return path


def _figure(symmetry: Symmetry, weights: list[str]) -> Any:
    with needed_for("a drawing"):
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

    groups = symmetry.groups
    figure = Figure(figsize=(4.5 + 0.26 * len(weights), 2.2 + 0.26 * len(groups)))
    axes = figure.add_subplot()
    column = {name: index for index, name in enumerate(weights)}
    for row, group in enumerate(groups):
        members = [member for member in group.members if member.fqn in column]
        xs = [column[member.fqn] for member in members]
        axes.plot([min(xs), max(xs)], [row, row], color="#d8d8d8", linewidth=1, zorder=1)
        for member, x in zip(members, xs):
            axes.plot(x, row, "s", color=_COLOURS[member.role], markersize=11, zorder=2)
            axes.text(x, row, str(member.dim), color="white", fontsize=7, ha="center", va="center", zorder=3)
    axes.set_yticks(range(len(groups)), [_label(group) for group in groups], fontsize=8)
    axes.set_xticks(range(len(weights)), weights, rotation=90, fontsize=7)
    axes.set_xlim(-0.8, len(weights) - 0.2)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_title(
        f"{len(groups)} symmetry groups, {symmetry.channels:,} channels; numbers are axes",
        fontsize=10,
        loc="left",
        pad=22,
    )
    axes.grid(axis="x", color="#f2f2f2", zorder=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    marks = [Line2D([], [], marker="s", linestyle="", color=c, label=role) for role, c in _COLOURS.items()]
    axes.legend(handles=marks, loc="lower left", bbox_to_anchor=(0, 1), ncol=3, borderpad=0, frameon=False, fontsize=8)
    return figure


def _label(group: Group) -> str:
    if group.parent is None:
        return f"{group.index}: {group.size} channels"
    return f"{group.index}: {group.outer} × {group.size} channels, blocks: group {group.parent}"
