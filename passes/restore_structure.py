"""RestoreStructure: back to the network that was captured, and so to the user's own class.

What ``FoldGain`` and ``CenterStream`` take out of a graph has neutral values: gains of one, shifts of zero, and
LayerNorm on a centred stream is RMSNorm. So the weights of the rewritten network, merged or not, go back into the
graph that it was captured with; that the function is the same is checked. It is not where a matching moved a centred
stream by maps that do not fix the ones, or where a layer was given a bias or a weight of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vfx.analyse.gains import gains
from vfx.arguments import checked
from vfx.errors import PassError, VerificationError
from vfx.program import Program, Weights
from vfx.proof import PRESERVED, same_function
from vfx.rewrite import Pass, PassResult

ROUNDINGS = 100  # of one weight, to which those of a whole network may add up


class RestoreStructure(Pass[None]):
    """Put the weights of a rewritten Program into the structure of ``like``, the Program it was made from."""

    preserves_function = True

    @checked
    def __init__(self, like: Program, verify: bool = True):
        self.like, self.verify = like, verify

    def requires(self, program: Program) -> None:
        names = set(self.like.names())
        extra = [name for name in program.names() if name not in names]
        if extra:
            raise PassError(
                f"the network of before has no {', '.join(extra[:3])}: keep its structure, FoldGain(biases=False) "
                "adds no biases and without UntieWeights tied tensors stay one"
            )
        absent = names - set(program.weights[0]) - set(_neutral(self.like))
        if absent:
            raise PassError(f"{sorted(absent)[0]} was taken out of the network and is no gain or shift of a norm")

    def ensures(self, program: Program, result: PassResult[None]) -> None:
        """Rounded weights are centred up to rounding, so the limit is that of their precision."""
        for edge in range(program.edges) if self.verify else ():
            error = same_function(program.select(edge), result.program.select(edge))
            if not error <= _limit(program):
                raise VerificationError(
                    f"the network of before computes something else with these weights (relative error {error:.1e}): "
                    "a centred stream was moved by maps that do not keep it centred"
                )

    def apply(self, program: Program) -> PassResult[None]:
        neutral = _neutral(self.like)
        reference = self.like.weights[0]
        sets: list[dict[str, Tensor]] = []
        for weights in program.weights:
            added = {
                name: torch.full_like(reference[name], value, dtype=_dtype(weights, reference[name]))
                for name, value in neutral.items()
                if name not in weights
            }
            sets.append({name: (dict(weights) | added)[name] for name in reference if name in {**weights, **added}})
        result = program.with_graph(self.like.graph, sets, "RestoreStructure", origin=self.like.origin)
        return PassResult(replace(result, module=self.like.module, aliases=self.like.aliases))


def _neutral(program: Program) -> dict[str, float]:
    """The value of each gain and shift under which a norm is without them."""
    neutral: dict[str, float] = {}
    for gain in gains(program):
        neutral |= {gain.weight: 1.0 - gain.offset} if gain.weight else {}
        neutral |= {gain.bias: 0.0} if gain.bias else {}
    return neutral


def _limit(program: Program) -> float:
    """Relative error up to which two networks in a Program's precision count as the same function."""
    floating = [t.dtype for t in program.weights[0].values() if t.is_floating_point()]
    return max([PRESERVED, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in floating if dtype != torch.float64)])


def _dtype(weights: Weights, like: Tensor) -> torch.dtype:
    """The precision that a weight set is in."""
    return next((t.dtype for t in weights.values() if t.is_floating_point()), like.dtype)
