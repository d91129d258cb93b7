"""SparseGPT: columns pruned from the first to the last, what goes made good by those behind (Frantar, Alistarh 2023).

For a layer's weight W (one row an output) and the Hessian H = XᵀX of its inputs, with U the upper Cholesky factor of
H⁻¹: column c goes where w² / U_cc² is small, and the error (w_c − ŵ_c) / U_cc, times row c of U, is taken off the
columns behind it, which is the optimal brain surgeon's step with the columns before c fixed (§3.2). Masks are chosen
block by block of columns, on the weights as they are then (§3.3), or M columns at a time for N:M patterns.

A block takes its part of what the scope has to lose, so that the whole scope loses exactly what was asked for.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.scores.hessian import LayerProblem, LayerScore, layer_problem
from vfx.pruning.scores.score import Pruned, Select, Subject
from vfx.pruning.scores.sequential import one_by_one
from vfx.pruning.selection import Selection, lowest
from vfx.pruning.targets import Target
from vfx.pruning.transposable import transposable


class SparseGPT(LayerScore):
    """Optimal brain surgery column by column, each layer on what the pruned layers before it give it.

    ``block``: columns whose masks are chosen together. ``damping``: what is added to the Hessian's diagonal, as a share
    of its mean. Raises ArgumentError.

    Example: ``vfx.prune(model, x, sparsity=0.5, score=vfx.SparseGPT(block=64), data=loader)``.
    """

    name: ClassVar[str] = "sparsegpt"

    @checked
    def __init__(self, block: int = 128, damping: float = 0.01):
        if block < 1 or damping <= 0:
            raise ArgumentError(f"block={block} must be at least 1 and damping={damping} above 0")
        self.block, self.damping = block, damping

    def prune(self, subject: Subject, select: Select) -> Pruned:
        def prune_one(target: Target, weight: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
            problem = layer_problem(target, weight, values)
            # How many weights go is a matter of the scope's size alone: any scores tell.
            gone = ~problem.form.matrix(select({target.name: self.layer_scores(problem)})[target.name])
            before = subject.kept.get(target.name)
            forced = torch.zeros_like(gone) if before is None else ~problem.form.matrix(before)
            kept, pruned = self._swept(problem, gone, forced, subject.selection)
            mask = problem.form.weight(kept)
            return mask, problem.form.weight(pruned).to(weight.dtype).masked_fill(~mask, 0)

        return one_by_one(subject, prune_one, resumes=True)

    def layer_scores(self, problem: LayerProblem) -> Tensor:
        """w² / [H⁻¹]_cc: what removing one weight alone costs."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.damped(self.damping)))
        costs = problem.weight.square() / inverse.diagonal(dim1=1, dim2=2)[:, :, None]
        return problem.form.weight(costs)

    def _swept(
        self, problem: LayerProblem, gone: Tensor, forced: Tensor, selection: Selection | None
    ) -> tuple[Tensor, Tensor]:
        """The mask (True: stays) and the weight (G, K, O) behind all columns; ``gone`` has the counts of each scope."""
        pattern = selection is not None and selection.pattern
        order = _order(problem, pattern)
        hessian = problem.damped(self.damping)[:, order][:, :, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        weight, gone, forced = (x[:, order].mT for x in (problem.weight, gone, forced))  # (G, O, K)
        choice: _Choice
        if pattern:
            assert selection is not None
            pick = _Blocks(selection.keep) if selection.both else _Pattern(selection.of - selection.keep)
            choice, block = pick, selection.of
        else:
            by_row = selection is not None and selection.scope == "row"
            choice, block = _Counted(gone, forced, by_row), self.block
        kept, pruned = surgery(weight, factor, choice, block)
        back = torch.argsort(order)
        return kept.mT[:, back], pruned.mT[:, back]


def surgery(weight: Tensor, factor: Tensor, choice: _Choice, block: int) -> tuple[Tensor, Tensor]:
    """What stays (G, O, K) and the weights behind it; ``factor`` (G, K, K) is U with UᵀU = H⁻¹."""
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[2]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        inner, part = factor[:, start:end, start:end], weight[:, :, start:end]
        scale = inner.diagonal(dim1=1, dim2=2)
        kept[:, :, start:end] = ~choice(part.square() / scale.square()[:, None], start, end)
        errors = torch.zeros_like(part)
        for column in range(end - start):
            stays = part[:, :, column] * kept[:, :, start + column]
            errors[:, :, column] = (part[:, :, column] - stays) / scale[:, None, column]
            part[:, :, column:] -= errors[:, :, column, None] * inner[:, None, column, column:]
            part[:, :, column] = stays
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return kept, weight


# which weights of a block go ------------------------------------------------------------------------------------------


class _Choice(Protocol):
    """True where a weight of the columns from ``start`` to ``end`` goes, by its costs (G, O, columns)."""

    def __call__(self, costs: Tensor, start: int, end: int) -> Tensor: ...


class _Pattern:
    """The ``count`` cheapest of each output's block."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, costs: Tensor, start: int, end: int) -> Tensor:
        return lowest(costs.flatten(0, 1), self.count).reshape(costs.shape)


class _Blocks:
    """All but the ``keep`` dearest in each row and column of the square blocks."""

    def __init__(self, keep: int):
        self.keep = keep

    def __call__(self, costs: Tensor, start: int, end: int) -> Tensor:
        side = end - start
        return ~transposable(costs.reshape(-1, side, side), self.keep).reshape(costs.shape)


class _Counted:
    """As many of each block that the scopes lose in all what they have to, ``forced`` ones first.

    Beside the forced ones a block loses its part of what else has to go, in proportion to what it has besides.
    """

    def __init__(self, gone: Tensor, forced: Tensor, by_row: bool):
        self.by_row, self.forced = by_row, forced
        free = self._scopes(~forced)
        self.free = free.sum(1)
        self.more = self._scopes(gone).sum(1) - self._scopes(forced).sum(1)

    def __call__(self, costs: Tensor, start: int, end: int) -> Tensor:
        forced = self.forced[:, :, start:end]
        counts = self._scopes(forced).sum(1) + self._through(end) - self._through(start)
        ranked = self._scopes(costs.masked_fill(forced, -torch.inf))
        ranks = ranked.argsort(dim=1, stable=True).argsort(dim=1)
        return (ranks < counts[:, None]).reshape(costs.shape)

    def _through(self, end: int) -> Tensor:
        """How many unforced ones go in all columns before ``end``, of each scope."""
        seen = self._scopes(~self.forced[:, :, :end]).sum(1)
        return self.more * seen // self.free.clamp_min(1)

    def _scopes(self, x: Tensor) -> Tensor:
        """(scopes, members)."""
        return x.flatten(0, 1) if self.by_row else x.reshape(1, -1)


def _order(problem: LayerProblem, pattern: bool) -> Tensor:
    """The order of the columns: as they stand, or for patterns with the inputs of one tap side by side."""
    columns = problem.weight.shape[1]
    index = torch.arange(columns, device=problem.weight.device)
    return index.reshape(-1, problem.form.taps).T.reshape(-1) if pattern else index
