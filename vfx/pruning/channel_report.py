"""What the removal or folding of channels did, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from vfx.analyse.cost import Profile
from vfx.analyse.symmetry import Symmetry
from vfx.terminal import facts_table, held_out_table, largest, rendered, seconds_text, titled


@dataclass(frozen=True)
class Width:
    """One group's channels (in each block) before and after, and the blocks it had; 1 without."""

    group: int
    name: str
    before: int
    after: int
    blocks: int


@dataclass(frozen=True, eq=False)
class ChannelReport:
    """Widths of all groups, cost against the whole network, passes and notes; ``error`` is that of the proof."""

    widths: tuple[Width, ...]
    passes: tuple[str, ...]
    notes: tuple[str, ...]
    profile: Profile
    dense_profile: Profile
    own_class: bool
    class_reason: str
    error: float | None
    seconds: Mapping[str, float]
    choices: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def params_ratio(self) -> float:
        """Parameters against the whole network."""
        return self.profile.params / max(self.dense_profile.params, 1)

    @property
    def flops_ratio(self) -> float:
        """FLOPs against the whole network."""
        return self.profile.flops / max(self.dense_profile.flops, 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.choices,
            "scores": {name: dict(score) for name, score in self.scores.items()},
            "groups": [asdict(width) for width in self.widths],
            "params": self.profile.params,
            "flops": self.profile.flops,
            "params_ratio": self.params_ratio,
            "flops_ratio": self.flops_ratio,
            "not_counted": list(self.dense_profile.unknown_ops),
            "verify_error": self.error,
            "passes": list(self.passes),
            "notes": list(self.notes),
            "own_class": self.own_class,
            "class_reason": self.class_reason,
            "seconds": dict(self.seconds),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return rendered(
            self._widths_table(), facts_table(self._rows()), held_out_table(self.scores, self.choices.get("chosen", ""))
        )

    def _widths_table(self) -> Table:
        shown = largest(self.widths, lambda one: (one.before - one.after) * one.blocks)
        table = Table(title=titled("channels", len(shown), len(self.widths)))
        table.add_column("group", overflow="fold")
        for column in ("before", "after", "removed"):
            table.add_column(column, justify="right", no_wrap=True)
        for one in shown:
            times = f"{one.blocks} × " if one.blocks > 1 else ""
            removed = f"{1 - one.after / one.before:.0%}"
            table.add_row(one.name, f"{times}{one.before}", f"{times}{one.after}", removed)
        return table

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "passes", " → ".join(self.passes)
        yield "parameters", f"{self.profile.params:,} ({self.params_ratio:.3f}× the whole network)"
        yield "FLOPs", f"{self.profile.flops:,} ({self.flops_ratio:.3f}× the whole network)"
        if self.dense_profile.caveat:
            yield "", self.dense_profile.caveat
        if self.error is not None:
            yield "proof", f"of the removal: equals the network with masked channels, to {self.error:.1e} (float64)"
        yield "class", "the user's own" if self.own_class else f"GraphModule: {self.class_reason}"
        yield from (("note", note) for note in self.notes)
        yield "seconds", seconds_text(self.seconds)


def widths(facts: Symmetry, sizes: Mapping[int, int]) -> tuple[Width, ...]:
    """Every group's width before and after."""
    return tuple(Width(g.index, g.name, g.size, sizes[g.index], g.outer) for g in facts.groups)
