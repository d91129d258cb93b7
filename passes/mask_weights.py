"""MaskWeights: one-shot pruning of single weights (*Vanishing Feature* §5.5, App. A.7).

Every convolution and linear weight is scored, the lowest scores of each selection scope are set to zero, and the
weights that stay are updated where the score says how (WoodFisher). In several steps the sparsity grows along a
schedule, the scores are taken anew on what is left, and what went stays away. The graph does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.checkpointing.journal import Section, section
from vfx.checks import check_finite
from vfx.errors import ArgumentError, PassError
from vfx.on_read import OnRead
from vfx.program import Program
from vfx.pruning.allocation.allocation import Allocation
from vfx.pruning.allocation.catalogue import allocation_named
from vfx.pruning.scores.catalogue import score_named
from vfx.pruning.scores.score import Pruned, Score, Subject, Values
from vfx.pruning.selection import Schedule, Sparsity, selection
from vfx.pruning.targets import Target, find_targets, unprotected
from vfx.rewrite import Pass, PassResult
from vfx.statistics.data import reusable

Budgets = list[tuple[tuple[Target, ...], float]]
PIECE = 1 << 20  # weights that are held against their mask at a time


@dataclass(frozen=True, eq=False)
class Masked:
    """``masks`` (True: stays, by FQN), and the ``budgets`` of the layers that they were chosen in."""

    masks: dict[str, Tensor]
    budgets: Budgets


class MaskWeights(Pass[Masked]):
    """Set the weights that ``score`` needs least to zero; the record of ``run`` holds the masks.

    ``scope``: "global", "layer", "row", "N:M", or "auto" (the score's own). ``sparsity``: a share in [0, 1), or a dict
    of globs of layers; what no glob matches is kept. ``allocation``: how the share is spread over layers, "scope" (the
    scope alone decides), "progressive", "erk", "owl", "error", or an Allocation; for the scopes "layer" and "row", and
    for each glob by itself.
    ``protect``: globs, "first", "head"; "auto" is the score's own.
    Raises ArgumentError, WeightError, DataError, PassError.
    """

    weight_sets = "one"

    @checked
    def __init__(
        self,
        score: str | Score = "magnitude",
        sparsity: Sparsity = None,
        scope: str = "auto",
        *,
        allocation: str | Allocation = "scope",
        data: Any = None,
        max_samples: int | None = None,
        protect: str | Sequence[str] = "auto",
        steps: int = 1,
        schedule: str = "cubic",
        seed: int = 0,
        device: Any = None,
        progress: bool = True,
    ):
        self.score = score_named(score)
        self.selection = selection(self.score.scope if scope == "auto" else scope, sparsity)
        self.score.check(self.selection)
        self.allocation = self._checked_allocation(allocation, scope, data)
        self.schedule = Schedule(steps, schedule)  # type: ignore[arg-type]
        if self.selection.pattern and steps > 1:
            raise ArgumentError(f"scope={scope!r} has no sparsity to grow in {steps} steps; leave steps out")
        if self.score.needs_data and data is None:
            raise ArgumentError(f"score={self.score.name!r} runs the network on data; give data=")
        self.protect = self.score.protect if protect == "auto" else (protect,) if isinstance(protect, str) else protect
        self.data, self.max_samples, self.seed = reusable(data), max_samples, seed
        self.device, self.progress = device, progress

    def _checked_allocation(self, allocation: str | Allocation, scope: str, data: Any) -> Allocation | None:
        found = allocation_named(allocation)
        if found is None:
            return None
        if self.selection.scope not in ("layer", "row"):
            raise ArgumentError(
                f"allocation={found.name!r} spreads a sparsity over layers; it takes scope 'layer' or 'row', not "
                f"{self.selection.scope!r}"
            )
        if found.needs_data and data is None:
            raise ArgumentError(f"allocation={found.name!r} runs the network on data; give data=")
        return found

    def requires(self, program: Program) -> None:
        check_finite(program.weights[0], "the network", program.masks)

    def apply(self, program: Program) -> PassResult[Masked]:
        found, notes = find_targets(program)
        budgets = self._budgets(program, unprotected(found, self.protect))
        working, masked = program, Masked({}, budgets)
        for share in self.schedule.shares():
            pruned = self._step(working, masked, share)
            masked = replace(masked, masks=pruned.masks)
            working = working.with_weights([{**working.weights[0], **pruned.weights}])
        result = program.with_weights(working.weights, self._history(budgets))
        return PassResult(result.with_notes(notes), masked)

    def _budgets(self, program: Program, targets: tuple[Target, ...]) -> Budgets:
        """The targets that share one sparsity, with it."""
        budgets = self.selection.budgets(targets)
        if self.allocation is None:
            return budgets
        spread = self.allocation.shares
        shares = [spread(self._subject(program, own, {}), sparsity) for own, sparsity in budgets if own]
        return [((target,), each[target.name]) for (own, _), each in zip(budgets, shares) for target in own]

    def ensures(self, program: Program, result: PassResult[Masked]) -> None:
        """Raise unless exactly what was asked for is zero and nothing else than the targets changed."""
        super().ensures(program, result)
        before, after, masks = program.weights[0], result.program.weights[0], result.record.masks
        gone = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
        if gone != (asked := self.selection.expected(result.record.budgets)):
            raise PassError(f"{self.name} removed {gone} weights, {asked} were asked for")
        for name, tensor in after.items():
            if name not in masks and tensor is not before[name]:
                raise PassError(f"{self.name} changed {name}, which it does not prune")
            if name in masks and _any_beside(tensor, masks[name]):
                raise PassError(f"{self.name} left weights of {name} that its mask removes")
        check_finite({name: after[name] for name in masks}, "the pruned network")

    @torch.no_grad()
    def _step(self, program: Program, masked: Masked, share: float) -> Pruned:
        targets = tuple(target for own, _ in masked.budgets for target in own)
        subject = self._subject(program, targets, masked.masks)
        if self.score.layer_by_layer:  # each layer is saved when it is pruned
            return self.score.prune(subject, lambda scores: self._select(scores, masked, share))

        journal, tensors = section("masks", [target.name for target in targets]), program.weights[0]
        dense = {target.name: tensors[target.name] for target in targets}
        saved = _restored(journal, dense)
        if saved is not None:
            return saved
        pruned = self.score.prune(subject, lambda scores: self._select(scores, masked, share))
        for stage, name in enumerate(dense if journal.on else ()):
            parts = {"mask": pruned.masks[name], "weight": pruned.weights[name]}
            journal.once(stage, partial(dict, parts), dict.fromkeys(parts, dense[name]))
        return pruned

    def _subject(self, program: Program, targets: tuple[Target, ...], kept: Values) -> Subject:
        return Subject(
            program, targets, self.data, self.max_samples, self.seed, self.device, self.progress, kept, self.selection
        )

    def _select(self, scores: Values, masked: Masked, share: float) -> dict[str, Tensor]:
        """Masks for the scored weights; what an earlier step removed goes first."""
        first = lambda name, values: values.masked_fill(~masked.masks[name], -torch.inf)  # noqa: E731
        ranked = OnRead(scores, lambda name, values: first(name, values) if name in masked.masks else values)
        return self.selection.masks(masked.budgets, ranked, share)

    def _history(self, budgets: Budgets) -> str:
        total = sum(target.numel for targets, _ in budgets for target in targets)
        share = self.selection.expected(budgets) / max(total, 1)
        steps = f", {self.schedule.steps} steps" if self.schedule.steps > 1 else ""
        spread = f", {self.allocation.name}" if self.allocation else ""
        return f"MaskWeights({self.score.name}, {self.selection.scope}{spread}, {share:.2%}{steps})"


def _restored(journal: Section, dense: Values) -> Pruned | None:
    """The masks and weights of a run before, on the devices of the ``dense`` ones; None unless all are there."""
    masks, weights = dict[str, Tensor](), dict[str, Tensor]()
    for stage, (name, tensor) in enumerate(dense.items()):
        saved = journal.entry(stage, {"mask": tensor, "weight": tensor})
        if saved is None:
            return None
        masks[name], weights[name] = saved.tensors["mask"], saved.tensors["weight"]
    return Pruned(masks, weights) if dense else None


def _any_beside(tensor: Tensor, mask: Tensor) -> bool:
    """Whether a weight that its mask removes is not zero."""
    pairs = zip(tensor.reshape(-1).split(PIECE), mask.reshape(-1).split(PIECE))
    return any(bool((weights.bool() & ~kept).any()) for weights, kept in pairs)
