"""The whole data flow at a glance: trace → analyse → match → passes → emit.

``merge`` composes it; ``compile`` runs an explicit list of passes. Nothing here mutates the user's models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from passes.align import Align
from passes.calibrate_bias import CalibrateBias
from passes.calibrate_normalization import CalibrateNormalization
from passes.duplicate_branches import DuplicateBranches
from passes.duplicate_heads import DuplicateHeads, HeadOutput
from passes.fold_channels import FoldChannels
from passes.fold_normalization import FoldNormalization
from passes.insert_normalization import InsertNormalization
from passes.interpolate import Interpolate
from passes.least_squares import LeastSquares
from passes.mask_weights import MaskWeights
from passes.remove_bias import RemoveBias
from passes.remove_channels import RemoveChannels
from passes.reset_batchnorm import ResetBatchNorm
from passes.transform import Transform
from vfx.alphas import edge_weights
from vfx.analyse.cost import Profile, cost
from vfx.analyse.layers import Join, Layers, number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.symmetry import symmetry as infer_symmetry
from vfx.capture import capture
from vfx.checks import check_edges, check_finite, check_heads, check_same_function
from vfx.diagnosis.skew import skew_notes
from vfx.emit.module import emit
from vfx.errors import ArgumentError, PassError
from vfx.match.catalogue import matcher
from vfx.match.growth import grow
from vfx.match.matcher import Matcher
from vfx.match.partial import PartialMatching
from vfx.match.transport import OptimalTransport
from vfx.operators import BATCH_NORMS, operator
from vfx.program import Program
from vfx.pruning.channel_report import ChannelReport, widths
from vfx.pruning.groups import Loss, Scores
from vfx.pruning.masks import KEEP, parametrize_masks, semi_structured
from vfx.pruning.report import Moved, PruneReport, layer_rows, moved_statistics, output_moments
from vfx.pruning.scores.score import Score
from vfx.pruning.selection import Sparsity
from vfx.report import Report, Stopwatch
from vfx.rewrite import Pass
from vfx.statistics.collect import Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import counted
from vfx.widths import Carried, differ_in_width, to_first_width

NORMALIZATIONS = ("repair", "rescale", "reset", "bias_calibration", "bias_removal")
_NEED_DATA = ("repair", "rescale", "reset")
_NEED_GOALS = ("repair", "rescale")


@dataclass(frozen=True, eq=False)
class Result:
    """A merged network: ``module`` to use, ``program`` to go on with, ``report`` to read, ``statistics`` to keep."""

    module: nn.Module
    program: Program
    report: Any  # Report, PruneReport, ChannelReport
    statistics: Statistics | None = None


def trace(
    models: nn.Module | Sequence[nn.Module],
    example_inputs: Any,
    *,
    heads: int | str = 0,
    dynamic_shapes: Any = "batch",
) -> Program:
    """Capture one model, or several of one architecture, as a Program with a weight set for each.

    ``example_inputs``: a tensor, a tuple of forward's arguments, or a dict of its keyword arguments; arguments may nest
    tensors in tuples, lists and dicts, beside constants, which are baked in. All functions here take them so.
    ``heads``: the last layers, in which the models' tensors may differ in shape (other numbers of classes).
    Raises CaptureError, ArchitectureError, WeightError.
    """
    if isinstance(models, nn.Module):
        check_finite(models.state_dict(), "the model")
        return capture(models, example_inputs, dynamic_shapes=dynamic_shapes)
    check_edges(models, shapes=not heads)
    program = capture(models[0], example_inputs, dynamic_shapes=dynamic_shapes)
    program = program.with_weights([program.weights[0], *(_weights_of(program, model) for model in models[1:])])
    if heads:
        check_heads(program, number_layers(program).heads(heads).branch)
    check_same_function(program, models)
    return program


def _weights_of(program: Program, model: nn.Module) -> dict[str, torch.Tensor]:
    """Another edge's tensors under the names of the graph; constants of the capture are shared."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: own[name].detach() if name in own else tensor for name, tensor in program.weights[0].items()}


