"""What a pass is: a Program in, a new Program out, with a contract checked on both sides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

import torch

from vfx.analyse.verify import relative_error, trial
from vfx.errors import PassError, VerificationError
from vfx.outputs import named_tensors
from vfx.program import Program, in_precision

STALE = "the statistics known of the layers are those of before; run Align with data behind it to normalize"
PRESERVED = 1e-9  # relative output error in float64 up to which two networks count as the same function
ROUNDED = 1e-2  # relative difference between a tensor in the network's own precision (bfloat16 at least) and in float64


class Pass(ABC):
    """One rewrite: what is declared here is checked on the input and promised of the result; neither Program changes.

    ``weight_sets``: how many it acts on, "one" (a merged network), "several" (its edges) or "any". ``changes_values``:
    the function stays and values between layers do not, so statistics that were known of them no longer hold.
    ``carries_maps``: it may run while linear maps wait for ``Transform``.
    """

    weight_sets: Literal["one", "several", "any"] = "any"
    preserves_function: bool = False
    changes_values: bool = False
    carries_maps: bool = False
    verify: bool = True

    def __call__(self, program: Program) -> Program:
        self._check(program)
        self.requires(program)
        result = self.apply(program)
        if self.changes_values and result.goals:
            result = replace(result, goals={}, notes=(*result.notes, f"{self.name}: {STALE}"))
        self.ensures(program, result)
        return result

    def _check(self, program: Program) -> None:
        """Raise PassError unless the Program is one that the declarations of this pass admit."""
        edges = program.edges
        if not edges:
            raise PassError(f"{self.name} needs a Program that holds weights")
        if self.weight_sets == "one" and edges != 1:
            raise PassError(f"{self.name} acts on a merged network, this Program holds {edges}; run Interpolate first")
        if self.weight_sets == "several" and edges < 2:
            raise PassError(
                f"{self.name} acts on two or more weight sets, this Program holds one; run it before Interpolate"
            )
        if program.transport is not None and not self.carries_maps:
            raise PassError(f"the matching found linear maps; run Transform before {self.name}")
        if self.changes_values and program.goals and edges > 1:
            raise PassError(f"{self.name} changes values that statistics are known of; run it before Align")

    def requires(self, program: Program) -> None:
        """Raise PassError if the pass cannot run here for a reason beyond its declarations."""
        return

    @abstractmethod
    def apply(self, program: Program) -> Program:
        """The rewrite itself."""

    def ensures(self, program: Program, result: Program) -> None:
        """Raise if the pass breaks what it promises; by default, that it preserves the function.

        The algebra is checked, not the rounding: the pass runs once more on float64 weights, and the result must be
        what that run gives, rounded.
        """
        if not (self.preserves_function and self.verify):
            return
        exact = program.to("cpu", torch.float64)
        rewritten = self.apply(exact)
        for edge in range(program.edges):
            error = same_function(exact.select(edge), rewritten.select(edge))
            if not error <= PRESERVED:
                raise VerificationError(f"{self.name} changed the function of edge {edge}: relative error {error:.1e}")
        different = _first_difference(result, rewritten)
        if different:
            raise VerificationError(
                f"{self.name} changed the function: its result differs in {different} when run again"
            )

    @property
    def name(self) -> str:
        return type(self).__name__


@torch.no_grad()
def same_function(before: Program, after: Program, seed: int = 0) -> float:
    """Relative output error in float64 between two single-edge Programs on random inputs."""
    first, second = (p.to("cpu", torch.float64) for p in (before, after))
    inputs, wanted = trial(first, seed)
    return outputs_error(wanted, second(*inputs))


def outputs_error(x: object, y: object) -> float:
    """Largest relative error over all outputs, compared by key; infinite where their names or a shape differ."""
    first, second = named_tensors(x), named_tensors(y)
    if first.keys() != second.keys():
        return float("inf")
    return max((relative_error(tensor, second[name]) for name, tensor in first.items()), default=0.0)


def _first_difference(result: Program, exact: Program) -> str:
    """The graph or the first tensor in which a result is not the rounded form of ``exact``, or nothing."""
    if str(in_precision(result.graph, torch.float64)) != str(in_precision(exact.graph, torch.float64)):
        return "the graph"
    for ours, theirs in zip(result.weights, exact.weights):
        for name, tensor in theirs.items():
            if not tensor.numel():
                continue
            if not (tensor.is_floating_point() or tensor.is_complex()):
                if not torch.equal(ours[name].cpu(), tensor):
                    return name
                continue
            same, finite = ours[name].cpu().to(tensor), tensor.isfinite()  # masks may hold infinities
            if not torch.equal(same[~finite], tensor[~finite]):
                return name
            largest = torch.where(finite, tensor, 0).abs().max()
            if not torch.where(finite, same - tensor, 0).abs().max() <= ROUNDED * largest:
                return name
    return ""
