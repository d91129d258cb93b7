"""``vfx.merge`` and ``vfx.compile``: the whole data flow, trace → analyse → match → passes → emit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vfx.alphas import edge_weights
from vfx.analyse.layers import Join, number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.api.budgets import check_budget, within_budget
from vfx.api.choosing import Choice, Chosen, Setting
from vfx.api.normalizing import check_statistics, reads_for, reference_goals, uncorrected, usual, without_batch_norm
from vfx.api.preparing import prepared, restored
from vfx.api.reconstructing import Solving, Student, references_of
from vfx.api.results import Result, result_of, run_passes
from vfx.api.tracing import program_of, symmetry
from vfx.api.widths import Wanted, one_width
from vfx.arguments import checked
from vfx.checks import check_finite, check_same_masks
from vfx.choice import Judging
from vfx.diagnosis.skew import skew_notes
from vfx.errors import ArgumentError, PassError
from vfx.exporting import DYNAMIC_BATCH
from vfx.match.catalogue import maps_layers, matcher, name_of
from vfx.match.growth import Growth, grow
from vfx.match.matcher import Matcher, Matching
from vfx.normalize.catalogue import Normalization, normalization
from vfx.passes.align import Align
from vfx.passes.catalogue import normalizing
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.duplicate_heads import DuplicateHeads, HeadOutput
from vfx.passes.interpolate import Interpolate
from vfx.passes.remove_bias import DEFAULT_LAYERS
from vfx.passes.transform import Transform
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.rewrite import Pass
from vfx.statistics.collect import READS, Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import counted
from vfx.widths import differ_in_width
from vfx.wrappers import plain_models


@checked
def merge(
    models: Sequence[nn.Module] | Program,
    example_inputs: Any = None,
    *,
    data: Any = None,
    match: str | Matcher | None = "auto",
    classes: str = "full",
    restarts: int = 0,
    weights: float | Sequence[float] | None = None,
    solve: str | None = "auto",
    follow: int | str = "auto",
    follow_edge: int | str = "auto",
    judge: Judging = "auto",
    normalize: str | Normalization | None = "auto",
    preserve: int | str = 0,
    budget: Mapping[str, float] | None = None,
    join: Join = "preactivation",
    heads: int | str = 0,
    head_output: HeadOutput = "list",
    prepare: str | None = None,
    references: Sequence[nn.Module] = (),
    statistics: Statistics | None = None,
    held_out: Any = None,
    max_samples: int | None = None,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> Result:
    """Merge trained networks of one architecture into one, without training (*Vanishing Feature*, CPAL 2025).

    ``models``: edges, or their Program from ``vfx.trace``. ``data``: calibration batches, tensors, tuples or
    dicts (labels, where there are any, are read by "ste" and help "auto" to choose).
    ``match``: None, a name of ``vfx.match.catalogue.MATCHERS`` or a Matcher; "auto" reads activations if there are
    data or statistics. ``classes``: "weight" and "activation" match each group's "full" class (scales, signs,
    orthogonal and invertible maps where the network lets them pass; Theus et al. 2025) or "permutation" alone.
    ``restarts``: further runs of "weight", "activation", "c2m3" or "ste" from random permutations, of which the best
    by the method's own objective is kept. "weight", "activation" and "ot" take models whose numbers of channels differ,
    too: the result has those of the first.
    ``weights``: one for each edge, summing to 1, or α (the second of two edges); equal by default.
    ``solve``: "least_squares" solves every layer for the mean of the edges' outputs on ``data`` (``vfx.Reconstruct``);
    None normalizes only; "auto" keeps what does best on held-out samples of ``data``: least squares, the
    normalizations, or an edge as it is, and gives way to a normalization that is named. ``follow``: the first layers
    (a number, or up to a module) follow one edge, ``follow_edge``, and the layers behind them are solved for the mean;
    "auto" tries several. ``judge``: what outputs are, "logits", "probabilities", "embedding", "regression" or "auto",
    or a function of a module whose result is the larger the better.
    ``normalize``: None, a name of ``vfx.normalize.catalogue.METHODS``, or a ``vfx.Normalization`` with options;
    "auto" keeps what does best on held-out samples of ``data``, and is None without data. ``preserve``: the first
    layers kept for each edge (PFM), a number 0…L or a module's name; ``join`` averages them before
    ("preactivation") or after norm and activation. ``budget``: {"params": 1.2} or {"flops": 1.5}, multiples of one
    edge; of the cuts within it the best is kept. ``prepare``: "lift" folds norms' gains and centres the streams
    that LayerNorms read, which lets orthogonal maps pass, and puts the merged weights back into the user's own
    class where they fit; "balance" brings the scales that the edges leave free, and queries and keys, to a
    canonical form before they are matched (the function stays); "remove_bias" takes their biases off.
    ``references``: other networks whose statistics are the normalization's goal (aligned to the first edge with
    ``match``).
    ``heads``: the last layers kept for each edge (partial zipping), a number 0…L−1 or the module they begin with, which
    may differ in shape from edge to edge; ``head_output`` returns their outputs in a "list", concatenated ("cat") or
    averaged ("mean"). ``statistics``: from an earlier merge or ``vfx.collect``. ``held_out``: batches that calibrate
    nothing; the report warns if the merged network's variances do not fit the edges' on them. ``dynamic_shapes`` and
    ``outputs`` (those that count): as for ``vfx.trace``. ``verify``: prove f(x) = f_π(x) before use.
    Raises ArgumentError, ArchitectureError, WeightError, DataError, CaptureError, VerificationError.
    """
    watch = Stopwatch(progress)
    models, references = plain_models(models), plain_models(references)
    data = reusable(data)
    solving = Solving(solve, follow, follow_edge, judge)
    if budget is not None:
        check_budget(budget, data, preserve, heads)
    options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    carried, named = None, normalize
    if not isinstance(models, Program) and not heads and differ_in_width(models):
        wanted = Wanted(match, classes, restarts, normalize, prepare, preserve, verify, seed, dynamic_shapes, outputs)
        carried, normalize = one_width(models, example_inputs, data, wanted, options, watch)
        models, match, statistics = carried.program, None, carried.statistics
        restarts, dynamic_shapes, outputs = 0, DYNAMIC_BATCH, None
    with watch("trace"):
        program = program_of(models, example_inputs, heads, dynamic_shapes, outputs)
    check_edges_of(program)
    captured = program if carried is None else carried.captured
    whole = program
    data = counted(data, len(program.signature.inputs))
    alphas = edge_weights(weights, program.edges)
    alone = uncorrected(data, named, "merged", "features that an average loses leave it with little of its accuracy")
    program = program if carried is not None else prepared(program, prepare, verify, watch)
    asked = normalization(normalize, data is not None)
    if match == "auto":
        match = "weight" if data is None and statistics is None else "activation"
    finder = matcher(match, restarts, classes)
    if finder is not None and not finder.exact:
        program, asked = without_batch_norm(program, asked, verify)
    numbering = number_layers(program)
    preserved = numbering.number(preserve)
    if asked is not None:
        numbering.select(asked.layers)
    if device is not None:
        program = program.to(device)
    with watch("symmetry"):
        facts = symmetry(program)
    with watch("statistics"):
        statistics = gathered(statistics, finder, asked, program, facts, data, options)
    own: dict[str, Any] = {"weights": alphas, "seed": seed, "verify": verify, "progress": progress}
    reader = Batches(program, data, max_samples, device) if finder is not None and "data" in finder.needs else None
    kept: dict[str, Any] = {"heads": heads, "preserve": preserve if budget is None else 0, "join": join}
    align = Align(finder, reader, statistics=statistics, facts=facts, **kept, **own)
    edges = run_passes(program, [align], watch)
    ridge = None if align.matching is None else align.matching.ridge
    solving = replace(solving, ridge=ridge, follow=0 if ridge is not None and follow == "auto" else follow)
    solved = solving.resolved(named, data is not None)
    if references and asked is not None:
        goals = reference_goals(program, references, finder, data, asked, own | {"weights": None}, options)
        edges = replace(edges, goals=goals)
    if solved == "least_squares" and named == "auto":
        asked = None
    if solved and asked is not None and asked.method.startswith("bias"):
        raise ArgumentError(f"normalize={asked.method!r}: least squares sets the biases; choose 'repair' or 'rescale'")
    if heads and asked is not None:
        asked = unscored(asked, program)
    growth = grown(align.matching, edges, facts, alphas, bool(preserved or heads or budget))
    merging: list[Pass] = [*([] if finder is None or finder.exact else [Transform()]), Interpolate(alphas)]
    targets = references_of(edges, alphas, edges.transport, growth) if carried is None else carried.references(alphas)
    alike = growth is None and edges.transport is None and carried is None

    def setting(cut: int | str) -> Setting:
        """The edges cut behind some layers."""
        passes = [DuplicateBranches(cut, alphas, join), DuplicateHeads(heads, alphas, head_output)]
        aligned = run_passes(edges if growth is None else growth.program, passes, watch)
        student = Student(run_passes(aligned, merging, watch), targets, alike, ridge, options) if solved else None
        return Setting(numbering.number(cut), aligned, merging, student)

    settings = [setting(preserve)] if budget is None else within_budget(setting, edges, len(numbering), budget)
    with watch("choice"):
        chosen = Choice(program, alphas, asked, data, options, bool(heads))(settings, solved, solving)
    result = carried_out(chosen, whole if device is None else whole.to(device), alphas, data, options, verify, watch)
    if prepare == "lift" and chosen.edge is None:
        result = restored(result, captured, watch)
    result = replace(
        result,
        notes=(*result.notes, *alone, *chosen.notes, *skew_notes(result, edges, data, held_out, device, progress)),
    )
    if carried is not None:
        align.matching = carried.matching
    return result_of(
        result, program, watch, align, statistics, scores=chosen.scores, choices=chosen.to_dict(),
        outcome=chosen.outcome,
    )  # fmt: skip


def carried_out(
    chosen: Chosen, edges: Program, alphas: list[float], data: Any, options: dict[str, Any], verify: bool,
    watch: Stopwatch,
) -> Program:  # fmt: skip
    """The network that was decided for, made of all data; ``edges`` as they were given."""
    before, after = normalizing(chosen.normalization, alphas, data, options, verify)
    if chosen.edge is not None:
        return edges.select(chosen.edge)
    if chosen.following is None:
        return run_passes(chosen.setting.aligned, [*before, *chosen.setting.merging, *after], watch)
    assert chosen.setting.student is not None
    with watch("Reconstruct"):
        result = chosen.setting.student.solved(data, chosen.following.follow, chosen.following.edge)
    return run_passes(result, after, watch)


@checked
def compile(
    models: nn.Module | Sequence[nn.Module] | Program, example_inputs: Any = None, *, passes: Iterable[Pass],
    outputs: Sequence[int | str] | None = None,
) -> Result:  # fmt: skip
    """Run an explicit list of passes over one or several networks and emit the result.

    ``outputs``: those that count, as for ``vfx.trace``.
    """
    watch, passes = Stopwatch(), list(passes)
    wrong = next((one for one in passes if not isinstance(one, Pass)), None)
    if wrong is not None:
        raise ArgumentError(f"passes= holds {wrong!r}, which is no vfx.Pass (a class of passes needs its brackets)")
    with watch("trace"):
        program = program_of(models, example_inputs, outputs=outputs)
    result = run_passes(program, passes, watch)
    if result.edges != 1:
        raise PassError(f"the passes leave {result.edges} weight sets; add vfx.Interpolate to merge them")
    return result_of(result, program, watch)


def check_edges_of(program: Program) -> None:
    if program.edges < 2:
        raise ArgumentError(f"merging needs at least two models, got {program.edges}")
    for edge, weights in enumerate(program.weights):
        check_finite(weights, f"edge {edge}", program.masks)
    check_same_masks(program)


def gathered(
    given: Statistics | None, finder: Matcher | None, asked: Normalization | None, program: Program, facts: Symmetry,
    data: Any, options: dict[str, Any],
) -> Statistics | None:  # fmt: skip
    """The statistics that matching and normalization read: the user's, or collected now."""
    reads = reads_for(asked, finder, program)
    runs = finder is not None and "data" in finder.needs
    if data is None and (runs or (given is None and reads)):
        who = f"match={name_of(finder)!r}" if finder and finder.needs else f"normalize={asked and asked.method!r}"
        missing = "data=" if runs else "data= or statistics="
        raise ArgumentError(f"{who} needs {missing}; match='weight' and normalize=None do without")
    if given is None and reads:
        given = collect_statistics(program, facts, data, **asks_of(reads, finder, facts), **options)
    check_statistics(given, reads, asked)
    return given


def asks_of(reads: Sequence[str], finder: Matcher | None, facts: Symmetry) -> dict[str, bool]:
    """What ``collect`` is asked for, so that ``reads`` are there for a matcher."""
    asks = {name: name in reads for name in READS}
    asks["within"] |= finder is not None and (not finder.exact or ("layers" in reads and maps_layers(finder, facts)))
    return asks


def grown(
    matching: Matching | None, aligned: Program, facts: Symmetry, alphas: list[float], kept: bool
) -> Growth | None:
    """The edges in a network wide enough for the channels that stand apart (PLeaS), if any do."""
    if matching is None or not matching.apart:
        return None
    if kept:
        raise ArgumentError("preserve=, heads= and channels apart: kept layers need a rest of the edges' width")
    return grow(aligned, facts, matching.apart, alphas)


def unscored(asked: Normalization, program: Program) -> Normalization:
    """Without a choice: several heads' outputs cannot be held against one ensemble's."""
    if asked.method == "auto":
        return replace(asked, method=usual(program))
    return replace(asked, count=asked.count or DEFAULT_LAYERS, direction=asked.direction or "backward")
