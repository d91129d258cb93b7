"""One computation of scores for any number of prunings, as one pass over the data serves any number of merges."""

from __future__ import annotations

from torch import Tensor

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.scores.catalogue import score_named
from vfx.pruning.scores.score import Score, Scored, Subject, Values
from vfx.pruning.selection import Selection


class ScoreOnce(Score):
    """A score that is computed once for a Program's weights and used whenever they are pruned again.

    Data and samples are those of the first pruning; other weights are scored anew. Raises ArgumentError for Wanda with
    propagation="pruned", whose scores depend on what is pruned.
    """

    @checked
    def __init__(self, score: str | Score):
        self.inner = score_named(score)
        if self.inner.layer_by_layer:
            raise ArgumentError(f"the {self.inner.name} scores of a layer depend on how earlier layers are pruned")
        self.name, self.needs_data = self.inner.name, self.inner.needs_data  # type: ignore[misc]
        self.moves_weights = self.inner.moves_weights
        self.scope, self.protect = self.inner.scope, self.inner.protect  # type: ignore[misc]
        self._known: tuple[list[Tensor], Scored] | None = None

    def check(self, selection: Selection) -> None:
        self.inner.check(selection)

    def scores(self, subject: Subject) -> Values:
        return self.prepare(subject).values

    def prepare(self, subject: Subject) -> Scored:
        weights = [subject.weight(target) for target in subject.targets]
        if self._known is None or not _same(self._known[0], weights):
            self._known = None  # frees what the old scores hold
            self._known = weights, self.inner.prepare(subject)
        return self._known[1]


def _same(known: list[Tensor], weights: list[Tensor]) -> bool:
    return len(known) == len(weights) and all(a is b for a, b in zip(known, weights))
