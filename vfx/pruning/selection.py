"""Which weights go: the lowest scores of each selection scope, counted exactly.

================  ======================================================================================
global            all weights are compared with each other (with patterns: those of one pattern)
layer             the weights of one layer
row               the weights that one output channel sums over
N:M               of every M weights along the inputs (same output, same tap) the N best stay
transposable N:M  the same along the outputs of a group, too: of M × M weights those with the best sum
================  ======================================================================================

A scope of n weights at sparsity s loses ⌊s·n⌋, so no row is ever lost whole. Equal scores go in the order of the
weights' names, then of their indices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from vfx.errors import ArgumentError, PassError
from vfx.pruning.order import kth_lowest
from vfx.pruning.targets import Target, by_pattern, groups_of
from vfx.pruning.transposable import transposable

SCOPES = ("global", "layer", "row", "N:M")
Kind = Literal["cubic", "linear"]
Sparsity = float | Mapping[str, float] | None
_ROUNDING = 1e-6  # 0.29 · 100 is 28.999999999999996


def pruned_count(members: int, sparsity: float) -> int:
    """How many of a scope's weights go."""
    return min(members, math.floor(members * sparsity + _ROUNDING))


def _check_numbers(target: Target, scores: Tensor) -> None:
    """Raise PassError for scores that no order puts anywhere."""
    if scores.isnan().any():
        raise PassError(f"the scores of {target.name!r} hold NaN")


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` lowest scores of each row (rows, n); of equal scores the first go."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


@dataclass(frozen=True)
class Schedule:
    """One-shot steps on the way to the final sparsity s: s·(1 − (1 − k/K)³) or s·k/K after step k of K."""

    steps: int = 1
    kind: Kind = "cubic"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ArgumentError(f"steps must be a whole number of at least 1, got {self.steps!r}")
        if self.kind not in ("cubic", "linear"):
            raise ArgumentError(f"schedule={self.kind!r} is unknown; choose 'cubic' or 'linear'")

    def shares(self) -> list[float]:
        """The share of the final sparsity that is reached after each step; the last is 1."""
        rest = [1 - step / self.steps for step in range(1, self.steps + 1)]
        return [1 - x**3 if self.kind == "cubic" else 1 - x for x in rest]


@dataclass(frozen=True)
class Selection:
    """A scope and the sparsity asked of it; ``keep``:``of`` is set for N:M patterns, whose sparsity is their own.

    ``both``: the pattern runs along the outputs, too.
    """

    scope: str
    sparsity: Sparsity
    keep: int = 0
    of: int = 0
    both: bool = False

    @property
    def pattern(self) -> bool:
        return self.of > 0

    def budgets(self, targets: Sequence[Target]) -> list[tuple[tuple[Target, ...], float]]:
        """The targets that share one sparsity, with it. Raises ArgumentError where a pattern fits nothing."""
        if self.pattern:
            self._check_divides(targets)
            return [(tuple(targets), 1 - self.keep / self.of)]
        if isinstance(self.sparsity, Mapping):
            return by_pattern(targets, self.sparsity)
        assert self.sparsity is not None
        return [(tuple(targets), self.sparsity)]

    def scopes(self, target: Target) -> tuple[int, int]:
        """How many scopes a single weight holds, and how many members each has; (0, 0) for the global scope."""
        outputs, inputs, taps = target.matrix_shape
        return {
            "global": (0, 0),
            "layer": (1, target.numel),
            "row": (outputs, inputs * taps),
        }.get(self.scope, (target.numel // max(self.of, 1), self.of))

    def masks(
        self, budgets: Sequence[tuple[tuple[Target, ...], float]], scores: Mapping[str, Tensor], share: float = 1.0
    ) -> dict[str, Tensor]:
        """True where a weight stays, for each scored target; ``share`` is the part of the sparsity to reach."""
        kept: dict[str, Tensor] = {}
        for targets, sparsity in budgets:
            chosen = [target for target in targets if target.name in scores]
            if self.scope == "global":
                for target in chosen:
                    _check_numbers(target, scores[target.name])
                kept |= self._jointly(chosen, scores, sparsity * share)
                continue
            for target in chosen:
                values = scores[target.name]  # read once: it may be made anew each time
                _check_numbers(target, values)
                kept[target.name] = self._alone(target, values, sparsity * share)
        return kept

    def expected(self, budgets: Sequence[tuple[tuple[Target, ...], float]]) -> int:
        """How many weights go in all."""
        if self.scope == "global":
            return sum(pruned_count(sum(t.numel for t in targets), sparsity) for targets, sparsity in budgets)
        return sum(
            count * pruned_count(members, sparsity)
            for targets, sparsity in budgets
            for count, members in map(self.scopes, targets)
        )

    def _jointly(self, targets: Sequence[Target], scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        ordered = sorted(targets, key=lambda target: target.name)
        if not ordered:
            return {}
        count = pruned_count(sum(target.numel for target in ordered), sparsity)
        if not count:
            return {target.name: torch.ones_like(scores[target.name], dtype=torch.bool) for target in ordered}
        threshold, below = kth_lowest(lambda: (scores[target.name] for target in ordered), count)
        kept, left = {}, count - below  # of those at the threshold the first go
        for target in ordered:
            own = scores[target.name]
            mask, equal = own >= threshold.to(own.device), (own == threshold.to(own.device)).reshape(-1)
            at_threshold = equal.nonzero().squeeze(1)[:left]
            left -= len(at_threshold)
            kept[target.name] = mask.reshape(-1).index_fill_(0, at_threshold, False).reshape(target.shape)
        return kept

    def _alone(self, target: Target, scores: Tensor, sparsity: float) -> Tensor:
        matrix = target.matrix(scores)
        if self.scope == "layer":
            return ~lowest(scores.reshape(1, -1), pruned_count(target.numel, sparsity)).reshape(target.shape)
        if self.scope == "row":
            flat = matrix.flatten(1)
            return ~target.restored(lowest(flat, pruned_count(flat.shape[1], sparsity)).reshape(matrix.shape))
        if self.both:
            return self._along_both(target, matrix)
        groups = matrix.transpose(1, 2)  # the inputs of one output at one tap stand together
        gone = lowest(groups.reshape(-1, self.of), self.of - self.keep)
        return ~target.restored(gone.reshape(groups.shape).transpose(1, 2))

    def _along_both(self, target: Target, matrix: Tensor) -> Tensor:
        """The best blocks of outputs × inputs at each tap."""
        blocks = matrix.permute(2, 0, 1).unfold(1, self.of, self.of).unfold(2, self.of, self.of)
        kept = transposable(blocks.reshape(-1, self.of, self.of), self.keep)  # of inputs, of outputs
        whole = kept.reshape(blocks.shape).permute(1, 3, 2, 4, 0)
        return target.restored(whole.reshape(matrix.shape))

    def _check_divides(self, targets: Sequence[Target]) -> None:
        for target in targets:
            outputs, inputs, _ = target.matrix_shape
            sizes = {"inputs": inputs} | ({"outputs": outputs // groups_of(target.nodes[0])} if self.both else {})
            for what, size in sizes.items():
                if not size % self.of:
                    continue
                raise ArgumentError(
                    f"scope={self.scope!r}: {self.of} does not divide the {size} {what} of {target.name!r} "
                    f"{target.shape}; protect it (protect='first' for the first layer) or choose another pattern"
                )


def selection(scope: str, sparsity: Sparsity) -> Selection:
    """A checked Selection. Raises ArgumentError."""
    found = re.fullmatch(r"(transposable )?(\d+):(\d+)", scope)
    if found:
        keep, of = int(found[2]), int(found[3])
        if not 0 < keep < of:
            raise ArgumentError(f"scope={scope!r} must keep some and prune some of every {of}, as 2:4 does")
        if sparsity is not None and not (isinstance(sparsity, Real) and abs(float(sparsity) - (1 - keep / of)) < 1e-6):
            raise ArgumentError(f"scope={scope!r} means sparsity {1 - keep / of:g}; leave sparsity out")
        return Selection(scope, None, keep, of, bool(found[1]))
    if scope not in SCOPES[:3]:
        raise ArgumentError(
            f"scope={scope!r} is unknown; choose one of global, layer, row, or a pattern such as 2:4 or "
            "transposable 2:4"
        )
    return Selection(scope, _checked(sparsity))


def _checked(sparsity: Sparsity) -> Sparsity:
    if sparsity is None:
        raise ArgumentError("give a sparsity: the share of the weights that go, or a dict of patterns")
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ArgumentError("sparsity is an empty dict; give patterns such as {'features.*': 0.9}")
        return {pattern: _share(value, f"sparsity[{pattern!r}]") for pattern, value in sparsity.items()}
    return _share(sparsity, "sparsity")


def _share(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ArgumentError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)
