"""``vfx.merge`` and ``vfx.compile``: the whole data flow, a stage a line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from vfx.analyse.layers import Join
from vfx.api.aligning import align
from vfx.api.capturing import capture
from vfx.api.choosing import choose
from vfx.api.combining import make
from vfx.api.cutting import cut
from vfx.api.preparing import prepare as prepare_edges
from vfx.api.results import Result, result_of, run_passes
from vfx.api.tracing import program_of
from vfx.arguments import checked
from vfx.checkpointing.resuming import resumable
from vfx.choice import Judging
from vfx.combine.combiner import Combiner
from vfx.errors import ArgumentError, PassError
from vfx.match.matcher import Matcher
from vfx.normalize.catalogue import Normalization
from vfx.options import DYNAMIC_BATCH, HeadOutput, MergeOptions
from vfx.program import Program
from vfx.report import Stopwatch
from vfx.rewrite import Pass
from vfx.statistics.collect import Statistics
from vfx.statistics.data import reusable


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
    combine: str | Combiner = "average",
    base: Any = None,
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
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Merge trained networks of one architecture into one, without training (*Vanishing Feature*, CPAL 2025).

    ``models``: edges, or their Program from ``vfx.trace``. ``data``: calibration batches, tensors, tuples or
    dicts (labels, where there are any, are read by "ste" and "learned" and help "auto" to choose).
    ``match``: None, a name of ``vfx.match.catalogue.MATCHERS`` or a Matcher; "auto" reads activations if there are
    data or statistics. ``classes``: "weight", "activation", "c2m3" and "learned" match each group's "full" class
    (scales, signs, orthogonal and invertible maps where the network lets them pass; Theus et al. 2025) or "permutation"
    alone. ``restarts``: further runs of "weight", "activation", "c2m3" or "ste" from random permutations, of which the
    best by the method's own objective is kept. "weight", "activation" and "ot" take models whose numbers of channels
    differ, too: the result has those of the first.
    ``weights``: one for each edge, summing to 1, or α (the second of two edges); equal by default. ``combine``: how
    the edges become one, "average", a name of ``vfx.combine.catalogue.COMBINERS`` or a Combiner; a named one is kept as
    it is: "auto" then solves nothing, and of normalizations takes RESET alone. ``base``: what all edges were fine-tuned
    from, a network, a state dict or a checkpoint's path, which task arithmetic, TIES, DARE and Iso-C read; nothing is
    aligned then, nor where match="auto" finds by itself that the edges share a base.
    ``solve``: "least_squares" solves every layer for the mean of the edges' outputs on ``data`` (``vfx.Reconstruct``);
    None normalizes only; "auto" keeps what does best on held-out samples of ``data``: least squares, the
    normalizations, or an edge as it is, and gives way to a normalization that is named. ``follow``: the first layers
    (a number, or up to a module) follow one edge, ``follow_edge``, and the layers behind them are solved for the mean;
    "auto" tries several. ``judge``: what outputs are, "logits", "probabilities", "embedding", "multilabel",
    "regression" or "auto", or a function of a module whose result is the larger the better.
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
    ``outputs`` (those that count): as for ``vfx.trace``. ``verify``: prove f(x) = f_π(x) before use, and
    compare the module that comes out. ``checkpoint``: a folder that keeps each layer that is solved or normalized: the
    same call, made again, goes on behind the last one (``vfx/checkpointing``).
    Raises ArgumentError, ArchitectureError, WeightError, DataError, CaptureError, CheckpointError, OutputError,
    VerificationError.
    """
    options = MergeOptions(
        data=reusable(data), match=match, classes=classes, restarts=restarts, weights=weights, combine=combine,
        base=base, solve=solve, follow=follow, follow_edge=follow_edge, judge=judge, normalize=normalize,
        preserve=preserve, budget=budget, join=join, heads=heads, head_output=head_output, prepare=prepare,
        references=references, statistics=statistics, held_out=held_out, max_samples=max_samples,
        dynamic_shapes=dynamic_shapes, outputs=outputs, verify=verify, seed=seed, device=device, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    with resumable(options, models, example_inputs):
        return _merged(models, example_inputs, options)


def _merged(models: Sequence[nn.Module] | Program, example_inputs: Any, options: MergeOptions) -> Result:
    """The stages of ``merge``."""
    watch = Stopwatch(options.progress)
    captured = capture(models, example_inputs, options, watch)
    ready = prepare_edges(captured, options, watch)
    aligned = align(ready, options, watch)
    plan = cut(aligned, options, watch)
    chosen = choose(plan, aligned, options, watch)
    network = make(chosen, aligned, options, watch)
    held = [weights for program in (aligned.program, *captured.programs) for weights in program.weights]
    return result_of(
        network, aligned.program, watch, aligned.alignment, aligned.statistics, chosen.report, held, options.verify
    )  # fmt: skip


@checked
def compile(
    models: nn.Module | Sequence[nn.Module] | Program, example_inputs: Any = None, *, passes: Iterable[Pass],
    outputs: Sequence[int | str] | None = None,
) -> Result:  # fmt: skip
    """Run an explicit list of passes over one or several networks and emit the result.

    ``outputs``: those that count, as for ``vfx.trace``.
    """
    watch, passes = Stopwatch(), list(passes)
    wrong = next((step for step in passes if not isinstance(step, Pass)), None)
    if wrong is not None:
        raise ArgumentError(f"passes= holds {wrong!r}, which is no vfx.Pass (a class of passes needs its brackets)")
    with watch("trace"):
        program = program_of(models, example_inputs, outputs=outputs)
    result = run_passes(program, passes, watch)
    if result.edges != 1:
        raise PassError(f"the passes leave {result.edges} weight sets; add vfx.Interpolate to merge them")
    return result_of(result, program, watch)
