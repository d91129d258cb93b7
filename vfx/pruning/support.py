"""What ``score="auto"`` and ``allocation="auto"`` stand for: the support and the shares that did best where tried.

With data, supports are searched by ALPS, layer by layer, and the sparsity is spread over layers in proportion to the
Erdős–Rényi kernel; a head that is a small part of what is left stays whole, and all together lose the share that was
asked for. Without data, in the scope "global", and where a layer is no product of its input with its weight or
reads so much that the search would take minutes, weights go by magnitude, all compared with each other. A scope that is
named decides alone, and a score that is named keeps to its paper: each layer loses the same share. The figures behind
it are in ``benchmarks/results/supports.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfx.program import Program
from vfx.pruning.allocation.allocation import Allocation
from vfx.pruning.allocation.catalogue import SCOPE
from vfx.pruning.allocation.depth import ErdosRenyi
from vfx.pruning.scores.score import Score
from vfx.pruning.targets import find_targets
from vfx.reconstruct.forms import form_of

AUTO = "auto"
HEAD_SHARE = 0.25  # of what is left: a head that holds no more stays whole
WIDEST = 4608  # weights that one output sums over, of a layer whose support is searched


@dataclass(frozen=True)
class Support:
    """A score, an allocation and what is protected, as asked for or chosen; ``scope`` as it was asked for."""

    score: str | Score
    scope: str
    allocation: str | Allocation
    protect: str | Sequence[str]

    def chosen(self, searched: bool) -> Support:
        """Both without "auto"; ``searched`` says whether supports can be searched layer by layer."""
        score, allocation, protect = self.score, self.allocation, self.protect
        if self.score == AUTO:
            score = "alps" if searched and self.scope != "global" else "magnitude"
            protect = () if protect == AUTO else protect
        if self.allocation == AUTO:
            spread = self.score == AUTO and score == "alps" and self.scope == AUTO
            allocation = ErdosRenyi(HEAD_SHARE) if spread else SCOPE
        return Support(score, self.scope, allocation, protect)


def searchable(program: Program) -> bool:
    """Whether the support of every layer can be searched in a time that fits the rest of a pruning."""
    targets, _ = find_targets(program)
    shapes = [target.matrix_shape for target in targets]
    narrow = all(inputs * taps <= WIDEST for _, inputs, taps in shapes)
    return narrow and all(form_of(target.nodes[0]) is not None for target in targets)
