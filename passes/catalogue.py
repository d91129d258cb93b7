"""The catalogue of what each normalization is made of, and the choice between them. Not a pass itself.

A normalization is a few passes in front of Interpolate and a few behind it. The choice ("auto", and the number of
layers of bias removal) runs every candidate on the same merged network with the same goals, calibrated on one part of
the data, and scores it on the other (``vfx.normalize.choice``); affines are not folded for that. What was chosen is
then calibrated on all data, so that the result is what naming it would have given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vfx.passes.calibrate_bias import CalibrateBias
from vfx.passes.calibrate_normalization import CalibrateNormalization
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.remove_bias import DEFAULT_LAYERS, RemoveBias
from vfx.passes.rescale_weights import RescaleWeights
from vfx.passes.reset_batchnorm import ResetBatchNorm
from vfx.passes.use_batch_statistics import UseBatchStatistics

from vfx.analyse.layers import number_layers
from vfx.choice import Split, joined
from vfx.judge import LIMIT, HeldOutScore, Judge
from vfx.normalize.catalogue import BEHIND, METHODS, Normalization, candidates
from vfx.normalize.choice import FEW, best_removal, removals
from vfx.program import Program
from vfx.rewrite import Pass


def normalizing(
    chosen: Normalization | None, alphas: Sequence[float], data: Any, options: dict[str, Any], verify: bool,
    fold: bool = True,
) -> tuple[list[Pass], list[Pass]]:  # fmt: skip
    """The passes of one normalization: those in front of Interpolate, and those for the merged network."""
    if chosen is None:
        return [], []
    method, layers = chosen.method, chosen.layers
    if method == "bias_calibration":
        return [CalibrateBias(alphas)], []
    if method == "rescale_weights":
        return [RescaleWeights(alphas, layers)], []
    if method == "bias_removal":
        count = DEFAULT_LAYERS if chosen.count is None else chosen.count
        return [], [RemoveBias(count, chosen.direction or "backward")]
    if chosen.sweep == "batch":
        return [], [UseBatchStatistics(method, layers)]  # type: ignore[arg-type]
    how: dict[str, Any] = {"sweep": chosen.sweep, "memory_limit": chosen.memory_limit, **options}
    if method == "reset":
        return [], [ResetBatchNorm(data, layers=layers, **how)]
    insert = InsertNormalization(layers, verify, chosen.site)
    calibrate = CalibrateNormalization(method, data, **how)  # type: ignore[arg-type]
    return [], [insert, calibrate, *([FoldNormalization(verify=verify)] if fold else [])]


def choose(
    asked: Normalization, aligned: Program, merging: Sequence[Pass], alphas: Sequence[float],
    trials: Sequence[Split], options: Mapping[str, Any],
) -> tuple[dict[str, Normalization | None], dict[str, HeldOutScore]]:  # fmt: skip
    """The normalizations that are tried ("auto", bias removal), by name, and their scores on held-out data.

    ``merging`` are the passes from the aligned edges to one network; none if ``aligned`` is one already (repair).
    """
    tried: dict[str, Normalization | None] = (
        candidates(asked, aligned) if asked.method == "auto" else {asked.method: asked}
    )
    if not merging:
        tried = {
            name: candidate for name, candidate in tried.items() if candidate is None or METHODS[candidate.method].data
        }
    if not set(aligned.goals) - {layer.node for layer in number_layers(aligned)}:  # nothing known behind activations
        tried.pop(BEHIND, None)
    merged = _after(aligned, merging)
    calibrating = dict(options) | {"max_samples": None, "progress": False}
    scores = {}
    for name, candidate in list(tried.items()):
        if candidate is not None and candidate.chooses:
            if not isinstance(trials[0].judge, Judge):  # its many numbers of layers share what runs before them
                tried.pop(name)
                continue
            tried[name] = candidate = _removal(candidate, merged, trials[0].judge, FEW if len(tried) > 1 else LIMIT)
        held_out = []
        for trial in trials:
            before, after = normalizing(candidate, alphas, trial.fit, calibrating, verify=False, fold=False)
            network = _after(aligned, [*before, *merging]) if before else merged
            held_out.append(trial.judge(_after(network, after)))
        scores[name] = joined(held_out)
    return tried, scores


def _removal(asked: Normalization, merged: Program, judge: Judge, samples: int) -> Normalization:
    """Bias removal with the number of layers and the end that do best on ``samples``."""
    counts = range(1, len(number_layers(merged)) + 1) if asked.count is None else [asked.count]
    ends: list[Any] = ["backward", "forward"] if asked.direction is None else [asked.direction]
    best = best_removal(removals(merged, judge.part(samples), ends, list(counts)))
    return replace(asked, count=best.count, direction=best.direction)


def _after(program: Program, passes: Iterable[Pass]) -> Program:
    for step in passes:
        program = step(program)
    return program
