"""Units of removal."""

from __future__ import annotations

from dataclasses import dataclass

from vfx.analyse.places import Index


@dataclass(frozen=True, eq=False)
class Bundle:
    """Units of removal that are alike: each holds ``share[k]`` slots of group ``groups[k]``.

    ``slots`` (units, slots of a unit) are element ids; ``fixed`` units stand beside positions that cannot go.
    """

    groups: tuple[int, ...]
    share: tuple[int, ...]
    slots: Index
    fixed: bool

    @property
    def units(self) -> int:
        return len(self.slots)
