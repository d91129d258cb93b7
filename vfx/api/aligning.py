"""The third stage: statistics of the edges, and every edge brought to the first one's channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.api.capturing import Captured, check_weights
from vfx.api.normalizing import check_statistics, reads_for, reference_goals
from vfx.api.preparing import Ready
from vfx.api.reconstructing import references_of
from vfx.api.results import run_pass
from vfx.api.tracing import symmetry
from vfx.errors import ArgumentError
from vfx.match.carry import AcrossWidths
from vfx.match.catalogue import maps_layers, name_of
from vfx.match.growth import Growth, grow
from vfx.match.matcher import Alignment, Matcher, Matching
from vfx.normalize.catalogue import Normalization
from vfx.options import MergeOptions
from vfx.passes.align import Align
from vfx.passes.to_first_width import Crossed, ToFirstWidth
from vfx.program import Program
from vfx.reconstruct.references import Reference
from vfx.report import Stopwatch
from vfx.rewrite import PassResult
from vfx.statistics.collect import READS, Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import Batches
from vfx.wrappers import plain_models


@dataclass(frozen=True, eq=False)
class Start:
    """Edges of one width, how they are matched, and the statistics that are there already."""

    program: Program
    facts: Symmetry
    finder: Matcher | None
    given: Statistics | None


@dataclass(frozen=True, eq=False)
class Aligned:
    """Edges in the first one's channels.

    ``start`` holds them as they are, ``edges`` aligned, with the goals of a normalization; ``references`` are what a
    merged network is solved for. ``alike``: the edges stand in its channels as they are. ``growth``: the wider network
    where channels stand apart (PLeaS).
    """

    ready: Ready
    start: Start
    edges: Program
    statistics: Statistics | None
    alignment: Alignment
    references: Sequence[Reference]
    growth: Growth | None
    alike: bool

    @property
    def program(self) -> Program:
        """The edges as they are, in one shape."""
        return self.start.program

    @property
    def exact(self) -> bool:
        """Whether nothing was found but what keeps the edges' functions."""
        return self.start.finder is None or self.start.finder.exact

    @property
    def ridge(self) -> float | None:
        """What the matching asks for where layers are solved (PLeaS)."""
        return None if self.alignment.matching is None else self.alignment.matching.ridge


def align(ready: Ready, options: MergeOptions, watch: Stopwatch) -> Aligned:
    """Read what matching and normalization need, and align. Raises ArgumentError, DataError, VerificationError."""
    carried = _carried(ready, options, watch) if len(ready.programs) > 1 else None
    start = _start(ready, options, carried)
    with watch("statistics"):
        statistics = gathered(start, ready.asked, ready.captured.data, options.reading)
    aligned = run_pass(start.program, _aligner(start, statistics, ready.captured, options), watch)
    edges = _towards_references(aligned.program, start, ready, options)
    alphas = ready.captured.alphas
    growth = _grown(aligned.record.matching, edges, start.facts, alphas, options)
    if carried is not None:
        references, alignment = carried.record.references(alphas), Alignment(carried.record.matching)
        return Aligned(ready, start, edges, statistics, alignment, references, growth, alike=False)
    references = references_of(edges, alphas, edges.transport, growth)
    alike = growth is None and edges.transport is None
    return Aligned(ready, start, edges, statistics, aligned.record, references, growth, alike)


def _start(ready: Ready, options: MergeOptions, carried: PassResult[Crossed] | None) -> Start:
    """The edges to be aligned; those that were carried to one width are so already."""
    if carried is None:
        return Start(ready.programs[0], ready.facts, ready.finder, options.statistics)
    check_weights(carried.program)
    return Start(carried.program, symmetry(carried.program), None, carried.record.statistics)


def _carried(ready: Ready, options: MergeOptions, watch: Stopwatch) -> PassResult[Crossed]:
    """Edges of different widths in the shapes of the first."""
    assert isinstance(ready.finder, AcrossWidths)
    layers = "layers" in reads_for(ready.asked, None, ready.programs[0])
    keywords: dict[str, Any] = {"layers": layers, "seed": options.seed, **options.reading}
    carrying = ToFirstWidth(ready.programs[1:], ready.finder, ready.captured.data, **keywords)
    return run_pass(ready.programs[0], carrying, watch)


