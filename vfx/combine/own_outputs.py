"""Each layer of the merged network solved for what each edge gives on its own data.

min Σᵢ ‖Zᵢ W − Yᵢ‖² with Zᵢ what the merged network, all layers before it solved already, gives the layer on the data of
edge i, and Yᵢ what edge i itself gives there (of a sum that the layer's output goes into, where that is known by then).
RegMean++ has Zᵢ Wᵢ in the place of Yᵢ, which repeats the errors of the layers before; Yᵢ takes them back. It is
``vfx.reconstruct`` with one reference for each batch; gains, shifts, biases and BatchNorms are solved, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination
from vfx.combine.own_data import OwnData
from vfx.errors import ArgumentError
from vfx.reconstruct.plan import units_of
from vfx.reconstruct.references import Reference, References
from vfx.reconstruct.sweep import Options, Sweep
from vfx.rewrite.averaging import averaged


class OwnOutputs(OwnData):
    """Solve layer after layer for each edge's own outputs on its own data; no base is needed.

    ``data``: the batches of each edge's task, without labels, in the order of the edges, each counting by its samples.
    ``ridge``: λ towards the average as a share of the mean square of a layer's inputs; None chooses it for each layer
    on held-out samples. Raises ArgumentError without data of each edge, or with ``weights=``.

    Source: PLeaS (Nasery et al., CVPR 2025), §4.2, with the goals of each task apart.

    >>> merged = vfx.merge([a, b], x, combine=vfx.OwnOutputs([images_of_a, images_of_b]), heads=1)
    """

    @checked
    def __init__(self, data: Sequence[Any] | None = None, ridge: float | None = None):
        super().__init__(data)
        self.ridge = ridge

    @torch.no_grad()
    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        if self.data is None:
            raise ArgumentError(
                "combine='own_outputs' on one set of data has as many goals as edges; give each edge its own, as "
                "vfx.OwnOutputs([data_of_a, data_of_b]), or solve for their mean by solve='least_squares'"
            )
        count = len(combination.shares)
        if any(abs(share * count - 1) > 1e-6 for share in combination.shares):
            raise ArgumentError("weights=: in combine='own_outputs' edges count by the samples of their data")
        student = averaged(combination.program, combination.shares)
        weights = dict(student.weights[0])
        references = References([Reference(combination.edges.select(edge), 1 / count) for edge in range(count)])
        units, _ = units_of(student, references.names, True)
        start = dict(weights)
        options = Options(self.ridge, progress=bool(combination.reading.get("progress", False)))
        sweep = Sweep(student, weights, references, units, options)
        sweep.run(self.batches(combination), lambda unit: unit.read(start), {})
        return {name: weights[name] for unit in units for name in unit.parameters}
