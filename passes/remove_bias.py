"""RemoveBias: b ← 0 in the last k layers (backward) or the first k (forward).

On a merged network a normalization (*Vanishing Feature* §5.2 and Figure 13; k = 5 or 6 is best on VGG16, and
``vfx.normalize.choice`` finds k on held-out data). On the edges, with all layers, a preparation for matching: networks
without biases match far better (*Rethinking Model Re-Basin* §3.2: barrier 79.2 → 8.5 %), though each edge loses what
its biases did.
"""

from __future__ import annotations

from vfx.analyse.layers import number_layers
from vfx.arguments import checked
from vfx.errors import PassError
from vfx.normalize.biases import Direction, removed_biases, without
from vfx.program import Program
from vfx.rewrite import Pass, PassResult

DEFAULT_LAYERS = 5


class RemoveBias(Pass[None]):
    """Zero the biases of ``count`` conv and linear layers from one end, None: of all; private (branch) biases stay.

    Several weight sets are taken as edges that are still to be matched, so only before branches are duplicated.
    """

    needs = (number_layers,)

    @checked
    def __init__(self, count: int | None = DEFAULT_LAYERS, direction: Direction = "backward"):
        self.count, self.direction = count, direction

    def requires(self, program: Program) -> None:
        if program.edges > 1 and (program.private or program.goals):
            raise PassError("RemoveBias acts on edges before they are aligned, or on the merged network")

    def apply(self, program: Program) -> PassResult[None]:
        names = removed_biases(program, self.count, self.direction)
        sets = [without(weights, names) for weights in program.weights]
        return PassResult(
            program.with_weights(sets, f"RemoveBias({self.direction}, {'all' if self.count is None else self.count})")
        )
