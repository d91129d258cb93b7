"""Symmetries for a terminal: a line or two for each group and for each reason of pins, in 80 columns.

All members and pins stand in ``Symmetry.groups`` and ``Symmetry.pinned``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from vfx.analyse.groups import Group, Pinned
from vfx.errors import listed
from vfx.terminal import rendered

NAMED = 3  # members and axes that a line names


def groups_table(title: str, groups: Sequence[Group]) -> Table:
    """Groups with their classes and what writes and reads them."""
    table = Table(title=title, box=None)
    table.add_column("group", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("class, and what writes and reads the channels", overflow="fold")
    for group in groups:
        size = str(group.size) if group.parent is None else f"{group.outer} × {group.size}"
        table.add_row(str(group.index), size, "\n".join([_kind(group), "; ".join(_members(group))]))
    return table


def listing(table: Table, pinned: Sequence[Pinned], unknown: Mapping[str, Sequence[str]]) -> str:
    """The table of groups, pinned axes by their reason, and unknown operators."""
    lines = [f"pinned, {reason}: {_axes(pins)}" for reason, pins in _by_reason(pinned).items()]
    lines += [f"unknown operator {name}: {', '.join(nodes)}" for name, nodes in unknown.items()]
    return rendered(table, *lines)


def _members(group: Group) -> Iterator[str]:
    """What writes the channels, what reads them, and how many tensors go along."""
    named = {"out": "written by", "in": "read by"}
    for role, word in named.items():
        names = [member.fqn.removesuffix(".weight") for member in group.members if member.role == role]
        if names:
            yield f"{word} {listed(list(dict.fromkeys(names)), NAMED)}"
    others = [member.fqn for member in group.members if member.role not in named]
    if others:
        yield f"with {listed(others, NAMED)}" if len(others) <= NAMED else f"with {len(others)} others"


def _kind(group: Group) -> str:
    """The class, what lowered it, and the larger classes of single sides."""
    more = sorted({side.kind for side in group.sides if side.members and side.kind & ~group.kind})
    beside = f"; a side of its own: {', '.join(kind.title for kind in more)}" if more else ""
    return group.kind.title + (f": {group.reason}" if group.reason else "") + beside


def _by_reason(pinned: Sequence[Pinned]) -> dict[str, list[Pinned]]:
    pins_of: dict[str, list[Pinned]] = {}
    for pin in pinned:
        pins_of.setdefault(pin.reason, []).append(pin)
    return pins_of


def _axes(pins: Sequence[Pinned]) -> str:
    """Each weight once, with those of its axes that are pinned."""
    axes: dict[str, list[str]] = {}
    for pin in pins:
        axes.setdefault(pin.fqn, []).append(str(pin.dim))
    return listed([f"{fqn}[{', '.join(dict.fromkeys(dims))}]" for fqn, dims in axes.items()], NAMED)
