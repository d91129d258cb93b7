"""Why channels stay that were to go: what holds them, and shares that their numbers do not allow."""

from __future__ import annotations

from collections.abc import Sequence

from vfx.analyse.pins import pin_notes
from vfx.errors import listed
from vfx.pruning.shares import NEAR, Streams

FEW = 5  # streams that are named


def left_alone(streams: Streams) -> list[str]:
    """Notes on what cannot be removed at any share."""
    slots = streams.slots
    groups = slots.facts.groups
    beside = [groups[g].name for bundle in slots.bundles if bundle.fixed for g in bundle.groups]
    carried: dict[str, list[str]] = {}
    for group, node in slots.positions.items():
        carried.setdefault(node, []).append(f"{groups[group].name} ({groups[group].size})")
    notes = pin_notes(slots.facts)
    if beside:
        notes.append(f"{listed(beside)}: their channels stand beside positions that cannot go, and stay")
    notes += [
        f"{listed(names)}: positions (tokens, latents) that layer {node} carries along, no channels, and stay"
        for node, names in carried.items()
    ]
    return notes


def shares_missed(streams: Streams, units: Sequence[int], share: float) -> list[str]:
    """Notes on streams of which another share than the one asked for stays, as nearly as their factors allow."""
    bundles, groups = streams.slots.bundles, streams.slots.facts.groups
    streams, notes = streams.whole, []
    for made_of in streams.missed(units, share):
        left = streams.left(made_of, units)
        names = " × ".join(f"{groups[bundles[k].groups[0]].name} ({bundles[k].units})" for k in made_of)
        kept = " × ".join(str(units[k]) for k in made_of)
        notes.append(f"{names}: {kept} stay, {left:.0%} instead of {share:.0%}, the nearest that their numbers allow")
    return notes if len(notes) <= FEW else [*notes[:FEW], f"{len(notes) - FEW} more streams like these"]


def total_missed(streams: Streams, units: Sequence[int], share: float) -> list[str]:
    """A note where another share of all channels together than the one asked for stays."""
    whole = sum(streams.counts.values())
    left = sum(count * streams.left(made_of, units) for made_of, count in streams.counts.items()) / max(whole, 1)
    if not whole or abs(left - share) <= NEAR:
        return []
    return [f"{left:.0%} of the channels stay instead of {share:.0%}: one more unit takes too many channels with it"]
