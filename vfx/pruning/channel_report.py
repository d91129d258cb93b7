"""What the removal or folding of channels did, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from vfx.analyse.cost import Profile
from vfx.analyse.symmetry import Symmetry


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
        widths = Table(title="channels")
        for column, justify in (("group", "left"), ("before", "right"), ("after", "right"), ("removed", "right")):
            widths.add_column(column, justify=justify)  # type: ignore[arg-type]
        for w in self.widths:
            times = f"{w.blocks} × " if w.blocks > 1 else ""
            widths.add_row(w.name, f"{times}{w.before}", f"{times}{w.after}", f"{1 - w.after / w.before:.0%}")
        table = Table(show_header=False)
        table.add_row("passes", " → ".join(self.passes))
        table.add_row("parameters", f"{self.profile.params:,} ({self.params_ratio:.3f}× the whole network)")
        table.add_row("FLOPs", f"{self.profile.flops:,} ({self.flops_ratio:.3f}× the whole network)")
        if self.dense_profile.caveat:
            table.add_row("", self.dense_profile.caveat)
        if self.error is not None:
            table.add_row(
                "proof", f"of the removal: equals the network with masked channels, to {self.error:.1e} (float64)"
            )
        table.add_row("class", "the user's own" if self.own_class else f"GraphModule: {self.class_reason}")
        for name, score in self.scores.items():
            figures = ", ".join(f"{key} {value:.4g}" for key, value in score.items() if value is not None)
            table.add_row("held out", f"{name}: {figures}")
        for note in self.notes:
            table.add_row("note", note)
        table.add_row("seconds", ", ".join(f"{stage} {value:.2f}" for stage, value in self.seconds.items()))
        console = Console(width=120, force_terminal=False)
        with console.capture() as capture:
            console.print(widths)
            console.print(table)
        return capture.get()


def widths(facts: Symmetry, sizes: Mapping[int, int]) -> tuple[Width, ...]:
    """Every group's width before and after."""
    return tuple(Width(g.index, g.name, g.size, sizes[g.index], g.outer) for g in facts.groups)
