"""The whole data flow at a glance: trace → analyse → match → passes → emit.

``merge`` composes it; ``compile`` runs an explicit list of passes. Nothing here mutates the user's models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from passes.align import Align
from passes.catalogue import choose, normalizing
from passes.duplicate_branches import DuplicateBranches
from passes.duplicate_heads import DuplicateHeads, HeadOutput
from passes.fold_channels import FoldChannels
from passes.fold_normalization import FoldNormalization
from passes.interpolate import Interpolate
from passes.least_squares import LeastSquares
from passes.mask_weights import MaskWeights
from passes.remove_bias import DEFAULT_LAYERS, RemoveBias
from passes.remove_channels import RemoveChannels
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
from vfx.normalize.catalogue import METHODS, Normalization, candidates, normalization
from vfx.operators import BATCH_NORMS, operator
from vfx.program import Goal, Program
from vfx.pruning.channel_report import ChannelReport, widths
from vfx.pruning.groups import Loss, Scores
from vfx.pruning.masks import KEEP, parametrize_masks, semi_structured
from vfx.pruning.report import Moved, PruneReport, layer_rows, moved_statistics, output_moments
from vfx.pruning.scores.score import Score
from vfx.pruning.selection import Sparsity
from vfx.report import Report, Stopwatch
from vfx.rewrite import Pass
from vfx.statistics.collect import READS, Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import counted
from vfx.statistics.record import Recorder
from vfx.statistics.record import recorded as recorded_statistics
from vfx.widths import Carried, differ_in_width, to_first_width


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
    activations: bool = False,
    max_samples: int | None = None,
    within: bool = False,
    device: Any = None,
    progress: bool = True,
) -> Statistics:
    """One pass over ``data`` for all edges; pass the result as ``statistics=`` to any number of merges of them.

    ``within`` adds the second moments inside each network, which ZipIt!, CCA and optimal transport read; these methods
    act on networks whose BatchNorm is folded (``vfx.FoldNormalization(batch_norm=True)``). ``activations`` reads the
    layers behind their activation functions too (normalization with ``site="activation"``).
    """
    program = _program(models, example_inputs)
    options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    options |= {"within": within, "activations": activations}
    return collect_statistics(program, symmetry(program), data, **options)


def record(model: nn.Module, *, momentum: float | None = None) -> Recorder:
    """Record a model's layer statistics while it is trained, for merging without data (*Vanishing Feature*, App. G.4).

    Use it around the training loop (``with vfx.record(model) as recorder``), and ``reset()`` when the last epoch
    begins; ``momentum`` lets older batches fade instead. Raises ArgumentError.
    """
    return Recorder(model, momentum)


def recorded(
    models: Sequence[nn.Module] | Program, recorders: Sequence[Recorder], example_inputs: Any = None
) -> Statistics:
    """What ``vfx.record`` saw of each edge, to be given to ``merge`` as ``statistics=``. Raises DataError."""
    return recorded_statistics(_program(models, example_inputs), recorders)


def merge(
    models: Sequence[nn.Module] | Program,
    example_inputs: Any = None,
    *,
    data: Any = None,
    match: str | Matcher | None = "auto",
    restarts: int = 0,
    weights: float | Sequence[float] | None = None,
    normalize: str | Normalization | None = "auto",
    preserve: int | str = 0,
    join: Join = "preactivation",
    heads: int | str = 0,
    head_output: HeadOutput = "list",
    prepare: str | None = None,
    references: Sequence[nn.Module] = (),
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
    dicts (labels, where there are any, are read by "ste" and help "auto" to choose).
    ``match``: None, a name of ``vfx.match.catalogue.MATCHERS`` or a Matcher; "auto" reads activations if there are data
    or statistics. ``restarts``: further runs of "weight", "c2m3" or "ste" from random permutations, of which the best
    by the method's own objective is kept. "ot" takes models whose numbers of channels differ, too: the result has those
    of the first.
    ``weights``: one for each edge, summing to 1, or α (the second of two edges); equal by default.
    ``normalize``: None, a name of ``vfx.normalize.catalogue.METHODS``, or a ``vfx.Normalization`` with options; "auto"
    keeps what does best on held-out samples of ``data``, and is None without data. ``preserve``: the first layers kept
    for each edge (PFM), a number 0…L or a module's name; ``join`` averages them before ("preactivation") or after norm
    and activation. ``prepare``: "remove_bias" takes the edges' biases off before they are matched. ``references``:
    other networks whose statistics are the normalization's goal (aligned to the first edge with ``match``).
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
    program = _prepared(program, prepare)
    asked = normalization(normalize, data is not None)
    if match == "auto":
        match = "weight" if data is None and statistics is None else "activation"
    finder = matcher(match, restarts)
    if finder is not None and not finder.exact:
        program, asked = _without_batch_norm(program, asked, verify)
    numbering = number_layers(program)
    preserved = numbering.number(preserve)
    if asked is not None:
        numbering.select(asked.layers)
    if device is not None:
        program = program.to(device)
    with watch("symmetry"):
        facts = symmetry(program)
    reads = _reads(asked, finder, program)
    options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    runs = finder is not None and "data" in finder.needs
    if data is None and (runs or (statistics is None and reads)):
        given = "data=" if runs else "data= or statistics="
        raise ArgumentError(f"{' and '.join(reads) or match} need {given}; match='weight' does without")
    if statistics is None and reads:
        with watch("statistics"):
            asks = {name: name in reads for name in READS}
            asks["within"] |= finder is not None and not finder.exact
            statistics = collect_statistics(program, facts, data, **asks, **options)
    _check_statistics(statistics, reads)
    own: dict[str, Any] = {"weights": alphas, "seed": seed, "verify": verify, "progress": progress}
    reader = Batches(program, data, max_samples, device) if runs else None
    align = Align(finder, reader, statistics=statistics, facts=facts, **own)
    cut: list[Pass] = [DuplicateBranches(preserve, alphas, join), DuplicateHeads(heads, alphas, head_output)]
    aligned = _run(program, [align], watch)
    if isinstance(finder, PartialMatching):
        merging, aligned = _least_squares(
            align, aligned, facts, finder, alphas, cut if preserved or heads else [], data, options
        )
    else:
        merging = [*([] if finder is None or finder.exact else [Transform()]), Interpolate(alphas)]
    aligned = _run(aligned, cut, watch)
    if references and asked is not None:
        goals = _reference_goals(program, references, finder, data, asked, own | {"weights": None}, options)
        aligned = replace(aligned, goals=goals)
    if isinstance(finder, PartialMatching) and asked is not None and asked.method.startswith("bias"):
        raise ArgumentError(f"normalize={asked.method!r}: least squares sets the biases; choose 'repair' or 'rescale'")
    if (heads or isinstance(finder, PartialMatching)) and asked is not None:
        asked = _unscored(asked, program)
    with watch("choice"):
        chosen, scores = choose(asked, program, aligned, merging, alphas, data, options)
    before, after = normalizing(chosen, alphas, data, options, verify)
    result = _run(aligned, [*before, *merging, *after], watch)
    result = replace(result, notes=(*result.notes, *skew_notes(result, program, data, held_out, device, progress)))
    if carried is not None:
        align.matching = carried.matching
    choices = {"normalize": chosen and chosen.method, "preserve": preserved} | (chosen.to_dict() if chosen else {})
    return _result(result, program, watch, align, statistics, scores=scores, choices=choices)


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
        aligned = _run(program, [align], watch)
        network = replace(aligned.select(0), goals=Interpolate(shares)(aligned).goals)
        with watch("choice"):
            chosen, scores = choose(asked, program, network, [], shares, data, options)
    else:
        network = replace(program, goals=_given_goals(program, goals, weights))
        chosen, scores = replace(asked, method=_usual(program)) if asked.method == "auto" else asked, {}
    _, after = normalizing(chosen, [], data, options, verify)
    result = _run(network, after, watch)
    return _result(result, program, watch, align, scores=scores, choices={"normalize": chosen and chosen.method})


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
    asked = _pruned_normalization(normalize, program, data)
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
    if asked is not None and asked.needs_goals:
        with watch("statistics"):
            found = collect_statistics(
                program, facts, data, **reading | {"max_samples": repair_samples}, features=False
            )
            goals = found.goals()
    _, after = normalizing(asked, [], data, reading | {"max_samples": repair_samples}, verify)
    passes = [one, *after]
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
        | {"score": score if isinstance(score, str) else "given", "normalize": asked and asked.method},
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
    asked = _pruned_normalization(normalize, program, data)
    if device is not None:
        program = program.to(device)
    result, before, after = _run(program, [mask], watch), None, None
    if asked is not None:
        options: dict[str, Any] = {"verify": verify, "device": device, "progress": progress}
        result, before, after = _repaired(program, result, asked, data, repair_samples, watch, **options)
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
        choices={
            "score": mask.score.name,
            "scope": mask.selection.scope,
            "normalize": asked and asked.method,
            "masks": masks,
        },
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


def _pruned_normalization(normalize: str | Normalization | None, program: Program, data: Any) -> Normalization | None:
    """The repair to run on a pruned network; its goal is one network, so REPAIR needs no care for what is averaged."""
    asked = normalization(normalize, data is not None)
    if asked is not None and asked.method == "auto":
        usual = _usual(program)
        return replace(asked, method="repair" if usual == "rescale" else usual)
    if asked is not None and not METHODS[asked.method].data:
        known = ", ".join(repr(name) for name, one in METHODS.items() if one.data)
        raise ArgumentError(f"normalize={normalize!r}: prune takes 'auto', {known} or None")
    return asked


def _repaired(
    dense: Program, pruned: Program, method: Normalization, data: Any, samples: int, watch: Stopwatch, **options: Any
) -> tuple[Program, Moved, Moved]:
    """The pruned network with its statistics brought to the dense one's, and how far they were off before and after."""
    held = Batches(dense, data, samples).held()  # the same samples each time, shuffled or not
    batches = Batches(dense, held, samples, options["device"])
    with watch("statistics"):
        collecting = {"features": False, "device": options["device"], "progress": options["progress"]}
        goals = collect_statistics(dense, None, held, max_samples=samples, **collecting).goals()
        reference = output_moments(dense, batches)
        before = moved_statistics(pruned, reference, batches)
    own = {"max_samples": samples, "device": options["device"], "progress": options["progress"]}
    _, passes = normalizing(method, [], held, own, options["verify"])
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


