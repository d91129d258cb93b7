"""What a pass is: a Program in, a new Program out, with a contract checked on both sides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar, final

import torch

from vfx.errors import PassError, VerificationError
from vfx.program import Facts, Program, in_precision
from vfx.proof import PRESERVED, in_double, same_function

STALE = "the statistics known of the layers are those of before; run Align with data behind it to normalize"
ROUNDED = 1e-2  # relative difference between a tensor in the network's own precision (bfloat16 at least) and in float64


R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, eq=False)
class PassResult(Generic[R_co]):
    """What a pass gives back: the rewritten ``program``, and a ``record`` where there is more to say of it."""

    program: Program
    record: R_co = None  # type: ignore[assignment]


class Pass(ABC, Generic[R_co]):
    """One rewrite: what is declared here is checked on the input and promised of the result; neither Program changes.

    ``weight_sets``: how many it acts on, "one" (a merged network), "several" (its edges) or "any". ``changes_values``:
    the function stays and values between layers do not, so statistics that were known of them no longer hold.
    ``carries_maps``: it may run while linear maps wait for ``Transform``. ``needs``: the analyses of its input that it
    reads; they run first, and once for all Programs of a graph (``vfx.program.Facts``).

    A pass is the same after it ran: what it found stands in the result of ``run``. Calling it gives the Program alone,
    so that passes compose:

    >>> merged = Interpolate(0.5)(Align("weight")(edges))
    >>> Align("weight").run(edges).record.error < 1e-9
    True
    """

    weight_sets: Literal["one", "several", "any"] = "any"
    preserves_function: bool = False
    changes_values: bool = False
    carries_maps: bool = False
    needs: ClassVar[tuple[Callable[[Program], Any], ...]] = ()
    verify: bool = True

    @final
    def __call__(self, program: Program) -> Program:
        """The rewritten Program; see ``run``."""
        return self.run(program).program

    @final
    def run(self, program: Program) -> PassResult[R_co]:
        """Rewrite, with the declarations checked on the input and the promises on the result.

        Raises PassError, VerificationError.
        """
        self._check(program)
        self.requires(program)
        for analysis in self.needs:
            analysis(program)
        result = self.apply(program)
        if self.changes_values and result.program.goals:
            notes = (*result.program.notes, f"{self.name}: {STALE}")
            result = replace(result, program=replace(result.program, goals={}, notes=notes))
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
    def apply(self, program: Program) -> PassResult[R_co]:
        """The rewrite itself."""

    def ensures(self, program: Program, result: PassResult[Any]) -> None:
        """Raise if the pass breaks what it promises; by default, that it preserves the function.

        The algebra is checked, not the rounding: the pass runs once more on float64 weights, and the result must be
        what that run gives, rounded.
        """
        if not (self.preserves_function and self.verify):
            return
        exact = in_double(program)
        exact = replace(exact, facts=Facts(exact.graph))  # the second run takes nothing over from the first
        rewritten = self.apply(exact).program
        for edge in range(program.edges):
            error = same_function(exact.select(edge), rewritten.select(edge))
            if not error <= PRESERVED:
                raise VerificationError(f"{self.name} changed the function of edge {edge}: relative error {error:.1e}")
        different = _first_difference(result.program, rewritten)
        if different:
            raise VerificationError(
                f"{self.name} changed the function: its result differs in {different} when run again"
            )

    @property
    def name(self) -> str:
        return type(self).__name__


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
