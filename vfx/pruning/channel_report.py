"""What the removal or folding of channels did, for people and for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from vfx.analyse.symmetry import Symmetry
from vfx.pruning.depth import RemovedBlock
from vfx.pruning.roles import group_roles
from vfx.report import Report
from vfx.terminal import largest, titled


@dataclass(frozen=True)
class Width:
    """One group's channels (in each block) before and after, its ``role``, and the blocks it had; 1 without."""

    group: int
    name: str
    role: str
    before: int
    after: int
    blocks: int


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelReport(Report):
    """Widths of all groups and residual ``blocks`` that went beside what all reports say; ``error`` is the proof's."""

    widths: tuple[Width, ...]
    error: float | None
    blocks: tuple[RemovedBlock, ...] = ()

    def _figures(self) -> dict[str, Any]:
        return {
            "groups": [asdict(width) for width in self.widths],
            "params": self.profile.params,
            "flops": self.profile.flops,
            "params_ratio": self.params_ratio,
            "flops_ratio": self.flops_ratio,
            "verify_error": self.error,
            "blocks": [asdict(block) for block in self.blocks],
        }

    def _tables(self) -> list[Any]:
        return [self._blocks_table()] if self.blocks else [self._widths_table()]

    def _blocks_table(self) -> Table:
        table = Table(title="residual blocks removed, in this order")
        table.add_column("block", overflow="fold")
        for column in ("parameters", "outputs' error"):
            table.add_column(column, justify="right", no_wrap=True)
        for one in self.blocks:
            table.add_row(one.name, f"{one.params:,}", f"{one.error:.2e}")
        return table

    def _widths_table(self) -> Table:
        shown = largest(self.widths, lambda one: (one.before - one.after) * one.blocks)
        table = Table(title=titled("channels", len(shown), len(self.widths)))
        table.add_column("group", overflow="fold")
        table.add_column("role", no_wrap=True)
        for column in ("before", "after", "removed"):
            table.add_column(column, justify="right", no_wrap=True)
        for one in shown:
            times = f"{one.blocks} × " if one.blocks > 1 else ""
            removed = f"{1 - one.after / one.before:.0%}"
            table.add_row(one.name, one.role, f"{times}{one.before}", f"{times}{one.after}", removed)
        return table

    def _proofs(self) -> Iterator[tuple[str, str]]:
        if self.error is not None:
            what = "silent branches" if self.blocks else "masked channels"
            yield "proof", f"of the removal: equals the network with {what}, to {self.error:.1e} (float64)"


def widths(facts: Symmetry, sizes: Mapping[int, int]) -> tuple[Width, ...]:
    """Every group's width before and after."""
    roles = group_roles(facts)
    return tuple(Width(g.index, g.name, roles[g.index], g.size, sizes[g.index], g.outer) for g in facts.groups)
