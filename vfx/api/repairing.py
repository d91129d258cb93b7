"""``vfx.repair``: normalization alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vfx.alphas import edge_weights
from vfx.api.normalizing import check_exact, given_goals, usual
from vfx.api.reconstructing import SOLVES
from vfx.api.results import Result, result_of, run_passes
from vfx.api.tracing import symmetry, trace
from vfx.arguments import checked
from vfx.choice import Candidate, label_notes, scored, trials
from vfx.errors import ArgumentError
from vfx.match.catalogue import matcher
from vfx.match.matcher import Matcher
from vfx.normalize.catalogue import METHODS, Normalization, normalization
from vfx.passes.align import Align
from vfx.passes.catalogue import choose, normalizing
from vfx.passes.interpolate import Interpolate
from vfx.passes.reconstruct import Reconstruct
from vfx.program import Program
from vfx.reconstruct.references import Reference
from vfx.report import Stopwatch
from vfx.statistics.collect import Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import Batches, reusable


@checked
def repair(
    model: nn.Module | Result,
    references: Sequence[nn.Module] = (),
    example_inputs: Any = None,
    *,
    data: Any,
    solve: str | None = "auto",
    method: str | Normalization = "auto",
    goals: Statistics | None = None,
    match: str | Matcher | None = None,
    weights: float | Sequence[float] | None = None,
    max_samples: int | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Bring a network's layers to the average of its ``references``: solved by least squares, or normalized.

    References have the model's architecture, whether the model was merged from them or not. Their channels must stand
    in the model's order; ``match`` aligns them first ("weight", "activation") if they do not. ``goals``: statistics
    from ``vfx.collect`` or ``vfx.recorded`` instead of references, in the model's order. ``solve``: "least_squares"
    (towards the references' outputs), None, or "auto": what does best on held-out samples, where no method is named.
    ``method``: as ``normalize`` of ``merge``, of those that read data.
    """
    watch = Stopwatch(progress)
    data = reusable(data)
    target = model.module if isinstance(model, Result) else model
    # a graph returns those alone that were chosen; the user's own class still returns all
    outputs = None if not isinstance(model, Result) or model.program.structural else model.program.outputs or None
    if example_inputs is None and isinstance(model, Result):
        example_inputs = model.program.example_call
    if bool(references) == (goals is not None):
        raise ArgumentError("repair needs either references= (networks) or goals= (statistics of layers)")
    with watch("trace"):
        program = trace([target, *references] if references else target, example_inputs, outputs=outputs)
    asked = normalization(method, True)
    if asked is None or (asked.method != "auto" and not METHODS[asked.method].data):
        known = ", ".join(repr(name) for name, one in METHODS.items() if one.data)
        raise ArgumentError(f"method={method!r}: repair takes 'auto', {known}")
    options: dict[str, Any] = {"max_samples": max_samples, "device": None, "progress": progress}
    align, network = None, program
    if references:
        shares = [0.0, *edge_weights(weights, len(references))]
        facts = symmetry(program)
        finder = matcher(match)
        check_exact(finder)
        within = finder is not None and "within" in finder.needs
        statistics = collect_statistics(program, facts, data, activations=asked.behind, within=within, **options)
        reader = Batches(program, data, max_samples)
        align = Align(finder, reader, statistics=statistics, facts=facts, seed=seed, verify=verify)
        aligned = run_passes(program, [align], watch)
        network = replace(aligned.select(0), goals=Interpolate(shares)(aligned).goals)
        targets = [Reference(aligned.select(edge), share) for edge, share in enumerate(shares) if share]
        with watch("choice"):
            chosen, network, scores = _decided(solve, asked, program, network, targets, shares, data, options)
    else:
        network = replace(program, goals=given_goals(program, goals, weights))
        if solve == "least_squares":
            raise ArgumentError("solve='least_squares' solves for networks; give references= instead of goals=")
        chosen, scores = replace(asked, method=usual(program)) if asked.method == "auto" else asked, {}
    _, after = normalizing(chosen, [], data, options, verify)
    result = run_passes(network, after, watch)
    return result_of(result, program, watch, align, scores=scores, choices={"normalize": chosen and chosen.method})


def _decided(
    solve: str | None, asked: Normalization, edges: Program, network: Program, targets: Sequence[Reference],
    shares: Sequence[float], data: Any, options: dict[str, Any],
) -> tuple[Normalization | None, Program, dict[str, Any]]:  # fmt: skip
    """The normalization to run, the network that it acts on (solved, where that was asked for or does best), scores."""
    if solve not in SOLVES:
        raise ArgumentError(f"solve={solve!r} is unknown; it is 'auto', 'least_squares' or None")

    def solved(data: Any, **own: Any) -> Program:
        return Reconstruct(targets, data, **options | own)(network)

    if solve == "least_squares":
        return None if asked.method == "auto" else asked, solved(data), {}
    if asked.method != "auto":
        return asked, network, {}
    folds = trials(edges, shares, data, "auto", options)
    normalized, scores = choose(asked, network, [], shares, folds, options)
    if solve == "auto":
        candidate = Candidate("least squares", lambda part: solved(part, max_samples=None, progress=False))
        scores["least squares"] = scored(candidate, folds)
    name = min(scores, key=lambda name: scores[name].value)
    figures = {name: score.to_dict() for name, score in scores.items()}
    chosen, result = (None, solved(data)) if name not in normalized else (normalized[name], network)
    return chosen, replace(result, notes=(*result.notes, *label_notes(folds))), figures
