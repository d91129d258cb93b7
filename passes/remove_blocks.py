"""RemoveBlocks: whole residual blocks go, and what is left is a shallower network.

A block is a branch that is added to a value it was computed from (``vfx.pruning.residual``); without it the value is
handed on as it is. Blocks go one after the other, each time the one without which the outputs change least
(``vfx.pruning.depth``). The shallower network is proved to compute what the whole one computes with zeros in the place
of the branches. Values between the layers that stay keep their channels, so that a reconstruction solves them for the
whole network's: where a sum lost a branch, the next branches are solved for what it gave.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.arguments import checked
from vfx.errors import ArgumentError, PassError, VerificationError
from vfx.program import Program
from vfx.proof import PRESERVED, function_error, in_double
from vfx.pruning.depth import SAMPLES, OutputErrors, chosen_blocks, until
from vfx.pruning.removed import Removed
from vfx.pruning.residual import ResidualBlock, residual_blocks, silenced, without
from vfx.pruning.widths import BUDGETS, check_protected, is_protected
from vfx.reconstruct.references import unchanged
from vfx.rewrite import Pass, PassResult
from vfx.statistics.data import Batches


class RemoveBlocks(Pass[Removed]):
    """Remove ``sparsity`` of the residual blocks (or of the ``budget``), those that ``data`` show to matter least.

    ``budget``: what ``sparsity`` is a share of: "channels" (here the number of blocks), "params", "flops", "latency".
    ``protect``: FQNs of modules or parameters whose blocks stay. At most ``max_samples`` (128) samples are read. The
    record of ``run`` is a ``Removed``. Raises ArgumentError, DataError, PassError where there is no block,
    VerificationError.

    Example: ``vfx.RemoveBlocks(0.25, loader)(vfx.trace(model, example_inputs))``.
    """

    weight_sets = "one"
    needs = (symmetry,)

    @checked
    def __init__(
        self,
        sparsity: float,
        data: Any,
        *,
        budget: str = "channels",
        protect: Collection[str] = (),
        max_samples: int | None = None,
        device: Any = None,
        verify: bool = True,
        seed: int = 0,
    ):
        if not 0 <= sparsity < 1:
            raise ArgumentError(f"sparsity must lie in [0, 1), got {sparsity}")
        if budget not in BUDGETS:
            raise ArgumentError(f"budget={budget!r}: choose one of {', '.join(BUDGETS)}")
        self.sparsity, self.data, self.budget, self.protect = sparsity, data, budget, tuple(protect)
        self.samples, self.device, self.verify, self.seed = min(max_samples or SAMPLES, SAMPLES), device, verify, seed

    def apply(self, program: Program) -> PassResult[Removed]:
        blocks = self._blocks(program)
        batches = Batches(program, self.data, self.samples, self.device)
        enough = until(program, len(blocks), self.sparsity, self.budget)
        gone, rows = chosen_blocks(program, blocks, OutputErrors(program, list(batches)), enough)
        small = without(program, gone)
        error = self._prove(program, small, gone) if self.verify else None
        notes = () if enough(len(gone), small) else (_missed(len(gone), len(blocks), self.sparsity, self.budget),)
        facts = symmetry(program)
        sizes = _sizes(facts, small)
        kept = {group: np.arange(size) for group, size in sizes.items()}
        return PassResult(small.with_notes(notes), Removed(sizes, kept, unchanged, error, blocks=tuple(rows)))

    def _blocks(self, program: Program) -> list[ResidualBlock]:
        """Those that may go."""
        check_protected(self.protect, program.names())
        blocks = [block for block in residual_blocks(program) if not is_protected(block.tensors, self.protect)]
        if not blocks:
            raise PassError(
                "this network has no residual block that may go (a sum of a value and of what layers of its own "
                "compute from it, of one shape); remove channels instead, or protect less"
            )
        return blocks

    def _prove(self, program: Program, small: Program, gone: Sequence[ResidualBlock]) -> float:
        """The relative error against the network with silent branches. Raises VerificationError."""
        exact = in_double(small)
        error = function_error(silenced(program, gone), lambda inputs: exact(*inputs), self.seed)
        if not error <= PRESERVED:
            raise VerificationError(
                f"the network without {', '.join(block.name for block in gone)} differs from the one with silent "
                f"branches by {error:.1e} (relative, float64): something else reads what these branches write; name "
                "them in protect="
            )
        return error


def _sizes(facts: Symmetry, small: Program) -> dict[int, int]:
    """The channels of each group; none where all its tensors went."""
    names = set(small.names())
    return {g.index: g.size if any(m.fqn in names for m in g.members) else 0 for g in facts.groups}


def _missed(gone: int, count: int, share: float, budget: str) -> str:
    wanted = f"{share:.0%} of the blocks" if budget == "channels" else f"{share:.0%} of the {budget}"
    return f"{gone} of {count} residual blocks went, which is not {wanted}; one block at least stays"
