"""The second stage: the edges as they are matched, and what is asked for; and the way back to the user's structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vfx.analyse.layer_view import batch_norms
from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.api.capturing import Captured
from vfx.api.normalizing import without_batch_norm
from vfx.api.results import run_passes
from vfx.api.tracing import symmetry
from vfx.errors import ArgumentError, PassError, VerificationError
from vfx.match.carry import AcrossWidths
from vfx.match.catalogue import matcher
from vfx.match.common_base import in_one_frame
from vfx.match.matcher import Matcher
from vfx.normalize.catalogue import Normalization, normalization
from vfx.options import MergeOptions
from vfx.passes.balance_attention import BalanceAttention
from vfx.passes.balance_scales import BalanceScales
from vfx.passes.center_stream import CenterStream
from vfx.passes.fold_gain import FoldGain
from vfx.passes.remove_bias import RemoveBias
from vfx.passes.restore_structure import RestoreStructure
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.rewrite import Pass
from vfx.rewrite.copies import read_only_in

SHARED = (
    "the edges share a base: in every group the identity is the best permutation of their weights, so nothing was "
    "aligned (match= names a method that aligns all the same)"
)


@dataclass(frozen=True, eq=False)
class Ready:
    """Edges that can be matched: their ``programs`` (as of ``Captured``), the symmetries of the first, the matcher, and
    what was asked for as normalization."""

    captured: Captured
    programs: Sequence[Program]
    facts: Symmetry
    finder: Matcher | None
    asked: Normalization | None


def prepare(captured: Captured, options: MergeOptions, watch: Stopwatch) -> Ready:
    """Bring the edges into the form that they are matched in. Raises ArgumentError."""
    asked = normalization(options.normalize, captured.data is not None)
    if captured.combiner is not None and asked is not None and asked.method == "auto":
        asked = replace(asked, method="reset") if batch_norms(captured.first) else None
    finder = _finder(captured, options)
    programs = [run_passes(program, _preparing(options), watch) for program in captured.programs]
    if _folds(finder, several=len(programs) > 1):
        folded = [without_batch_norm(program, asked, options.verify) for program in programs]
        programs, asked = [program for program, _ in folded], folded[0][1]
    numbering = number_layers(programs[0])
    numbering.number(options.preserve)  # raise before anything takes time
    if asked is not None:
        numbering.select(asked.layers)
    if options.device is not None:
        programs = [program.to(options.device) for program in programs]
    with watch("symmetry"):
        facts = symmetry(programs[0])
    if options.match == "auto" and finder is not None and len(programs) == 1 and _share_base(facts, options):
        finder, captured = None, replace(captured, notes=(*captured.notes, SHARED))
    return Ready(captured, programs, facts, finder, asked)


def _finder(captured: Captured, options: MergeOptions) -> Matcher | None:
    """The matcher that was asked for, or that the data allow."""
    match = options.match
    if options.base is not None:
        return None
    if match == "auto":
        match = "weight" if captured.data is None and options.statistics is None else "activation"
    return matcher(match, options.restarts, options.classes)


def _share_base(facts: Symmetry, options: MergeOptions) -> bool:
    """Whether the edges stand in one frame as they are: then they are not aligned."""
    program = facts.program
    heads = number_layers(program).heads(options.heads).branch if options.heads else ()
    return in_one_frame(facts, program.weights, read_only_in(program, heads))


def _folds(finder: Matcher | None, several: bool) -> bool:
    """Whether BatchNorms have to be folded: what is found must not go through a variance."""
    if several:
        assert isinstance(finder, AcrossWidths)
        return not finder.through_norms
    return finder is not None and not finder.exact


def _preparing(options: MergeOptions) -> list[Pass]:
    """The passes of ``prepare=``."""
    verify = options.verify
    passes_of: dict[str | None, list[Pass]] = {
        None: [],
        "lift": [FoldGain(verify=verify), CenterStream(verify=verify)],
        "balance": [BalanceScales(verify), BalanceAttention(verify)],
        "remove_bias": [RemoveBias(None)],
    }
    if options.prepare not in passes_of:
        names = ", ".join(repr(name) for name in passes_of if name)
        raise ArgumentError(f"prepare={options.prepare!r} is unknown; it is {names}, or None")
    return passes_of[options.prepare]


def restored(result: Program, captured: Program, watch: Stopwatch) -> Program:
    """A lifted network back in the structure that it was captured with, where its weights fit there."""
    try:
        return run_passes(result, [RestoreStructure(captured)], watch)
    except (PassError, VerificationError) as error:
        return result.with_notes([f"the merged network keeps its rewritten structure: {error}"])