def _usual(program: Program) -> str:
    return "reset" if any(operator(node) in BATCH_NORMS for node in program.graph.nodes) else "rescale"


def _without_batch_norm(
    program: Program, asked: Normalization | None, verify: bool
) -> tuple[Program, Normalization | None]:
    """BatchNorm folded into its layers: linear maps must not go through a variance (CCA merging's negative ones).

    What RESET does for a BatchNorm REPAIR then does for the layer it was folded into.
    """
    if not any(operator(node) in BATCH_NORMS for node in program.graph.nodes):
        return program, asked
    folded = FoldNormalization(batch_norm=True, verify=verify)(program)
    return folded, replace(asked, method="repair") if asked is not None and asked.method == "reset" else asked


def _one_width(
    models: Sequence[nn.Module],
    example_inputs: Any,
    data: Any,
    match: str | Matcher | None,
    normalize: str | Normalization | None,
    preserve: int | str,
    max_samples: int | None,
    verify: bool,
    device: Any,
    progress: bool,
    watch: Stopwatch,
) -> tuple[Carried, Normalization | None]:
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
    asked = normalization(normalize, data is not None)
    folded = [_without_batch_norm(program, asked, verify) for program in captured]
    asked = folded[0][1]
    programs = [program if device is None else program.to(device) for program, _ in folded]
    data = counted(data, len(programs[0].signature.inputs))
    layers = "layers" in _reads(asked, None, programs[0])
    with watch("symmetry"):
        facts = [infer_symmetry(program) for program in programs]
    with watch("match"):
        options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
        carried = to_first_width(programs, facts, finder, data, layers=layers, **options)
    return carried, asked


