"""What a group's elements are to the network, so that one can say which may go.

=========  ============================================================================================================
streams    channels of a residual stream: what branches are added to
hidden     channels between one layer and the next
blocks     heads of attention and groups of convolutions, and the channels inside them
experts    what a router chooses from; they go by ``units="experts"`` alone
positions  tokens, latents, queries: layers treat all alike, and the task asks for as many as there are; they never go
=========  ============================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from vfx.analyse.rules.spaces import Spaces
from vfx.analyse.symmetry import Symmetry
from vfx.errors import ArgumentError
from vfx.pruning.experts import expert_groups
from vfx.pruning.residual import residual_sums
from vfx.resize.roles import leaves_on, positions

ROLES = ("streams", "hidden", "blocks")  # those that may be named
STAY = {
    "positions": "tokens, latents and queries are never removed: the task asks for as many as there are",
    "experts": "experts go by units='experts'",
}


def group_roles(facts: Symmetry) -> dict[int, str]:
    """The role of each group, by its index."""
    streams = leaves_on(Spaces(facts.terms), residual_sums(facts.program))
    outer = {group.parent for group in facts.groups}
    stay, experts = positions(facts), expert_groups(facts)
    found = {}
    for group in facts.groups:
        inside = group.parent is not None or group.index in outer
        of_stream = any(facts.leaf_of[g] in streams for g in (group.index, group.parent) if g is not None)
        kind = "streams" if of_stream else "blocks" if inside else "hidden"
        found[group.index] = "positions" if group.index in stay else "experts" if group.index in experts else kind
    return found


def check_roles(roles: Sequence[str], units: str) -> None:
    """Raise ArgumentError for a role that is unknown or never goes, and where nothing is left to be said."""
    for role in roles:
        if role not in ROLES:
            reason = STAY.get(role, "it is unknown")
            raise ArgumentError(f"roles: {role!r}: {reason}; choose of {', '.join(ROLES)}")
    if roles and units in ("experts", "layers"):
        raise ArgumentError(f"units={units!r} says what goes, and it is of no other role; leave roles= out")
