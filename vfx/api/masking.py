"""Single weights go: the mask, and the report of ``vfx.prune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vfx.api.dense import Dense
from vfx.api.restoring import Decision, Restored, Restoring
from vfx.api.results import Result, emitted, run_pass
from vfx.errors import ArgumentError
from vfx.options import PruneOptions
from vfx.passes.mask_weights import MaskWeights
from vfx.program import Program
from vfx.pruning.masks import KEEP, parametrize_masks, semi_structured
from vfx.pruning.report import Moved, PruneReport, layer_rows, moved_statistics, output_moments
from vfx.pruning.scores.catalogue import score_named
from vfx.pruning.scores.file import ScoreFile
from vfx.pruning.scores.score import Score
from vfx.pruning.support import AUTO, Support, searchable
from vfx.report import Stopwatch
from vfx.statistics.data import Batches


def masking(options: PruneOptions) -> MaskWeights:
    """The pass that was asked for. Raises ArgumentError, and what a file of scores raises."""
    if options.masks not in KEEP:
        raise ArgumentError(f"masks={options.masks!r} is unknown; choose one of {', '.join(KEEP)}")
    return MaskWeights(
        _filed(options),
        options.sparsity,
        options.scope,
        allocation=options.allocation,
        protect=options.protect,
        steps=options.steps,
        schedule=options.schedule,
        data=options.data,
        seed=options.seed,
        **options.reading,
    )


def with_support(options: PruneOptions, program: Program | None = None) -> PruneOptions:
    """The options with what "auto" stands for; without a ``program``, on one where it can be had."""
    filed = options.scores is not None  # a file names its score itself
    searched = options.data is not None and not filed and (program is None or searchable(program))
    asked = Support(options.score, options.scope, options.allocation, options.protect)
    chosen = asked.chosen(searched)
    if filed:
        return replace(options, allocation=chosen.allocation)
    return replace(options, score=chosen.score, allocation=chosen.allocation, protect=chosen.protect)


def _filed(options: PruneOptions) -> str | Score:
    """The score, kept in a file where one is named. Raises ArgumentError, CheckpointError, OutputError."""
    if options.scores is None:
        return options.score
    if options.steps != 1:
        raise ArgumentError(
            f"scores={options.scores!r} are of the dense network, and steps= takes them anew; leave one out"
        )
    return ScoreFile(Path(options.scores), None if options.score == AUTO else score_named(options.score))


def masked(dense: Dense, mask: MaskWeights, options: PruneOptions, watch: Stopwatch) -> Restoring:
    """The network without the weights that go, and what can be done for it."""
    masked = run_pass(dense.program, mask, watch)
    return dense.restoring(replace(masked.program, goals=dense.program.goals), options, masks=masked.record.masks)


def masked_result(
    mask: MaskWeights, restoring: Restoring, restored: Restored, decision: Decision, options: PruneOptions,
    watch: Stopwatch,
) -> Result:  # fmt: skip
    """The network that comes out, with its masks as they were asked for, and the report."""
    dense, result = restoring.dense, restored.program
    with watch("statistics"):
        before, after = _moved(restoring, result, options)
    notes = (*restoring.notes, *decision.notes)
    module, program, facts = emitted(result, dense, watch, notes, dense.weights, options.verify)
    facts["notes"] += _kept(module, restoring.masks, options.masks)
    report = PruneReport(
        **facts,
        layers=layer_rows(dense, result, restoring.masks, before, after),
        choices=_choices(mask, restored, options) | decision.choices,
        scores=decision.scores,
    )
    return Result(module, program, report)


def _choices(mask: MaskWeights, restored: Restored, options: PruneOptions) -> dict[str, Any]:
    """What was chosen, for the report."""
    chosen = {"score": mask.score.name, "scope": mask.selection.scope}
    chosen["allocation"] = mask.allocation.name if mask.allocation else "scope"
    if isinstance(mask.score, ScoreFile):
        chosen["scores"] = mask.score.done
    return chosen | {"solve": restored.solve, "normalize": restored.normalize, "masks": options.masks}


def _kept(module: nn.Module, masks: Mapping[str, Tensor], how: str) -> tuple[str, ...]:
    """Leave the masks on the module as they were asked for; what is to be said of it."""
    if how == "parametrize":
        parametrize_masks(module, masks)
    return tuple(semi_structured(module, masks)) if how == "semi_structured" else ()


def _moved(restoring: Restoring, result: Program, options: PruneOptions) -> tuple[Moved | None, Moved | None]:
    """How far the pruned network's statistics are off before and after it was solved or normalized, if it was."""
    dense, pruned = restoring.dense, restoring.pruned
    if restoring.few is None or result is pruned:
        return None, None
    batches = Batches(dense, restoring.few, options.repair_samples, options.device)
    reference = output_moments(dense, batches)
    return moved_statistics(pruned, reference, batches), moved_statistics(result, reference, batches)