def _least_squares(
    align: Align, aligned: Program, facts: Symmetry, finder: PartialMatching, alphas: list[float], cut: list[Pass],
    data: Any, options: dict[str, Any],
) -> tuple[list[Pass], Program]:  # fmt: skip
    """PLeaS: the passes that merge by least squares, and the edges they start from, wider where channels stay apart."""
    assert align.matching is not None
    outputs, grown = None, aligned
    if align.matching.apart:
        if cut:
            raise ArgumentError("preserve=, heads= and a budget: kept layers need a rest of the edges' width")
        growth = grow(aligned, facts, align.matching.apart, alphas)
        outputs, grown = growth.output, growth.program
    solve = LeastSquares(aligned, data, weights=alphas, ridge=finder.ridge, outputs=outputs, **options)
    return [Interpolate(alphas), solve], grown


def _unscored(asked: Normalization, program: Program) -> Normalization:
    """Without a choice: several heads' outputs cannot be held against one ensemble's."""
    if asked.method == "auto":
        return replace(asked, method=_usual(program))
    return replace(asked, count=asked.count or DEFAULT_LAYERS, direction=asked.direction or "backward")


def _prepared(program: Program, prepare: str | None) -> Program:
    if prepare not in (None, "remove_bias"):
        raise ArgumentError(f"prepare={prepare!r} is unknown; it is 'remove_bias' or None")
    return program if prepare is None else RemoveBias(None)(program)


