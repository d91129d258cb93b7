"""The sixth stage: the network that was decided for, made of all data."""

from __future__ import annotations

from vfx.api.aligning import Aligned
from vfx.api.choosing import Chosen
from vfx.api.preparing import restored
from vfx.api.results import run_passes
from vfx.diagnosis.skew import skew_notes
from vfx.options import MergeOptions
from vfx.passes.catalogue import normalizing
from vfx.program import Program
from vfx.report import Stopwatch


def make(chosen: Chosen, aligned: Aligned, options: MergeOptions, watch: Stopwatch) -> Program:
    """Make the network that was decided for, with its notes."""
    captured = aligned.ready.captured
    result = _combined(chosen, aligned, options, watch)
    if options.prepare == "lift" and chosen.edge is None:
        result = restored(result, captured.first, watch)
    skew = skew_notes(result, aligned.edges, captured.data, options.held_out, options.device, options.progress)
    return result.with_notes((*captured.notes, *chosen.notes, *skew))


def _combined(chosen: Chosen, aligned: Aligned, options: MergeOptions, watch: Stopwatch) -> Program:
    """One edge as it was given, or the average, solved, normalized or both."""
    captured = aligned.ready.captured
    if chosen.edge is not None:
        whole = captured.first if len(captured.programs) == 1 else aligned.program
        return (whole if options.device is None else whole.to(options.device)).select(chosen.edge)
    before, after = normalizing(
        chosen.normalization, captured.alphas, captured.data, options.reading, options.verify
    )  # fmt: skip
    if chosen.following is None:
        return run_passes(chosen.setting.aligned, [*before, *chosen.setting.merging, *after], watch)
    assert chosen.setting.student is not None
    with watch("Reconstruct"):
        result = chosen.setting.student.solved(captured.data, chosen.following.follow, chosen.following.edge)
    return run_passes(result, after, watch)
