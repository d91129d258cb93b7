"""``vfx.repair``: normalization alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from passes.align import Align
from passes.catalogue import choose, normalizing
from passes.interpolate import Interpolate
from vfx.alphas import edge_weights
from vfx.api.normalizing import given_goals, usual
from vfx.api.results import Result, result_of, run_passes
from vfx.api.tracing import symmetry, trace
from vfx.errors import ArgumentError
from vfx.match.catalogue import matcher
from vfx.match.matcher import Matcher
from vfx.normalize.catalogue import METHODS, Normalization, normalization
from vfx.report import Stopwatch
from vfx.statistics.collect import Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import reusable


def repair(
    model: nn.Module | Result,
    references: Sequence[nn.Module] = (),
    example_inputs: Any = None,
    *,
    data: Any,
    method: str | Normalization = "auto",
    goals: Statistics | None = None,
    match: str | Matcher | None = None,
    weights: float | Sequence[float] | None = None,
    max_samples: int | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Normalization alone: bring a network's layer statistics to the average of its ``references``, or to ``goals``.

    References have the model's architecture, whether the model was merged from them or not. Their channels must stand
    in the model's order; ``match`` aligns them first ("weight", "activation") if they do not. ``goals``: statistics
    from ``vfx.collect`` or ``vfx.recorded`` instead of references, in the model's order. ``method``: as ``normalize``
    of ``merge``, of those that read data.
    """
    watch = Stopwatch()
    data = reusable(data)
    target = model.module if isinstance(model, Result) else model
    if example_inputs is None and isinstance(model, Result):
        example_inputs = model.program.example_call
    if bool(references) == (goals is not None):
        raise ArgumentError("repair needs either references= (networks) or goals= (statistics of layers)")
    with watch("trace"):
        program = trace([target, *references] if references else target, example_inputs)
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
        within = finder is not None and "within" in finder.needs
        statistics = collect_statistics(program, facts, data, activations=asked.behind, within=within, **options)
        align = Align(finder, data, statistics=statistics, facts=facts, seed=seed, verify=verify)
        aligned = run_passes(program, [align], watch)
        network = replace(aligned.select(0), goals=Interpolate(shares)(aligned).goals)
        with watch("choice"):
            chosen, scores = choose(asked, program, network, [], shares, data, options)
    else:
        network = replace(program, goals=given_goals(program, goals, weights))
        chosen, scores = replace(asked, method=usual(program)) if asked.method == "auto" else asked, {}
    _, after = normalizing(chosen, [], data, options, verify)
    result = run_passes(network, after, watch)
    return result_of(result, program, watch, align, scores=scores, choices={"normalize": chosen and chosen.method})
