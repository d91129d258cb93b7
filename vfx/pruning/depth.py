"""Which residual blocks go: one after the other the one without which the outputs change least.

The error of a network without some blocks is Σ ‖y − y′‖² / Σ ‖y‖² over its outputs y on calibration data and y′ without
them. Blocks are taken away greedily, each measured with those before it gone, so that two that stand in for each other
do not both go (ShortGPT, Men et al. 2024, ranks blocks once, by how much they turn the stream).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfx.analyse.cost import cost
from vfx.capture.outputs import named_tensors
from vfx.program import Program
from vfx.pruning.choice import seconds
from vfx.pruning.residual import ResidualBlock, without

SAMPLES = 128  # that the errors are measured on, where no fewer are asked for


@dataclass(frozen=True)
class RemovedBlock:
    """A block that went, the parameters that served it alone, and the outputs' relative error from then on."""

    name: str
    params: int
    error: float


class OutputErrors:
    """The error of networks against a ``program``, on batches that are read once."""

    @torch.no_grad()
    def __init__(self, program: Program, batches: Sequence[list[Tensor]]):
        self.batches = list(batches)
        self.wanted = [_floating(program(*batch)) for batch in self.batches]
        self.size = sum(float(y.double().square().sum()) for batch in self.wanted for y in batch.values())

    @torch.no_grad()
    def __call__(self, network: Program) -> float:
        """Σ ‖y − y′‖² / Σ ‖y‖²; infinite where an output is no number any more."""
        off = 0.0
        for batch, wanted in zip(self.batches, self.wanted):
            given = _floating(network(*batch))
            off += sum(float((y.double() - given[name].double()).square().sum()) for name, y in wanted.items())
        return off / max(self.size, torch.finfo(torch.float64).tiny) if off == off else float("inf")


def _floating(output: object) -> dict[str, Tensor]:
    return {name: y for name, y in named_tensors(output).items() if y.is_floating_point()}


def chosen_blocks(
    program: Program, blocks: Sequence[ResidualBlock], errors: OutputErrors, enough: Callable[[int, Program], bool]
) -> tuple[list[ResidualBlock], list[RemovedBlock]]:
    """The blocks that go until ``enough`` (how many went, the network without them) says so, and their errors.

    Of two that change as little the first of the graph goes. One block at least stays.
    """
    gone: list[ResidualBlock] = []
    rows: list[RemovedBlock] = []
    network = program
    while len(gone) < len(blocks) - 1 and not enough(len(gone), network):
        rest = [block for block in blocks if block not in gone]
        each = [errors(without(program, [*gone, block])) for block in rest]
        error, block = min(zip(each, rest), key=lambda pair: pair[0])
        gone.append(block)
        network = without(program, gone)
        params = sum(program.weights[0][n].numel() for n in block.tensors if program.is_parameter(n))
        rows.append(RemovedBlock(block.name, params, error))
    return gone, rows


def until(program: Program, count: int, share: float, budget: str) -> Callable[[int, Program], bool]:
    """Whether ``share`` of ``count`` blocks is gone, rounded to whole ones, or of another budget."""
    if budget == "channels":
        return lambda gone, network: gone >= int(count * share + 0.5)
    measure = seconds if budget == "latency" else lambda network: float(getattr(cost(network), budget))
    limit = measure(program) * (1 - share)
    return lambda gone, network: measure(network) <= limit
