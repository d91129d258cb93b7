"""Task arithmetic: θ = θ₀ + λ Σ τᵢ with the task vectors τᵢ = θᵢ − θ₀ (Ilharco et al., ICLR 2023, §2)."""

from __future__ import annotations

from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination, Combiner


class TaskArithmetic(Combiner):
    """Add the sum of the task vectors, times ``scale``, to the base.

    ``scale`` λ: a number; 1/N gives the average of N edges. The default is what the authors advise where nothing can
    be validated. With ``weights=`` each task vector counts N αᵢ times.

    Source: *Editing Models with Task Arithmetic* (Ilharco et al., ICLR 2023), §2 and §4.

    >>> merged = vfx.merge([a, b], x, base=pretrained, combine=vfx.TaskArithmetic(scale=0.5))
    """

    needs = frozenset({"base"})

    @checked
    def __init__(self, scale: float = 0.4):
        self.scale = scale

    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        return {name: combination.of_base(name) + self.scale * combination.summed(name) for name in combination.names}