def _aligner(start: Start, statistics: Statistics | None, captured: Captured, options: MergeOptions) -> Align:
    """The pass that aligns."""
    runs = start.finder is not None and "data" in start.finder.needs
    reader = Batches(start.program, captured.data, options.max_samples, options.device) if runs else None
    keywords: dict[str, Any] = {"seed": options.seed, "verify": options.verify, "progress": options.progress}
    aligner = Align(
        start.finder, reader, statistics=statistics, weights=captured.alphas, **options.keeping,
        **keywords,
    )  # fmt: skip
    return aligner.on_read() if _read_once(start, captured, options) else aligner


def _read_once(start: Start, captured: Captured, options: MergeOptions) -> bool:
    """Whether the aligned edges are averaged and no more: without data nothing is solved, measured or chosen."""
    exact = start.finder is None or start.finder.exact
    alone = captured.data is None and options.statistics is None and captured.combiner is None
    return exact and alone and options.preserve == 0 and not options.heads and options.budget is None


def _towards_references(edges: Program, start: Start, ready: Ready, options: MergeOptions) -> Program:
    """The edges with other networks' statistics as the goals of their normalization, where that was asked for."""
    if not options.references or ready.asked is None:
        return edges
    keywords: dict[str, Any] = {"seed": options.seed, "verify": options.verify, "progress": options.progress}
    reading, references = options.reading, plain_models(options.references)
    goals = reference_goals(
        start.program, references, start.finder, ready.captured.data, ready.asked, keywords, reading
    )
    return replace(edges, goals=goals)


def gathered(
    start: Start, asked: Normalization | None, data: Any, options: Mapping[str, Any]
) -> Statistics | None:  # fmt: skip
    """The statistics that matching and normalization read: the user's, or collected now.

    Goals that were recorded hold no features: what matching reads comes from the data.
    """
    finder, given = start.finder, start.given
    reads = reads_for(asked, finder, start.program)
    runs = finder is not None and "data" in finder.needs
    if data is None and (runs or (given is None and reads)):
        who = f"match={name_of(finder)!r}" if finder and finder.needs else f"normalize={asked and asked.method!r}"
        missing = "data=" if runs else "data= or statistics="
        raise ArgumentError(f"{who} needs {missing}; match='weight' and normalize=None do without")
    if given is None and reads:
        return _collected(start, reads, data, options)
    if given is not None and given.reads == {"layers"} and data is not None and "features" in reads:
        given.check(start.program)
        more = _collected(start, [name for name in reads if name != "layers"], data, options)
        given = replace(more, layers={**more.layers, **given.layers}, reads=more.reads | given.reads)
    check_statistics(given, reads, asked)
    return given


def _collected(start: Start, reads: Sequence[str], data: Any, options: Mapping[str, Any]) -> Statistics:
    return collect_statistics(start.program, start.facts, data, **asks_of(reads, start.finder, start.facts), **options)


def asks_of(reads: Sequence[str], finder: Matcher | None, facts: Symmetry) -> dict[str, bool]:
    """What ``collect`` is asked for, so that ``reads`` are there for a matcher."""
    asks = {name: name in reads for name in READS}
    asks["within"] |= finder is not None and (not finder.exact or ("layers" in reads and maps_layers(finder, facts)))
    return asks


def _grown(
    matching: Matching | None, aligned: Program, facts: Symmetry, alphas: list[float], options: MergeOptions
) -> Growth | None:
    """The edges in a network wide enough for the channels that stand apart (PLeaS), if any do."""
    if matching is None or not matching.apart:
        return None
    if options.heads or options.budget or number_layers(aligned).number(options.preserve):
        raise ArgumentError("preserve=, heads= and channels apart: kept layers need a rest of the edges' width")
    return grow(aligned, facts, matching.apart, alphas)
