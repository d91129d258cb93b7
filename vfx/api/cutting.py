"""The fourth stage: what is to be merged how: the layers that stay apart, what is solved, what is normalized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vfx.analyse.layers import number_layers
from vfx.api.aligning import Aligned
from vfx.api.budgets import cuts_within
from vfx.api.choosing import Plan, Setting
from vfx.api.normalizing import usual
from vfx.api.reconstructing import Solving, Student
from vfx.api.results import run_passes
from vfx.errors import ArgumentError
from vfx.normalize.catalogue import Normalization
from vfx.options import MergeOptions
from vfx.passes.combine import Combine
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.duplicate_heads import DuplicateHeads
from vfx.passes.interpolate import Interpolate
from vfx.passes.remove_bias import DEFAULT_LAYERS
from vfx.passes.transform import Transform
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.rewrite import Pass


def cut(aligned: Aligned, options: MergeOptions, watch: Stopwatch) -> Plan:
    """Cut the edges where ``preserve``, ``heads`` or a budget say. Raises ArgumentError."""
    solving = _solving(aligned, options)
    named = aligned.ready.captured.combiner is not None and solving.solve == "auto"
    solved = None if named else solving.resolved(options.normalize, aligned.ready.captured.data is not None)
    asked = _normalization(aligned, solved, options)
    numbering = number_layers(aligned.program)

    def setting(preserve: int | str) -> Setting:
        separate = _separate(aligned, preserve, options, watch)
        merging = _merging(aligned, options)
        student = _student(aligned, run_passes(separate, merging, watch), options) if solved else None
        return Setting(numbering.number(preserve), separate, merging, student)

    cuts: Sequence[int | str] = [options.preserve]
    if options.budget is not None:
        cuts = cuts_within(options.budget, aligned.edges, len(numbering))
    return Plan([setting(preserve) for preserve in cuts], solving, solved, asked)


def _solving(aligned: Aligned, options: MergeOptions) -> Solving:
    """How layers are to be solved, with what the matching asks for (PLeaS)."""
    asked = Solving.of(options)
    if aligned.ridge is None or asked.solve is None:
        return asked
    return replace(asked, ridge=aligned.ridge, follow=0 if asked.follow == "auto" else asked.follow)


def _normalization(aligned: Aligned, solved: str | None, options: MergeOptions) -> Normalization | None:
    """The normalization beside the solution. Raises ArgumentError for one that the solution would undo."""
    asked = aligned.ready.asked
    if solved == "least_squares" and options.normalize == "auto":
        asked = None
    if solved and asked is not None and asked.method.startswith("bias"):
        raise ArgumentError(f"normalize={asked.method!r}: least squares sets the biases; choose 'repair' or 'rescale'")
    return _unscored(asked, aligned.program) if options.heads and asked is not None else asked


def _unscored(asked: Normalization, program: Program) -> Normalization:
    """Without a choice: several heads' outputs cannot be held against one ensemble's."""
    if asked.method == "auto":
        return replace(asked, method=usual(program))
    return replace(asked, count=asked.count or DEFAULT_LAYERS, direction=asked.direction or "backward")


def _separate(aligned: Aligned, preserve: int | str, options: MergeOptions, watch: Stopwatch) -> Program:
    """The edges with a branch for each where layers are kept."""
    alphas = aligned.ready.captured.alphas
    passes = [
        DuplicateBranches(preserve, alphas, options.join), DuplicateHeads(options.heads, alphas, options.head_output)
    ]  # fmt: skip
    return run_passes(aligned.edges if aligned.growth is None else aligned.growth.program, passes, watch)


def _merging(aligned: Aligned, options: MergeOptions) -> list[Pass]:
    """The passes from the edges to one network. Raises ArgumentError."""
    captured = aligned.ready.captured
    if captured.combiner is None:
        average = Interpolate(captured.alphas)
        return [average] if aligned.exact else [Transform(), average]
    if not aligned.exact or aligned.growth is not None:
        raise ArgumentError("combine= takes edges that keep their functions; match by 'weight', 'activation' or None")
    keywords: dict[str, Any] = {
        "base": options.base,
        "data": captured.data,
        "edges": aligned.edges,
        "seed": options.seed,
    }
    return [Combine(captured.combiner, weights=captured.alphas, **keywords, **options.reading)]


def _student(aligned: Aligned, program: Program, options: MergeOptions) -> Student:
    """What the edges were made into, as the network to solve."""
    averaged = aligned.ready.captured.combiner is None
    return Student(program, aligned.references, aligned.alike, aligned.ridge, options.reading, averaged)
