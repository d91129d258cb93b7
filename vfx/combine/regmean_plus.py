"""RegMean++: each layer solved for what all edges would compute on the merged network's inputs to it.

min Σ αᵢ ‖Zᵢ W − Zᵢ Wᵢ‖² with Zᵢ what the merged network, all layers before it solved already, gives the layer on the
data of edge i (Nguyen et al. 2025, arXiv 2508.03121). The paper takes the inputs of whole transformer blocks from the
merged network and runs the edge's own layers inside a block; here every layer reads the merged network, which asks for
no blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfx.arguments import checked
from vfx.combine.combiner import Combination
from vfx.combine.grams import Regression, gram_of
from vfx.errors import ArgumentError
from vfx.processes import added, shared
from vfx.program import Execution
from vfx.progress import track
from vfx.reconstruct.plan import ProductCall
from vfx.reconstruct.sweep import careful
from vfx.rewrite.averaging import averaged
from vfx.statistics.spill import MEMORY_LIMIT, Spill


class RegMeanPlus(Regression):
    """Solve layer after layer for the edges' outputs on the merged network's inputs; no base is needed.

    ``data``: the batches of each edge's task, without labels, in the order of the edges. ``off_diagonal`` β as for
    ``RegMean``. Raises ArgumentError without data of each edge: on the same inputs all weights count alike, and the
    average is the solution.

    Source: *RegMean++* (Nguyen et al. 2025, arXiv 2508.03121), §3.

    >>> merged = vfx.merge([a, b], x, combine=vfx.RegMeanPlus([images_of_a, images_of_b]), heads=1)
    """

    @checked
    def __init__(self, data: Sequence[Any] | None = None, off_diagonal: float = 0.9):
        super().__init__(data, off_diagonal)

    @torch.no_grad()
    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        if self.data is None:
            raise ArgumentError(
                "combine='regmean++' on one set of data is the average of the weights; give each edge its own, as "
                "vfx.RegMeanPlus([data_of_a, data_of_b]), or solve for outputs by solve='least_squares'"
            )
        return _Sweep(self, combination).run()


class _Sweep:
    """All batches of all edges on their way through the merged network, whose weights are solved as they go."""

    def __init__(self, method: RegMeanPlus, combination: Combination):
        self.method, self.combination = method, combination
        merged = averaged(combination.program, combination.shares)
        self.weights, self.plan = dict(merged.weights[0]), merged.plan
        self.position = {step.node: index for index, step in enumerate(self.plan)}
        self.runs: list[tuple[Execution, int]] = []
        self.samples = [0] * len(combination.shares)
        for edge, batches in enumerate(method.batches(combination)):
            for batch in shared(batches, list):
                self.runs.append((Execution(merged.graph, self.weights, batch, self.plan), edge))
                self.samples[edge] += batches.size(batch)

    def run(self) -> dict[str, Tensor]:
        solved, first = {}, self.combination.program.weights[0]
        products = self.method.products(self.combination)
        samples = added({"samples": [torch.tensor(self.samples)]})["samples"][0].tolist()
        progress = bool(self.combination.reading.get("progress", False))
        with Spill(MEMORY_LIMIT, self.weights.values()) as spill:
            for name, calls in track(products.items(), "RegMean++", len(products), progress):
                sums = added({edge: [gram] for edge, gram in self._grams(calls, spill).items()})
                grams = [sums[edge][0] / samples[edge] for edge in range(len(samples))]
                solved[name] = self.method.solved(self.combination, name, calls[0], grams)
                self.weights[name] = solved[name].to(first[name])
        return solved

    def _grams(self, calls: Sequence[ProductCall], spill: Spill) -> dict[int, Tensor]:
        """The sum of each edge's Gram matrices over all calls; the runs stand in front of the first one then."""
        total: dict[int, Tensor] = {}
        spill.next_stage()
        for run, edge in self.runs:
            spill.fetch(run)
            self._advance(run, calls[0])
            ahead = run.fork(careful(self.plan)) if len(calls) > 1 else run
            for call in calls:
                self._advance(ahead, call)
                gram = gram_of(call, ahead.value)
                total[edge] = gram if edge not in total else total[edge] + gram
            spill.keep(run)
        return total

    def _advance(self, run: Execution, call: ProductCall) -> None:
        while run.position < self.position[call.node]:
            run.step()
