"""RegMean: each layer solved for what all edges compute on their own inputs to it.

min Σ αᵢ ‖Xᵢ W − Xᵢ Wᵢ‖² with Xᵢ the inputs of edge i to the layer when it runs on its own data: closed form in the
Gram matrices Xᵢᵀ Xᵢ (Jin et al., ICLR 2023, eq. 2). Biases, norms and all that is no product are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination
from vfx.combine.grams import Regression, gram_of
from vfx.processes import added, count, shared
from vfx.program import Execution, Program
from vfx.progress import track
from vfx.reconstruct.plan import ProductCall
from vfx.statistics.data import Batches


class RegMean(Regression):
    """Solve each layer for the edges' outputs on their own inputs; no base is needed.

    ``data``: the batches of each edge's task, without labels, in the order of the edges; without it all edges run on
    ``data=`` of the merge. ``off_diagonal`` β: what entries off the Gram matrices' diagonals are scaled by. Raises
    ArgumentError.

    Source: *Dataless Knowledge Fusion by Merging Weights of Language Models* (Jin et al., ICLR 2023), eq. 2 and §3.3.

    >>> merged = vfx.merge([a, b], x, combine=vfx.RegMean([images_of_a, images_of_b]), heads=1)
    """

    @checked
    def __init__(self, data: Sequence[Any] | None = None, off_diagonal: float = 0.9):
        super().__init__(data, off_diagonal)

    @torch.no_grad()
    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        products = self.products(combination)
        progress = bool(combination.reading.get("progress", False))
        grams = [
            edge_grams(combination.edges.select(edge), products, batches, progress)
            for edge, batches in enumerate(self.batches(combination))
        ]
        return {
            name: self.solved(combination, name, calls[0], [calls_of[name] for calls_of in grams])
            for name, calls in products.items()
        }


def edge_grams(
    edge: Program, products: dict[str, list[ProductCall]], batches: Batches, progress: bool
) -> dict[str, Tensor]:
    """The mean over samples of the Gram matrix of a network's own inputs to each product, over all calls of it."""
    plan, sources = edge.plan, {node.name: node for node in edge.graph.nodes}
    at: dict[str, list[tuple[str, ProductCall]]] = {}
    for name, calls in products.items():
        for call in calls:
            at.setdefault(call.node.name, []).append((name, call))
    total: dict[str, Tensor] = {}
    samples = 0
    for batch in track(shared(batches, list), "Gram matrices", len(batches) // count(), progress):
        samples += batches.size(batch)
        run, waiting = Execution(edge.graph, edge.weights[0], batch, plan), sum(len(calls) for calls in at.values())
        while waiting:
            for name, call in at.get(plan[run.position].node.name, ()):
                gram = gram_of(call, lambda node: run.value(sources[node.name]))  # noqa: B023
                total[name] = gram if name not in total else total[name] + gram
                waiting -= 1
            run.step()
    sums = added({name: [gram] for name, gram in total.items()})
    (number,) = added({"samples": [torch.tensor(samples)]})["samples"]
    return {name: gram / int(number) for name, (gram,) in sums.items()}
