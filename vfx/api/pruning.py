"""``vfx.prune`` and ``vfx.prune_structured``: single weights, or whole channels, go in one shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vfx.analyse.cost import cost
from vfx.api.normalizing import uncorrected, usual
from vfx.api.reconstructing import Solving, is_named
from vfx.api.restoring import Restoring, decide, with_goals
from vfx.api.results import Result, run_passes
from vfx.api.tracing import program_of, symmetry
from vfx.arguments import check_names, checked
from vfx.checks import check_finite
from vfx.choice import Judging
from vfx.emit.module import emit
from vfx.errors import ArgumentError
from vfx.exporting import DYNAMIC_BATCH
from vfx.normalize.catalogue import METHODS, Normalization, normalization
from vfx.passes.fold_channels import FoldChannels
from vfx.passes.mask_weights import MaskWeights
from vfx.passes.remove_channels import RemoveChannels
from vfx.program import Program
from vfx.pruning.channel_report import ChannelReport, widths
from vfx.pruning.groups import Loss, Scores
from vfx.pruning.masks import KEEP, parametrize_masks, semi_structured
from vfx.pruning.report import Moved, PruneReport, layer_rows, moved_statistics, output_moments
from vfx.pruning.scores.score import Score
from vfx.pruning.selection import Sparsity
from vfx.pruning.widths import BUDGETS
from vfx.report import Stopwatch
from vfx.statistics.data import Batches, reusable

TRIED = ("magnitude", "activation")  # scores of channels that "auto" chooses from


@checked
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
    solve: str | None = "auto",
    judge: Judging = "auto",
    normalize: str | Normalization | None = "auto",
    steps: int = 1,
    schedule: str = "cubic",
    masks: str = "permanent",
    structured: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> Result:
    """Set the weights that a trained network needs least to zero and solve those that stay, without training.

    ``sparsity``: the share of the convolution and linear weights that go, or a dict of globs of layers. ``score``:
    "magnitude", "random", "fisher", "woodfisher", "wanda", "gradient", or a Score. ``scope``: "global", "layer", "row",
    a pattern such as "2:4", or "auto" (rows for Wanda, else global). ``data``: batches as for ``merge``; labels behind
    the inputs serve the gradients. ``max_samples`` bounds what the score and the solution read, ``repair_samples`` what
    a normalization reads. ``protect``: layers that keep all weights: globs, "first", "head"; "auto" is the head for
    Wanda. ``solve``: "least_squares" solves each layer, within its mask, for the dense network's outputs on ``data``
    (``vfx.Reconstruct``); "auto" does that, normalizes, or both, whatever does best on held-out samples (as ``judge``
    sees them, see ``merge``), and gives way to a normalization that is named; None does not solve. ``normalize``: None,
    "repair", "rescale", "reset", towards the dense network's statistics; "auto" is RESET with BatchNorm, else REPAIR,
    and None without data. ``steps`` one-shot steps along a "cubic" or "linear" ``schedule``. ``masks``:
    "permanent" zeros, "parametrize" for fine-tuning, or "semi_structured" 2:4 tensors on CUDA. ``scope="group"`` (or
    ``structured``, its further options) removes whole channels instead: see ``prune_structured``. ``dynamic_shapes``
    and ``outputs`` (those that count): as for ``vfx.trace``.
    *Vanishing Feature* §5.5, App. A.7.
    Raises ArgumentError, WeightError, DataError, CaptureError, PassError, VerificationError.
    """
    watch = Stopwatch(progress)
    if scope == "group" or structured is not None:
        check_names("structured=", prune_structured, structured or {})
        return _whole_channels(
            model, example_inputs, scope, masks, steps, protect,
            dict(structured or {}) | {
                "sparsity": sparsity, "score": score, "data": data, "max_samples": max_samples,
                "repair_samples": repair_samples, "solve": solve, "judge": judge, "normalize": normalize,
                "dynamic_shapes": dynamic_shapes, "outputs": outputs, "verify": verify, "seed": seed, "device": device,
                "progress": progress,
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
        program = program_of(model, example_inputs, dynamic_shapes=dynamic_shapes, outputs=outputs)
    asked = _pruned_normalization(normalize, program, data)
    alone = uncorrected(data, normalize, "pruned", "much of the accuracy may be gone")
    solved = Solving(solve, judge=judge).resolved(normalize, data is not None)
    if device is not None:
        program = program.to(device)
    options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    few = _few(program, data, repair_samples)
    with watch("statistics"):
        program = with_goals(program, asked, few, repair_samples, options)
    masked = replace(run_passes(program, [mask], watch), goals=program.goals)
    restoring = Restoring(
        program, masked, data, few, asked, is_named(normalize), repair_samples, options,
        masks=mask.masks, judge=judge, verify=verify,
    )  # fmt: skip
    decision = decide({"": restoring}, solved, watch)
    restored = restoring(decision.way, watch)
    result = restored.program
    with watch("statistics"):
        before, after = _moved(program, masked, result, few, repair_samples, device)
    with watch("emit"):
        module, reason = emit(result)
    notes = (*result.notes, *alone, *decision.notes)
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
            "solve": restored.solve,
            "normalize": restored.normalize,
            "masks": masks,
        },
        scores=decision.scores,
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


@checked
def prune_structured(
    model: nn.Module | Program,
    example_inputs: Any = None,
    *,
    sparsity: float | None = None,
    method: str = "remove",
    score: str | Scores = "auto",
    allocation: str = "uniform",
    budget: Mapping[str, float] | None = None,
    round_to: int = 1,
    units: str = "auto",
    protect: Sequence[str] = (),
    variance: bool = True,
    data: Any = None,
    solve: str | None = "auto",
    judge: Judging = "auto",
    loss: Loss | None = None,
    max_samples: int | None = None,
    repair_samples: int = 64,
    normalize: str | Normalization | None = "auto",
    dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
    verify: bool = True,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> Result:
    """Remove whole channels, heads or groups along the symmetry groups: a smaller network of any architecture.

    ``sparsity``: the share of the channels of each group that goes; or ``budget``: what is left of one figure of the
    network, {"params": 0.5}, {"flops": 0.5} or {"latency": 0.5}.
    ``method``: "remove", or "fold" (k-means over channels, merged by role; Wang et al., ICLR 2025). ``score``:
    "magnitude" (l2), "l1", "taylor", "activation", "random", or scores by group; "auto" is magnitude without data, and
    with them magnitude or activation, whichever leaves the better network on held-out samples (as ``judge`` sees
    them, see ``merge``). ``allocation``: "uniform" or "global".
    ``round_to``: kept widths are multiples of it. ``units``: inside heads and groups "channels" go, whole "blocks", or
    "both"; "auto" is channels, and blocks where their numbers do not allow the share. ``protect``: FQNs whose groups
    stay whole. ``variance``: approximate the variances of folded channels without data.
    ``solve``: "least_squares" solves each layer for what the dense network gives in the channels kept (or merged) on
    ``data`` (``vfx.Reconstruct``); "auto" does that, normalizes, or both, whatever does best on
    held-out samples, and gives way to a normalization that is named.
    ``normalize``: None, "repair", "rescale", "reset" towards the statistics of those channels on ``repair_samples``
    samples; "auto" is RESET with BatchNorm, else REPAIR, and None without data. ``dynamic_shapes`` and
    ``outputs`` (those that count, which alone are returned): as for ``vfx.trace``.
    The network is of the user's class, its layers resized, where its ``forward`` then computes what was proved; else
    the report says why it is a GraphModule.
    Raises ArgumentError, DataError, CaptureError, PassError, VerificationError.
    """
    watch = Stopwatch(progress)
    if method not in ("remove", "fold"):
        raise ArgumentError(f"method={method!r} is unknown; choose 'remove' or 'fold'")
    data = reusable(data)
    with watch("trace"):
        program = program_of(model, example_inputs, dynamic_shapes=dynamic_shapes, outputs=outputs)
    if device is not None:
        program = program.to(device)
    check_finite(program.weights[0], "the network", program.masks)
    asked = _pruned_normalization(normalize, program, data)
    alone = uncorrected(data, normalize, "pruned", "much of the accuracy may be gone")
    solved = Solving(solve, judge=judge).resolved(normalize, data is not None)
    with watch("symmetry"):
        facts = symmetry(program)
    kind, share = _budgeted(sparsity, budget)
    shape: dict[str, Any] = {"allocation": allocation, "budget": kind, "round_to": round_to, "units": units}
    shape |= {"protect": protect, "facts": facts, "verify": verify, "seed": seed}
    reading: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    passes: dict[str, RemoveChannels | FoldChannels]
    if method == "fold":
        passes = {"": FoldChannels(share, variance=variance, **shape)}
    else:
        passes = _removals(share, score, data, loss, shape | reading)
    few = _few(program, data, repair_samples)
    with watch("statistics"):
        program = with_goals(program, asked, few, repair_samples, reading)
    candidates = {
        name: Restoring(
            program, run_passes(program, [one], watch), data, few, asked, is_named(normalize), repair_samples, reading,
            carry=one.carry, judge=judge, verify=verify,
        )
        for name, one in passes.items()
    }  # fmt: skip
    decision = decide(candidates, solved, watch)
    removal, restored = passes[decision.candidate], candidates[decision.candidate](decision.way, watch)
    result = restored.program
    with watch("emit"):
        module, reason = emit(result)
    report = ChannelReport(
        widths=widths(facts, removal.sizes),
        passes=result.history,
        notes=(*result.notes, *alone, *decision.notes),
        profile=cost(result),
        dense_profile=cost(program),
        own_class=not reason,
        class_reason=reason,
        error=removal.error if verify else None,
        seconds=watch.seconds,
        choices={"method": method, "sparsity": share, "budget": dict(budget or {}), "allocation": allocation}
        | {"score": _score_name(removal)}
        | {"solve": restored.solve, "normalize": restored.normalize},
        scores=decision.scores,
    )
    return Result(module, result, report)


def _removals(
    share: float, score: str | Scores, data: Any, loss: Loss | None, options: dict[str, Any]
) -> dict[str, RemoveChannels | FoldChannels]:
    """What removes channels by the score asked for; by each that "auto" tries where there are data to judge it by."""
    if score != "auto" or data is None:
        named = "magnitude" if score == "auto" else score
        return {"": RemoveChannels(share, named, data=data, loss=loss, **options)}
    return {name: RemoveChannels(share, name, data=data, **options) for name in TRIED}


def _score_name(removal: RemoveChannels | FoldChannels) -> str | None:
    """The name of the score that channels went by; folding has none."""
    if isinstance(removal, FoldChannels):
        return None
    return removal.score if isinstance(removal.score, str) else "given"


def _budgeted(sparsity: float | None, budget: Mapping[str, float] | None) -> tuple[str, float]:
    """What is counted, and the share of it that goes."""
    if (sparsity is None) == (budget is None):
        raise ArgumentError("give either sparsity= (a share of the channels) or budget= (such as {'flops': 0.5})")
    if budget is None:
        assert sparsity is not None
        return "channels", sparsity
    if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) < set(BUDGETS) - {"channels"} | {""}:
        raise ArgumentError(f"budget={budget!r}: it names one of params, flops, latency and what is left of it, as in "
                            "{'flops': 0.5}")  # fmt: skip
    ((kind, left),) = budget.items()
    if not 0 < left <= 1:
        raise ArgumentError(f"budget={budget!r}: what is left lies in (0, 1]")
    return kind, 1 - left


def _pruned_normalization(normalize: str | Normalization | None, program: Program, data: Any) -> Normalization | None:
    """The repair to run on a pruned network; its goal is one network, so REPAIR needs no care for what is averaged."""
    asked = normalization(normalize, data is not None)
    if asked is not None and asked.method == "auto":
        method = usual(program)
        return replace(asked, method="repair" if method == "rescale" else method)
    if asked is not None and not METHODS[asked.method].data:
        known = ", ".join(repr(name) for name, one in METHODS.items() if one.data)
        raise ArgumentError(f"normalize={normalize!r}: prune takes 'auto', {known} or None")
    return asked


def _few(program: Program, data: Any, samples: int) -> Any:
    """The samples that a normalization reads: the same each time, shuffled or not."""
    return None if data is None else Batches(program, data, samples).held()


def _moved(
    dense: Program, pruned: Program, result: Program, data: Any, samples: int, device: Any
) -> tuple[Moved | None, Moved | None]:
    """How far the pruned network's statistics are off before and after it was solved or normalized, if it was."""
    if data is None or result is pruned:
        return None, None
    batches = Batches(dense, data, samples, device)
    reference = output_moments(dense, batches)
    return moved_statistics(pruned, reference, batches), moved_statistics(result, reference, batches)