_symmetries: WeakKeyDictionary[fx.Graph, Symmetry] = WeakKeyDictionary()


def symmetry(model: nn.Module | Program, example_inputs: Any = None) -> Symmetry:
    """Permutation symmetries of a network: ``.groups``, ``.pinned``, ``.verify()``; prints as a table."""
    program = _program(model, example_inputs)
    found = _symmetries.get(program.graph)
    if found is None or found.program.weights[0] is not program.weights[0]:
        found = _symmetries[program.graph] = infer_symmetry(program)
    return found


def layers(model: nn.Module | Program, example_inputs: Any = None) -> Layers:
    """Numbered conv and linear layers, shortcuts among them, and the joins of each cut."""
    return number_layers(_program(model, example_inputs))


def profile(model: nn.Module | Program | Result, example_inputs: Any = None) -> Profile:
    """Parameters, MACs, FLOPs and memory of each layer, counted from the graph (torchstat's conventions, batch 1)."""
    return cost(_program(model.program if isinstance(model, Result) else model, example_inputs))


def collect(
    models: Sequence[nn.Module] | Program,
    example_inputs: Any = None,
    *,
    data: Any,
    max_samples: int | None = None,
    within: bool = False,
    device: Any = None,
    progress: bool = True,
) -> Statistics:
    """One pass over ``data`` for all edges; pass the result as ``statistics=`` to any number of merges of them.

    ``within`` adds the second moments inside each network, which ZipIt!, CCA and optimal transport read; these methods
    act on networks whose BatchNorm is folded (``vfx.FoldNormalization(batch_norm=True)``).
    """
    program = _program(models, example_inputs)
    return collect_statistics(
        program, symmetry(program), data, max_samples=max_samples, within=within, device=device, progress=progress
    )


