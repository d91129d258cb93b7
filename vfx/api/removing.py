"""Whole channels go: the candidates, and the report of ``vfx.prune_structured``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from vfx.analyse.cost import cost
from vfx.analyse.symmetry import Symmetry
from vfx.api.dense import Dense
from vfx.api.lengths import with_open_lengths
from vfx.api.restoring import Decision, Restored, Restoring
from vfx.api.results import Result, emitted, run_pass
from vfx.api.tracing import symmetry
from vfx.arguments import check_names
from vfx.emit.module import emit
from vfx.emit.own_config import has_config
from vfx.errors import ArgumentError
from vfx.options import PruneOptions, Rewriting, StructuredOptions
from vfx.passes.fold_channels import FoldChannels
from vfx.passes.remove_blocks import RemoveBlocks
from vfx.passes.remove_channels import ROUTER, RemoveChannels
from vfx.pruning.channel_report import ChannelReport, widths
from vfx.pruning.groups import Scores
from vfx.pruning.removed import Removed
from vfx.pruning.roles import check_roles
from vfx.pruning.support import AUTO
from vfx.pruning.widths import BUDGETS
from vfx.report import Stopwatch

# Scores of channels that "auto" chooses from. In principal directions the norm of a weight says nothing.
TRIED, TRIED_WHERE_TURNED = ("magnitude", "activation"), ("activation", "obs")
Removing: TypeAlias = RemoveChannels | FoldChannels | RemoveBlocks


@dataclass(frozen=True)
class Share:
    """The ``part`` of something (``kind``: channels, params, flops, latency) that goes."""

    kind: str
    part: float


@dataclass(frozen=True, eq=False)
class Removal:
    """What was removed of a network with these symmetries, by which score and allocation, and what can be done for the
    rest.
    """

    record: Removed
    facts: Symmetry
    restoring: Restoring
    score: str | None
    allocation: str | None


def share_of(options: StructuredOptions) -> Share:
    """What is counted, and the share of it that goes. Raises ArgumentError."""
    sparsity, budget = options.sparsity, options.budget
    if options.method not in ("remove", "fold"):
        raise ArgumentError(f"method={options.method!r} is unknown; choose 'remove' or 'fold'")
    if (sparsity is None) == (budget is None):
        raise ArgumentError("give either sparsity= (a share of the channels) or budget= (such as {'flops': 0.5})")
    if budget is None:
        assert isinstance(sparsity, (int, float))
        return Share("channels", sparsity)
    if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) < set(BUDGETS) - {"channels"} | {""}:
        raise ArgumentError(
            f"budget={budget!r}: it names one of params, flops, latency and what is left of it, as in {{'flops': 0.5}}"
        )
    ((kind, left),) = budget.items()
    if not 0 < left <= 1:
        raise ArgumentError(f"budget={budget!r}: what is left lies in (0, 1]")
    return Share(kind, 1 - left)


def removed(
    dense: Dense, share: Share, options: StructuredOptions, watch: Stopwatch, order: Mapping[str, Scores] | None = None
) -> dict[str, Removal]:
    """The networks without the channels that go, by the score that they went by where there are several.

    ``order`` holds the scores that several widths share (``channel_order``). The allocation "auto" is uniform; for one
    width, where data can judge it, also global at no more parameters.
    """
    with watch("symmetry"):
        facts = symmetry(dense.program)
    removals = {}
    for name, removal_pass in _passes(share, options, dense.turned).items():
        score = _score_name(removal_pass)
        if order and isinstance(removal_pass, RemoveChannels):
            removal_pass = removal_pass.by(order[name])
        removals[name] = uniform = _removal(dense, facts, removal_pass, score, options, watch)
        if order is None and _may_be_global(dense, options):
            size = _as_large(share, dense, uniform)
            other = _passes(size, replace(options, allocation="global"), dense.turned)[name]
            removal = _removal(dense, facts, other, score, options, watch)
            if _is_as_good_a_form(removal, uniform, size):
                removals[f"{name}, global" if name else "global"] = removal
    return removals


def _may_be_global(dense: Dense, options: StructuredOptions) -> bool:
    """Whether "auto" tries the lowest scores wherever they are, too: data judge, and no configuration, which mostly
    names one size for all layers, is left behind.
    """
    if options.allocation != AUTO or options.data is None:
        return False
    module = dense.program.module
    of_channels = options.method == "remove" and options.units != "layers"
    return of_channels and (module is None or not has_config(module))


def _is_as_good_a_form(removal: Removal, uniform: Removal, size: Share) -> bool:
    """Whether a removal is as small as asked for, or as the uniform one, and of the user's class if that one is."""
    figure = size.kind if size.kind in ("params", "flops") else "params"
    left, least, whole = (
        getattr(cost(program), figure)
        for program in (removal.restoring.pruned, uniform.restoring.pruned, removal.restoring.dense)
    )
    if left > max(least, (1 - size.part) * whole if figure == size.kind else least):
        return False
    is_own = lambda some: not emit(some.restoring.pruned)[1]  # noqa: E731
    return removal.restoring.dense.module is None or is_own(removal) or not is_own(uniform)


def _removal(
    dense: Dense, facts: Symmetry, removal_pass: Removing, score: str | None, options: StructuredOptions,
    watch: Stopwatch,
) -> Removal:  # fmt: skip
    done = run_pass(dense.program, removal_pass, watch)
    restoring = dense.restoring(done.program, options, carry=done.record.carry)
    allocation = None if isinstance(removal_pass, RemoveBlocks) else removal_pass.widths.allocation
    return Removal(done.record, facts, restoring, score, allocation)


