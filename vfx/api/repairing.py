"""``vfx.repair``: the layers of one network brought to what references give there, solved or normalized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from vfx.alphas import edge_weights
from vfx.api.normalizing import check_exact, given_goals, usual
from vfx.api.reconstructing import SOLVES
from vfx.api.results import Result, result_of, run_pass, run_passes
from vfx.api.tracing import symmetry, trace
from vfx.arguments import checked
from vfx.choice import Candidate, label_notes, scored, trials
from vfx.errors import ArgumentError
from vfx.match.catalogue import matcher
from vfx.match.matcher import Alignment, Matcher
from vfx.normalize.catalogue import METHODS, Normalization, normalization
from vfx.options import RepairOptions
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
    options = RepairOptions(
        data=reusable(data), solve=solve, method=method, goals=goals, match=match, weights=weights,
        max_samples=max_samples, verify=verify, seed=seed, progress=progress,
    )  # fmt: skip
    watch = Stopwatch(progress)
    if bool(references) == (goals is not None):
        raise ArgumentError("repair needs either references= (networks) or goals= (statistics of layers)")
    program = _captured(model, references, example_inputs, watch)
    asked = _normalization(options)
    aligned = _aligned(program, asked, options, watch) if references else _towards_goals(program, options)
    chosen = _chosen(aligned, asked, options, watch) if references else _named(aligned, asked)
    _, after = normalizing(chosen.normalization, [], options.data, options.reading, verify)
    network = run_passes(chosen.network, after, watch)
    return result_of(network, program, watch, aligned.alignment, chosen=chosen.report)


@dataclass(frozen=True, eq=False)
class _Aligned:
    """The network with its goals, and the ``edges`` (it first, then its references) in its channels, if any."""

    program: Program
    network: Program
    edges: Program | None = None
    shares: Sequence[float] = ()
    alignment: Alignment | None = None

    @property
    def references(self) -> list[Reference]:
        """The networks that it can be solved for."""
        assert self.edges is not None
        return [Reference(self.edges.select(edge), share) for edge, share in enumerate(self.shares) if share]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The ``network`` to normalize (solved, where that was asked for or does best), and how; None: not at all."""

    network: Program
    normalization: Normalization | None
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> dict[str, Any]:
        """What a report says of the choice."""
        method = None if self.normalization is None else self.normalization.method
        return {"choices": {"normalize": method}, "scores": self.scores}


def _captured(
    model: nn.Module | Result, references: Sequence[nn.Module], example_inputs: Any, watch: Stopwatch
) -> Program:
    """The network and its references as one Program."""
    target, outputs = (model.module, model.program.outputs or None) if isinstance(model, Result) else (model, None)
    if isinstance(model, Result):
        # a graph returns those alone that were chosen; the user's own class still returns all
        outputs = None if model.program.structural else outputs
        example_inputs = model.program.example_call if example_inputs is None else example_inputs
    with watch("trace"):
        return trace([target, *references] if references else target, example_inputs, outputs=outputs)


def _normalization(options: RepairOptions) -> Normalization:
    """The normalization that was asked for. Raises ArgumentError for one that reads no data."""
    asked = normalization(options.method, True)
    if asked is None or (asked.method != "auto" and not METHODS[asked.method].data):
        methods = ", ".join(repr(name) for name, method in METHODS.items() if method.data)
        raise ArgumentError(f"method={options.method!r}: repair takes 'auto', {methods}")
    return asked


def _aligned(program: Program, asked: Normalization, options: RepairOptions, watch: Stopwatch) -> _Aligned:
    """The references brought to the network's channels, and their statistics as its goals."""
    shares = [0.0, *edge_weights(options.weights, program.edges - 1)]
    facts, finder = symmetry(program), matcher(options.match)
    check_exact(finder)
    within = finder is not None and "within" in finder.needs
    statistics = collect_statistics(
        program, facts, options.data, activations=asked.behind, within=within, **options.reading
    )
    reader = Batches(program, options.data, options.max_samples)
    align = Align(finder, reader, statistics=statistics, seed=options.seed, verify=options.verify)
    aligned = run_pass(program, align, watch)
    network = replace(aligned.program.select(0), goals=Interpolate(shares)(aligned.program).goals)
    return _Aligned(program, network, aligned.program, shares, aligned.record)


def _towards_goals(program: Program, options: RepairOptions) -> _Aligned:
    """The network with the statistics that were given as its goals."""
    if options.solve == "least_squares":
        raise ArgumentError("solve='least_squares' solves for networks; give references= instead of goals=")
    return _Aligned(program, replace(program, goals=given_goals(program, options.goals, options.weights)))


def _named(aligned: _Aligned, asked: Normalization) -> _Chosen:
    """The normalization alone: there is no network to judge it by."""
    if asked.method == "auto":
        asked = replace(asked, method=usual(aligned.program))
    return _Chosen(aligned.network, asked)


def _chosen(aligned: _Aligned, asked: Normalization, options: RepairOptions, watch: Stopwatch) -> _Chosen:
    """What was asked for, or what does best on held-out samples."""
    if options.solve not in SOLVES:
        raise ArgumentError(f"solve={options.solve!r} is unknown; it is 'auto', 'least_squares' or None")

    def solved(data: Any, **own: Any) -> Program:
        return Reconstruct(aligned.references, data, **options.reading | own)(aligned.network)

    with watch("choice"):
        if options.solve == "least_squares":
            return _Chosen(solved(options.data), None if asked.method == "auto" else asked)
        return _Chosen(aligned.network, asked) if asked.method != "auto" else _best(aligned, asked, options, solved)


def _best(aligned: _Aligned, asked: Normalization, options: RepairOptions, solved: Callable[..., Program]) -> _Chosen:
    """The normalization, or the solution, that does best on held-out samples."""
    folds = trials(aligned.program, aligned.shares, options.data, "auto", options.reading)
    normalized, scores = choose(asked, aligned.network, [], aligned.shares, folds, options.reading)
    if options.solve == "auto":
        candidate = Candidate("least squares", lambda part: solved(part, max_samples=None, progress=False))
        scores["least squares"] = scored(candidate, folds)
    name = min(scores, key=lambda name: scores[name].value)
    figures = {name: score.to_dict() for name, score in scores.items()}
    network, method = (solved(options.data), None) if name not in normalized else (aligned.network, normalized[name])
    return _Chosen(network.with_notes(label_notes(folds)), method, figures)
