"""Whose outputs a network is solved for: reference networks, their shares, and how their channels come to its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vfx.arguments import check_fields
from vfx.errors import ArgumentError
from vfx.program import Execution, Program, Step

# (node, axis) -> what brings an axis of a reference's value to the network's: an index (new,), a matrix (new, old), or
# None where nothing changes.
Carry = Callable[[str, int], Tensor | None]


def unchanged(node: str, dim: int) -> Tensor | None:
    """The carry of a network whose channels stand where the reference's do."""
    return None


@dataclass(frozen=True, eq=False)
class Reference:
    """A network of one weight set, its ``share`` in the goals, and what brings its values' axes to the student's."""

    program: Program
    share: float = 1.0
    carry: Carry = unchanged

    def __post_init__(self) -> None:
        check_fields(self)

    def value(self, node: str, value: Tensor) -> Tensor:
        """A value of this network in the student's channels."""
        for dim in range(value.ndim):
            along = self.carry(node, dim)
            if along is None:
                continue
            if along.ndim == 1:
                value = value.index_select(dim, along.to(value.device))
            else:
                value = torch.tensordot(value, along.to(value), ([dim], [1])).movedim(-1, dim)
        return value


class References:
    """All references with their schedules; ``followed`` nodes have the goals of reference ``edge`` alone."""

    def __init__(self, references: Sequence[Reference], followed: frozenset[str] = frozenset(), edge: int = 0):
        if not references:
            raise ArgumentError("reconstruction needs at least one reference network")
        if not 0 <= edge < len(references):
            raise ArgumentError(f"follow_edge={edge} is no edge; there are 0 … {len(references) - 1}")
        self.all, self.followed, self.edge = tuple(references), followed, edge
        self.plans: list[list[Step]] = [r.program.plan for r in self.all]
        names = [{node.name for node in r.program.graph.nodes if node.op == "call_function"} for r in self.all]
        self.names = frozenset.intersection(*map(frozenset, names))

    def shares(self, node: str, owner: int | None = None) -> list[float]:
        """The share of each reference in the goal at a node, of samples that are all references' or an ``owner``'s."""
        alone = self.edge if node in self.followed else owner
        if alone is not None:
            return [float(index == alone) for index in range(len(self.all))]
        return [r.share for r in self.all]

    def start(self, batch: list[Tensor]) -> list[Execution]:
        """An execution of each reference on one batch."""
        return [Execution(r.program.graph, r.program.weights[0], batch, plan) for r, plan in zip(self.all, self.plans)]

    def approach(self, runs: Sequence[Execution], node: str) -> None:
        """Take the executions up to a node, which is the next to run then."""
        for run in runs:
            while run.plan[run.position].node.name != node:
                run.step()

    def goal(self, runs: Sequence[Execution], node: str, owner: int | None = None) -> Tensor:
        """Σ αᵢ yᵢ at a node; the executions are taken up to it, those without a share stay where they are."""
        total: Tensor | None = None
        for reference, share, run in zip(self.all, self.shares(node, owner), runs):
            if share:
                value = reference.value(node, _advance(run, node))
                total = value * share if total is None else torch.add(total, value, alpha=share)
        assert total is not None, "the shares of a node sum to 1"
        return total


def _advance(run: Execution, name: str) -> Tensor:
    while True:
        node, value = run.step()
        if node.name == name:
            return value  # type: ignore[no-any-return]