def _as_large(share: Share, dense: Dense, removal: Removal) -> Share:
    """The share that leaves as many parameters as a removal by channels did; of another budget the same one."""
    if share.kind != "channels":
        return share
    return Share("params", 1 - cost(removal.restoring.pruned).params / cost(dense.program).params)


def channel_order(dense: Dense, options: StructuredOptions, watch: Stopwatch) -> dict[str, Scores]:
    """The scores that all widths share, by the name of each that is tried."""
    with watch("scores"):
        passes = _passes(Share("channels", 0.0), options, dense.turned)
        return {
            name: removal_pass.scores(dense.program)
            for name, removal_pass in passes.items()
            if isinstance(removal_pass, RemoveChannels)
        }


def _passes(share: Share, options: StructuredOptions, turned: bool) -> dict[str, Removing]:
    """What removes channels by the score asked for; by each that "auto" tries where there are data to judge it by."""
    if options.units == "layers":
        return {"": _blocks(share, options)}
    allocation = "uniform" if options.allocation == AUTO else options.allocation
    keywords: dict[str, Any] = {"allocation": allocation, "budget": share.kind, "round_to": options.round_to}
    keywords |= {"units": options.units, "roles": options.roles, "protect": options.protect}
    keywords |= {"verify": options.verify, "seed": options.seed}
    if options.method == "fold" and options.units == "experts":
        raise ArgumentError("units='experts' are removed; folding merges channels, leave method='fold' out")
    if options.method == "fold":
        return {"": FoldChannels(share.part, variance=options.variance, **keywords)}
    keywords |= {"data": options.data, "experts": options.experts} | options.reading
    if options.units == "experts" and options.score == "auto" and options.data is not None:
        return {"": RemoveChannels(share.part, ROUTER, **keywords)}
    if options.score == "auto" and options.data is not None:
        tried = TRIED_WHERE_TURNED if turned else TRIED
        return {name: RemoveChannels(share.part, name, **keywords) for name in tried}
    score = "magnitude" if options.score == "auto" else options.score
    return {"": RemoveChannels(share.part, score, loss=options.loss, **keywords)}


def _blocks(share: Share, options: StructuredOptions) -> RemoveBlocks:
    """What removes residual blocks. Raises ArgumentError for options that say how channels go."""
    check_roles(options.roles, options.units)
    plain = {"method": "remove", "score": "auto", "allocation": AUTO, "round_to": 1, "experts": "remove"}
    for name, value in plain.items():
        if getattr(options, name) != value:
            raise ArgumentError(
                f"units='layers' removes residual blocks by what the outputs lose; {name}= is of channels, leave it out"
            )
    if options.data is None:
        raise ArgumentError("units='layers' measures what each residual block is worth on data; give data=")
    return RemoveBlocks(
        share.part, options.data, budget=share.kind, protect=options.protect, max_samples=options.max_samples,
        device=options.device, verify=options.verify, seed=options.seed,
    )  # fmt: skip


def removed_result(
    removal: Removal, share: Share, restored: Restored, decision: Decision, options: StructuredOptions,
    watch: Stopwatch,
) -> Result:  # fmt: skip
    """The network that comes out, and the report."""
    result, restoring = restored.program, removal.restoring
    dense, notes = restoring.dense, (*restoring.notes, *decision.notes)
    with watch("emit"):
        opened = with_open_lengths(result, {block.name for block in removal.record.blocks})
    module, program, facts = emitted(result, dense, watch, notes, dense.weights, options.verify, opened)
    report = ChannelReport(
        **facts,
        widths=widths(removal.facts, removal.record.sizes),
        error=removal.record.error,
        blocks=removal.record.blocks,
        choices=_choices(removal, share, restored, options) | decision.choices,
        scores=decision.scores,
    )
    return Result(module, program, report)


def _choices(removal: Removal, share: Share, restored: Restored, options: StructuredOptions) -> dict[str, Any]:
    """What was chosen, for the report."""
    chosen: dict[str, Any] = {"method": options.method, "sparsity": share.part, "budget": dict(options.budget or {})}
    chosen |= {
        "units": options.units,
        "experts": options.experts,
        "roles": list(options.roles),
        "allocation": removal.allocation,
        "score": removal.score,
    }
    return chosen | {"solve": restored.solve, "normalize": restored.normalize}


def _score_name(removal: Removing) -> str | None:
    """The name of the score that channels went by; folding has none, residual blocks go by the outputs' error."""
    if not isinstance(removal, RemoveChannels):
        return "outputs" if isinstance(removal, RemoveBlocks) else None
    return removal.score if isinstance(removal.score, str) else "given"


def whole_channels(options: PruneOptions, function: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of ``vfx.prune_structured`` for ``vfx.prune`` by groups of channels; others are refused."""
    check_names("structured=", function, options.structured or {})
    if options.scope not in ("auto", "group"):
        raise ArgumentError(f"scope={options.scope!r} masks single weights; structured= goes with scope='group'")
    if options.masks != "permanent" or options.steps != 1:
        raise ArgumentError("scope='group' removes channels for good in one step: masks and steps are for weights")
    if options.scores is not None:
        raise ArgumentError(
            "scope='group' goes by channels, and the file of scores= is of single weights; leave it out"
        )
    if not isinstance(options.sparsity, float):
        raise ArgumentError(f"scope='group' takes one sparsity in [0, 1), got {options.sparsity!r}")
    protect = options.protect
    names = () if protect == "auto" else (protect,) if isinstance(protect, str) else tuple(protect)
    alike = (*(option.name for option in fields(Rewriting)), "sparsity", "score", "repair_samples")
    shared = {name: getattr(options, name) for name in alike}
    return {"protect": names} | dict(options.structured or {}) | shared