def merge(
    models: Sequence[nn.Module] | Program,
    example_inputs: Any = None,
    *,
    data: Any = None,
    match: str | Matcher | None = "auto",
    restarts: int = 0,
    weights: float | Sequence[float] | None = None,
    normalize: str | None = "auto",
    preserve: int | str = 0,
    join: Join = "preactivation",
    heads: int | str = 0,
    head_output: HeadOutput = "list",
    statistics: Statistics | None = None,
    held_out: Any = None,
    max_samples: int | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> Result:
    """Merge trained networks of one architecture into one, without training (*Vanishing Feature*, CPAL 2025).

    ``models``: edges, or their Program from ``vfx.trace``. ``data``: calibration batches, tensors, tuples or
    dicts (labels are ignored, but for "ste").
    ``match``: None, a name of ``vfx.match.catalogue.MATCHERS`` or a Matcher; "auto" reads activations if there are data
    or statistics. ``restarts``: further runs of "weight", "c2m3" or "ste" from random permutations, of which the best
    by the method's own objective is kept. "ot" takes models whose numbers of channels differ, too: the result has those
    of the first.
    ``weights``: one for each edge, summing to 1, or α (the second of two edges); equal by default.
    ``normalize``: None, "repair", "rescale", "reset", "bias_calibration", "bias_removal"; "auto" is RESET on networks
    with BatchNorm, else RESCALE, and None without data. ``preserve``: the first layers kept for each edge (PFM), a
    number 0…L or a module's name; ``join`` averages them before ("preactivation") or after norm and activation.
    ``heads``: the last layers kept for each edge (partial zipping), a number 0…L−1 or the module they begin with, which
    may differ in shape from edge to edge; ``head_output`` returns their outputs in a "list", concatenated ("cat") or
    averaged ("mean"). ``statistics``: from an earlier merge or ``vfx.collect``. ``held_out``: batches that calibrate
    nothing; the report warns if the merged network's variances do not fit the edges' on them. ``verify``: prove
    f(x) = f_π(x) before use.
    Raises ArgumentError, ArchitectureError, WeightError, DataError, CaptureError, VerificationError.
    """
    watch = Stopwatch()
    data = reusable(data)
    carried = None
    if not isinstance(models, Program) and not heads and differ_in_width(models):
        carried, normalize = _one_width(
            models, example_inputs, data, match, normalize, preserve, max_samples, verify, device, progress, watch
        )
        models, match, statistics = carried.program, None, carried.statistics
    with watch("trace"):
        program = _program(models, example_inputs, heads)
    _check_edges(program)
    data = counted(data, len(program.signature.inputs))
    alphas = edge_weights(weights, program.edges)
    if match == "auto":
        match = "weight" if data is None and statistics is None else "activation"
    finder = matcher(match, restarts)
    if finder is not None and not finder.exact:
        program, normalize = _without_batch_norm(program, normalize, verify)
    normalize = _normalization(normalize, program, data)
    numbering = number_layers(program)
    preserved = numbering.number(preserve)
    if device is not None:
        program = program.to(device)
    with watch("symmetry"):
        facts = symmetry(program)
    needs = finder.needs if finder is not None else frozenset()
    if data is None and ("data" in needs or (statistics is None and needs)):
        given = "data=" if "data" in needs else "data= or statistics="
        raise ArgumentError(f"match={match!r} needs {given}; match='weight' does without")
    if statistics is None and (needs & {"features", "within"} or normalize in _NEED_GOALS):
        with watch("statistics"):
            statistics = collect_statistics(
                program,
                facts,
                data,
                max_samples=max_samples,
                features="features" in needs,
                layers=normalize in _NEED_GOALS,
                within=finder is not None and ("within" in needs or not finder.exact),
                device=device,
                progress=progress,
            )
    _check_statistics(statistics, normalize, needs)
    align = Align(
        finder,
        Batches(program, data, max_samples, device) if "data" in needs else None,
        statistics=statistics,
        weights=alphas,
        facts=facts,
        seed=seed,
        verify=verify,
        progress=progress,
    )
    cut: list[Pass] = [DuplicateBranches(preserve, alphas, join), DuplicateHeads(heads, alphas, head_output)]
    normalizing = _normalizing(normalize, data, max_samples, device, verify, progress)
    if isinstance(finder, PartialMatching):
        if normalize in ("bias_calibration", "bias_removal"):
            raise ArgumentError(f"normalize={normalize!r}: least squares sets the biases; choose 'repair' or 'rescale'")
        aligned = _run(program, [align], watch)
        assert align.matching is not None
        outputs, merged = None, aligned
        if align.matching.apart:
            if preserved or heads:
                raise ArgumentError("preserve=, heads= and a budget: kept layers need a rest of the edges' width")
            growth = grow(aligned, facts, align.matching.apart, alphas)
            outputs, merged = growth.output, growth.program
        options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
        solve = LeastSquares(aligned, data, weights=alphas, ridge=finder.ridge, outputs=outputs, **options)
        result = _run(merged, [*cut, Interpolate(alphas), solve, *normalizing], watch)
    else:
        passes: list[Pass] = [align, *cut]
        passes += [CalibrateBias(alphas)] if normalize == "bias_calibration" else []
        passes += [Transform()] if finder is not None and not finder.exact else []
        result = _run(program, [*passes, Interpolate(alphas), *normalizing], watch)
    result = replace(result, notes=(*result.notes, *skew_notes(result, program, data, held_out, device, progress)))
    if carried is not None:
        align.matching = carried.matching
    return _result(result, program, watch, align, statistics, progress, normalize=normalize, preserve=preserved)


def compile(
    models: nn.Module | Sequence[nn.Module] | Program, example_inputs: Any = None, *, passes: Iterable[Pass]
) -> Result:
    """Run an explicit list of passes over one or several networks and emit the result."""
    watch = Stopwatch()
    with watch("trace"):
        program = _program(models, example_inputs)
    result = _run(program, passes, watch)
    if result.edges != 1:
        raise PassError(f"the passes leave {result.edges} weight sets; add vfx.Interpolate to merge them")
    return _result(result, program, watch)


def repair(
    model: nn.Module | Result,
    references: Sequence[nn.Module],
    example_inputs: Any = None,
    *,
    data: Any,
    method: str = "auto",
    match: str | Matcher | None = None,
    weights: float | Sequence[float] | None = None,
    max_samples: int | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Normalization alone: bring a network's layer statistics to the average of its ``references``.

    References have the model's architecture. Their channels must stand in the model's order; ``match`` aligns them
    first ("weight", "activation") if they do not.
    """
    watch = Stopwatch()
    data = reusable(data)
    target = model.module if isinstance(model, Result) else model
    if example_inputs is None and isinstance(model, Result):
        example_inputs = model.program.example_call
    with watch("trace"):
        program = trace([target, *references], example_inputs)
    method_ = _normalization(method, program, data)
    if method_ not in _NEED_DATA:
        raise ArgumentError(f"method={method!r}: repair takes 'auto', {', '.join(map(repr, _NEED_DATA))}")
    align = Align(match, data, facts=symmetry(program), seed=seed, verify=verify, progress=progress)
    aligned = _run(program, [align], watch)
    shares = [0.0, *edge_weights(weights, len(references))]
    goals = Interpolate(shares)(aligned).goals
    passes = _normalizing(method_, data, max_samples, None, verify, progress)
    result = _run(replace(aligned.select(0), goals=goals), passes, watch)
    return _result(result, program, watch, align, normalize=method_)


def prune_structured(
    model: nn.Module | Program,
    example_inputs: Any = None,
    *,
    sparsity: float,
    method: str = "remove",
    score: str | Scores = "magnitude",
    allocation: str = "uniform",
    budget: str = "channels",
    round_to: int = 1,
    units: str = "channels",
    protect: Sequence[str] = (),
    compensate: bool = False,
    repair: bool = True,
    data: Any = None,
    loss: Loss | None = None,
    max_samples: int | None = None,
    repair_samples: int = 64,
    normalize: str | None = "auto",
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> Result:
    """Remove whole channels, heads or groups along the symmetry groups: a smaller network of any architecture.

    ``sparsity``: the share of the ``budget`` ("channels" of each group, "params", "flops", "latency") that goes.
    ``method``: "remove", or "fold" (k-means over channels, merged by role; Wang et al., ICLR 2025). ``score``:
    "magnitude" (l2), "l1", "taylor", "activation", "random", or scores by group. ``allocation``: "uniform" or "global".
    ``round_to``: kept widths are multiples of it. ``units``: inside heads and groups "channels" go, whole "blocks", or
    "both". ``protect``: FQNs whose groups stay whole. ``compensate``: fold removed channels into kept ones by least
    squares on ``data``. ``repair``: approximate the variances of folded channels without data. ``normalize``: None,
    "repair", "rescale", "reset" towards the statistics of the channels kept (or merged) on ``repair_samples`` samples;
    "auto" is RESET with BatchNorm, else REPAIR, and None without data.
    Raises ArgumentError, DataError, CaptureError, PassError, VerificationError.
    """
    watch = Stopwatch()
    if method not in ("remove", "fold"):
        raise ArgumentError(f"method={method!r} is unknown; choose 'remove' or 'fold'")
    data = reusable(data)
    with watch("trace"):
        program = _program(model, example_inputs)
    if device is not None:
        program = program.to(device)
    normalize = _pruned_normalization(normalize, program, data)
    with watch("symmetry"):
        facts = symmetry(program)
    shape: dict[str, Any] = {"allocation": allocation, "budget": budget, "round_to": round_to, "units": units}
    shape |= {"protect": protect, "facts": facts, "verify": verify, "seed": seed}
    reading: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    one: RemoveChannels | FoldChannels
    if method == "fold":
        one = FoldChannels(sparsity, repair=repair, **shape)
    else:
        one = RemoveChannels(sparsity, score, data=data, compensate=compensate, loss=loss, **shape, **reading)
    goals = {}
    if normalize in _NEED_GOALS:
        with watch("statistics"):
            found = collect_statistics(
                program, facts, data, **reading | {"max_samples": repair_samples}, features=False
            )
            goals = found.goals()
    passes = [one, *_normalizing(normalize, data, repair_samples, device, verify, progress)]
    result = _run(replace(program, goals=goals), passes, watch)
    with watch("emit"):
        module, reason = emit(result)
    report = ChannelReport(
        widths=widths(facts, one.sizes),
        passes=result.history,
        notes=result.notes,
        profile=cost(result),
        dense_profile=cost(program),
        class_reason=reason,
        error=one.error if verify else None,
        seconds=watch.seconds,
        choices={"method": method, "sparsity": sparsity, "budget": budget, "allocation": allocation}
        | {"score": score if isinstance(score, str) else "given", "normalize": normalize},
    )
    return Result(module, result, report)


def prune(
    model: nn.Module | Program,
    example_inputs: Any = None,
    *,
    sparsity: Sparsity = None,
    score: str | Score = "magnitude",
    scope: str = "auto",
    data: Any = None,
    max_samples: int | None = None,
    repair_samples: int = 64,
    protect: str | Sequence[str] = "auto",
    normalize: str | None = "auto",
    steps: int = 1,
    schedule: str = "cubic",
    masks: str = "permanent",
    structured: Mapping[str, Any] | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> Result:
    """Set the weights that a trained network needs least to zero and repair its statistics, without training.

    ``sparsity``: the share of the convolution and linear weights that go, or a dict of globs of layers. ``score``:
    "magnitude", "random", "fisher", "woodfisher", "wanda", "gradient", or a Score. ``scope``: "global", "layer", "row",
    a pattern such as "2:4", or "auto" (rows for Wanda, else global). ``data``: batches as for ``merge``; labels behind
    the inputs serve the gradients. ``max_samples`` bounds what the score reads, ``repair_samples`` what the repair
    reads. ``protect``: layers left alone: globs, "first", "head"; "auto" is the head for Wanda. ``normalize``: None,
    "repair", "rescale", "reset", towards the unpruned network's statistics; "auto" is RESET with BatchNorm, else
    REPAIR, and None without data. ``steps`` one-shot steps along a "cubic" or "linear" ``schedule``. ``masks``:
    "permanent" zeros, "parametrize" for fine-tuning, or "semi_structured" 2:4 tensors on CUDA. ``scope="group"`` (or
    ``structured``, its further options) removes whole channels instead: see ``prune_structured``.
    *Vanishing Feature* §5.5, App. A.7.
    Raises ArgumentError, WeightError, DataError, CaptureError, PassError, VerificationError.
    """
    watch = Stopwatch()
    if scope == "group" or structured is not None:
        return _whole_channels(
            model, example_inputs, scope, masks, steps, protect,
            dict(structured or {}) | {
                "sparsity": sparsity, "score": score, "data": data, "max_samples": max_samples,
                "repair_samples": repair_samples, "normalize": normalize, "verify": verify, "seed": seed,
                "device": device, "progress": progress,
            },
        )  # fmt: skip
    if masks not in KEEP:
        raise ArgumentError(f"masks={masks!r} is unknown; choose one of {', '.join(KEEP)}")
    data = reusable(data)
    mask = MaskWeights(
        score,
        sparsity,
        scope,
        data=data,
        max_samples=max_samples,
        protect=protect,
        steps=steps,
        schedule=schedule,
        seed=seed,
        device=device,
        progress=progress,
    )
    with watch("trace"):
        program = _program(model, example_inputs)
    normalize = _pruned_normalization(normalize, program, data)
    if device is not None:
        program = program.to(device)
    result, before, after = _run(program, [mask], watch), None, None
    if normalize is not None:
        options: dict[str, Any] = {"verify": verify, "device": device, "progress": progress}
        result, before, after = _repaired(program, result, normalize, data, repair_samples, watch, **options)
    with watch("emit"):
        module, reason = emit(result)
    notes = result.notes
    if masks == "parametrize":
        parametrize_masks(module, mask.masks)
    elif masks == "semi_structured":
        notes = (*notes, *semi_structured(module, mask.masks))
    rows = layer_rows(program, result, mask.masks, before, after)
    report = PruneReport(
        layers=rows,
        passes=result.history,
        notes=notes,
        profile=cost(program),
        own_class=not reason,
        class_reason=reason,
        seconds=watch.seconds,
        choices={"score": mask.score.name, "scope": mask.selection.scope, "normalize": normalize, "masks": masks},
    )
    return Result(module, result, report)


def _whole_channels(
    model: Any, example_inputs: Any, scope: str, masks: str, steps: int, protect: Any, options: dict[str, Any]
) -> Result:
    """``prune`` by groups of channels; what only masks of single weights can do is refused."""
    if scope not in ("auto", "group"):
        raise ArgumentError(f"scope={scope!r} masks single weights; structured= goes with scope='group'")
    if masks != "permanent" or steps != 1:
        raise ArgumentError("scope='group' removes channels for good in one step: masks and steps are for weights")
    if not isinstance(options["sparsity"], float):
        raise ArgumentError(f"scope='group' takes one sparsity in [0, 1), got {options['sparsity']!r}")
    names = () if protect == "auto" else (protect,) if isinstance(protect, str) else tuple(protect)
    return prune_structured(model, example_inputs, **{"protect": names} | options)


def _pruned_normalization(normalize: str | None, program: Program, data: Any) -> str | None:
    """The repair to run on a pruned network; its goal is one network, so REPAIR needs no care for what is averaged."""
    found = _normalization(normalize, program, data)
    if normalize == "auto" and found == "rescale":
        return "repair"
    if found is not None and found not in _NEED_DATA:
        raise ArgumentError(f"normalize={normalize!r}: prune takes 'auto', {', '.join(map(repr, _NEED_DATA))} or None")
    return found


def _repaired(
    dense: Program, pruned: Program, method: str, data: Any, samples: int, watch: Stopwatch, **options: Any
) -> tuple[Program, Moved, Moved]:
    """The pruned network with its statistics brought to the dense one's, and how far they were off before and after."""
    held = Batches(dense, data, samples).held()  # the same samples each time, shuffled or not
    batches = Batches(dense, held, samples, options["device"])
    with watch("statistics"):
        collecting = {"features": False, "device": options["device"], "progress": options["progress"]}
        goals = collect_statistics(dense, None, held, max_samples=samples, **collecting).goals()
        reference = output_moments(dense, batches)
        before = moved_statistics(pruned, reference, batches)
    passes = _normalizing(method, held, samples, options["device"], options["verify"], options["progress"])
    result = _run(replace(pruned, goals=goals), passes, watch)
    with watch("statistics"):
        after = moved_statistics(result, reference, batches)
    return result, before, after


def _program(models: Any, example_inputs: Any, heads: int | str = 0) -> Program:
    if isinstance(models, Program):
        return models
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
    return (
        trace(models, example_inputs) if isinstance(models, nn.Module) else trace(models, example_inputs, heads=heads)
    )


def _check_edges(program: Program) -> None:
    if program.edges < 2:
        raise ArgumentError(f"merging needs at least two models, got {program.edges}")
    for edge, weights in enumerate(program.weights):
        check_finite(weights, f"edge {edge}")


def _normalization(normalize: str | None, program: Program, data: Any) -> str | None:
    """The normalization to run: "auto" resolved, names and data checked."""
    has_norm = any(operator(node) in BATCH_NORMS for node in program.graph.nodes)
    if normalize == "auto":
        return None if data is None else ("reset" if has_norm else "rescale")
    if normalize is not None and normalize not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise ArgumentError(f"normalize={normalize!r} is unknown; choose one of {known}, None or 'auto'")
    if normalize in _NEED_DATA and data is None:
        raise ArgumentError(f"normalize={normalize!r} runs the merged network on data; give data=")
    return normalize


def _without_batch_norm(program: Program, normalize: str | None, verify: bool) -> tuple[Program, str | None]:
    """BatchNorm folded into its layers: linear maps must not go through a variance (CCA merging's negative ones).

    What RESET does for a BatchNorm REPAIR then does for the layer it was folded into.
    """
    if not any(operator(node) in BATCH_NORMS for node in program.graph.nodes):
        return program, normalize
    folded = FoldNormalization(batch_norm=True, verify=verify)(program)
    left = any(operator(node) in BATCH_NORMS for node in folded.graph.nodes)
    return folded, "repair" if normalize == "reset" or (normalize == "auto" and not left) else normalize


def _one_width(
    models: Sequence[nn.Module],
    example_inputs: Any,
    data: Any,
    match: str | Matcher | None,
    normalize: str | None,
    preserve: int | str,
    max_samples: int | None,
    verify: bool,
    device: Any,
    progress: bool,
    watch: Stopwatch,
) -> tuple[Carried, str | None]:
    """Networks of different widths in the shapes of the first, and the normalization to run."""
    finder = matcher(match)
    if not isinstance(finder, OptimalTransport):
        check_edges(models)  # names the tensor
        raise ArgumentError("only match='ot' merges edges of different widths")
    if preserve != 0:
        raise ArgumentError(f"preserve={preserve!r}: layers can be preserved where the edges are of one width")
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
    with watch("trace"):
        captured = [_program(model, example_inputs) for model in models]
    folded = [_without_batch_norm(program, normalize, verify) for program in captured]
    programs = [program if device is None else program.to(device) for program, _ in folded]
    data = counted(data, len(programs[0].signature.inputs))
    normalize = _normalization(folded[0][1], programs[0], data)
    with watch("symmetry"):
        facts = [infer_symmetry(program) for program in programs]
    with watch("match"):
        options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
        carried = to_first_width(programs, facts, finder, data, layers=normalize in _NEED_GOALS, **options)
    return carried, normalize


def _check_statistics(statistics: Statistics | None, normalize: str | None, needs: Collection[str]) -> None:
    if statistics is None:
        return
    missing = set(needs) & {"features", "within"} - statistics.reads
    if missing:
        raise ArgumentError(f"these statistics hold no {missing.pop()!r}, which the matching needs; collect them again")
    if normalize in _NEED_GOALS and "layers" not in statistics.reads:
        raise ArgumentError(f"these statistics hold no layer statistics for {normalize!r}; collect them again")


def _normalizing(
    normalize: str | None, data: Any, max_samples: int | None, device: Any, verify: bool, progress: bool
) -> list[Pass]:
    """The passes of one normalization, to be run on the merged network."""
    options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    if normalize in ("repair", "rescale"):
        return [
            InsertNormalization(verify=verify),
            CalibrateNormalization(normalize, data, **options),  # type: ignore[arg-type]
            FoldNormalization(verify=verify),
        ]
    if normalize == "reset":
        return [ResetBatchNorm(data, **options)]
    return [RemoveBias()] if normalize == "bias_removal" else []


def _run(program: Program, passes: Iterable[Pass], watch: Stopwatch) -> Program:
    for one in passes:
        with watch(one.name):
            program = one(program)
    return program


def _result(
    result: Program,
    edges: Program,
    watch: Stopwatch,
    align: Align | None = None,
    statistics: Statistics | None = None,
    progress: bool = True,
    **choices: Any,
) -> Result:
    with watch("emit"):
        module, reason = emit(result)
    report = Report(
        passes=result.history,
        notes=result.notes,
        matching=align.matching if align is not None else None,
        verify_error=align.error if align is not None and (align.matcher or not align.matching) else None,
        profile=cost(result),
        edge_profile=cost(edges.select(0)),
        own_class=not reason,
        class_reason=reason,
        seconds=watch.seconds,
        choices=choices,
    )
    return Result(module, result, report, statistics)


__all__ = [
    "Result",
    "collect",
    "compile",
    "layers",
    "merge",
    "profile",
    "prune",
    "prune_structured",
    "repair",
    "symmetry",
    "trace",
]
