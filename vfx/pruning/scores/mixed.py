"""Two objectives at once: what a weight is worth to its layer's output, and to the network's loss.

Without a weight a layer errs by w² ‖X‖² (Wanda's score, squared) and the loss by ½ w² F (diagonal Fisher). Both are
counted in units of their mean over the layer and added, in the spirit of MOONSHOT (2026), whose estimates of both are
not diagonal: scores of one layer alone can be compared.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.pruning.gradients import Labels, Loss
from vfx.pruning.scores.fisher import DiagonalFisher
from vfx.pruning.scores.score import Score, Subject
from vfx.pruning.scores.wanda import Wanda
from vfx.pruning.selection import Selection


class Mixed(Score):
    """The error of the layer without a weight and that of the loss, ``share`` of the sum being the loss's.

    ``damping``, ``loss``, ``labels`` are those of ``DiagonalFisher``. Raises ArgumentError for a share outside [0, 1].
    """

    name: ClassVar[str] = "mixed"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[str] = "layer"
    protect: ClassVar[tuple[str, ...]] = ("head",)

    @checked
    def __init__(
        self, share: float = 0.5, *, damping: float = 1e-4, loss: Loss | None = None, labels: Labels = "sampled"
    ):
        if not 0 <= share <= 1:
            raise ArgumentError(f"share={share} lies in [0, 1]")
        self.share, self.by_loss = share, DiagonalFisher(damping, loss=loss, labels=labels)

    def check(self, selection: Selection) -> None:
        if selection.scope == "global":
            raise ArgumentError(
                "score='mixed' counts in units of each layer, which scope='global' cannot compare; choose scope "
                "'layer', 'row' or a pattern such as 2:4"
            )

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        by_layer, by_loss = Wanda().scores(subject), self.by_loss.scores(subject)
        return {
            name: (1 - self.share) * _in_means(by_layer[name].square()) + self.share * _in_means(loss)
            for name, loss in by_loss.items()
        }


def _in_means(values: Tensor) -> Tensor:
    """Values in units of their mean; zeros stay."""
    mean = values.mean()
    return values / mean if mean > 0 else values
