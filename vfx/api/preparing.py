"""``prepare=``: the edges as they are matched, and the way back to the user's own structure."""

from __future__ import annotations

from dataclasses import replace

from vfx.api.results import run_passes
from vfx.errors import ArgumentError, PassError, VerificationError
from vfx.passes.balance_attention import BalanceAttention
from vfx.passes.balance_scales import BalanceScales
from vfx.passes.center_stream import CenterStream
from vfx.passes.fold_gain import FoldGain
from vfx.passes.remove_bias import RemoveBias
from vfx.passes.restore_structure import RestoreStructure
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.rewrite import Pass


def prepared(program: Program, prepare: str | None, verify: bool, watch: Stopwatch) -> Program:
    """The edges as they are matched."""
    known: dict[str | None, list[Pass]] = {
        None: [],
        "lift": [FoldGain(verify=verify), CenterStream(verify=verify)],
        "balance": [BalanceScales(verify), BalanceAttention(verify)],
        "remove_bias": [RemoveBias(None)],
    }
    if prepare not in known:
        names = ", ".join(repr(name) for name in known if name)
        raise ArgumentError(f"prepare={prepare!r} is unknown; it is {names}, or None")
    return run_passes(program, known[prepare], watch)


def restored(result: Program, captured: Program, watch: Stopwatch) -> Program:
    """A lifted network back in the structure that it was captured with, where its weights fit there."""
    try:
        return run_passes(result, [RestoreStructure(captured)], watch)
    except (PassError, VerificationError) as error:
        return replace(result, notes=(*result.notes, f"the merged network keeps its rewritten structure: {error}"))