def _reads(asked: Normalization | None, finder: Matcher | None, program: Program) -> list[str]:
    """What the statistics must hold, in the order in which ``vfx.collect`` reads it."""
    tried = [] if asked is None else [asked]
    if asked is not None and asked.method == "auto":
        tried = [one for one in candidates(asked, program).values() if one is not None]
    goals = any(one.needs_goals for one in tried)
    behind = goals and any(one.behind for one in tried)
    wanted = {"layers"} if goals else set()
    wanted |= {"activations"} if behind else set()
    wanted |= set(finder.needs) if finder is not None else set()
    return [name for name in READS if name in wanted]


def _check_statistics(statistics: Statistics | None, reads: Sequence[str]) -> None:
    for name in reads:
        if statistics is not None and name not in statistics.reads:
            what = "layer statistics for the normalization" if name == "layers" else f"{name!r}, which are needed"
            raise ArgumentError(f"these statistics hold no {what}; collect them again")


def _reference_goals(
    program: Program, references: Sequence[nn.Module], finder: Matcher | None, data: Any, asked: Normalization,
    own: dict[str, Any], options: dict[str, Any],
) -> dict[str, Goal]:  # fmt: skip
    """The references' mean statistics in the first edge's channel order, a row for each edge."""
    if finder is not None and not finder.exact:
        raise ArgumentError("references= are aligned by permutations; match with 'weight' or 'activation'")
    check_edges([program.module or references[0], *references])
    joint = program.with_weights([program.weights[0], *(_weights_of(program, model) for model in references)])
    check_same_function(joint.with_weights(joint.weights[1:]), references)
    facts = infer_symmetry(joint)
    if data is None:
        raise ArgumentError("references= are run on data; give data=")
    statistics = collect_statistics(joint, facts, data, activations=asked.behind, **options)
    found = Align(finder, data, statistics=statistics, facts=facts, **own)(joint).goals
    rows = {name: (goal.mean[1:].mean(0), goal.std[1:].mean(0)) for name, goal in found.items()}
    return {name: Goal(*(x.expand(program.edges, -1) for x in pair)) for name, pair in rows.items()}


def _given_goals(program: Program, statistics: Any, weights: float | Sequence[float] | None) -> dict[str, Goal]:
    """Goals from statistics of another network of this architecture."""
    found = statistics.goals()
    sizes = {name: m[0].mean.shape[0] for name, m in statistics.layers.items()}
    channels = {x.node: program.node(x.node).meta["val"].shape[x.channel] for x in number_layers(program)}
    if (
        not found
        or any(channels.get(name, size) != size for name, size in sizes.items())
        or not set(found) & set(channels)
    ):
        raise ArgumentError("goals= hold no layer statistics of this architecture; collect them with vfx.collect")
    shares = torch.tensor(edge_weights(weights, len(next(iter(found.values())).mean)), dtype=torch.float64)
    mix = lambda x: (x.cpu() * shares[:, None]).sum(0, keepdim=True)  # noqa: E731
    return {name: Goal(mix(goal.mean), mix(goal.std)) for name, goal in found.items()}


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
    scores: Mapping[str, Any] | None = None,
    choices: Mapping[str, Any] | None = None,
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
        choices=choices or {},
        scores=scores or {},
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
    "record",
    "recorded",
    "repair",
    "symmetry",
    "trace",
]
