"""What is solved at once: the parameters of a layer, with the BatchNorm that stands right behind it, or of a norm.

=================  ==========================================  =======================================================
unit               calls                                       what is fitted
=================  ==========================================  =======================================================
``MatrixUnit``     every ``Form``; a weight that several       y = rows(x) W + b; with a BatchNorm in evaluation behind
                   calls read is one unit                      it W and b are those of both, and go back into both
``DiagonalUnit``   norms' gains and shifts, layer scales,      y = f(0) + g · (f(1) − f(0)) + b, entry by entry
                   position embeddings, PReLU
=================  ==========================================  =======================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vfx.analyse.layer_view import BatchNorm
from vfx.program import Weights
from vfx.reconstruct.collect import Collected
from vfx.reconstruct.forms import Form
from vfx.reconstruct.solve import RidgeProblem
from vfx.reconstruct.sums import Sums

Evaluate = Any  # fx.Node -> Tensor: the student's values
NEGLIGIBLE = 1e-6  # share of the largest scale of a BatchNorm below which a channel's scale is made anew


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a unit: ``node`` reads the parameters, ``goal`` is the node whose value the references give.

    Where the goal is that of an add, ``other`` is its other operand, which the student knows already.
    """

    node: fx.Node
    goal: fx.Node
    other: fx.Node | None = None


class Unit(ABC):
    """Parameters that are solved together, from all of their uses."""

    uses: tuple[Use, ...]

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """FQNs of what a solution changes."""

    @abstractmethod
    def collect(self, collected: Collected, use: int, value: Evaluate, goal: Tensor, max_rows: int | None) -> None:
        """Add one batch at one use."""

    @abstractmethod
    def read(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """The matrix (G, K, O) and bias (G, O) that a weight set holds, float64."""

    @abstractmethod
    def write(self, weights: Weights, matrix: Tensor, bias: Tensor | None, sums: Sums) -> dict[str, Tensor]:
        """The tensors of a weight set that hold a solution."""

    def support(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """The entries of the matrix that may differ from zero; None for all."""
        return None

    def problem(self, centre: tuple[Tensor, Tensor | None], masks: Mapping[str, Tensor]) -> RidgeProblem:
        return RidgeProblem(*centre, self.support(masks))


class MatrixUnit(Unit):
    """A weight and the bias behind it, through the calls that read them (each with its own ``forms`` and ``sources``).

    ``norm`` is the BatchNorm that alone reads the output.
    """

    def __init__(
        self, uses: Sequence[Use], forms: Sequence[Form], sources: Sequence[fx.Node], weight: str, bias: str | None,
        norm: BatchNorm | None = None,
    ):  # fmt: skip
        self.uses, self.forms, self.sources = tuple(uses), tuple(forms), tuple(sources)
        self.weight, self.bias, self.norm = weight, bias, norm

    @property
    def parameters(self) -> tuple[str, ...]:
        names = (self.weight, *([self.bias] if self.bias else []))
        return names if self.norm is None else (*names, *self.norm.names.values())

    def collect(self, collected: Collected, use: int, value: Evaluate, goal: Tensor, max_rows: int | None) -> None:
        x, form = value(self.sources[use]), self.forms[use]
        if max_rows is None:
            collected.wait(form, x, goal)
        else:
            collected.add(form.thinned(x, goal, max_rows, use))

    def read(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        matrix = self.forms[0].matrix(weights[self.weight].double())
        shape = (matrix.shape[0], matrix.shape[2])
        bias = None if self.bias is None else weights[self.bias].double().reshape(shape)
        if self.norm is None:
            return matrix, bias
        scale, shift = (x.reshape(shape) for x in self.norm.affine(weights))
        return matrix * scale[:, None], shift + scale * (0 if bias is None else bias)

    def write(self, weights: Weights, matrix: Tensor, bias: Tensor | None, sums: Sums) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        old = weights[self.weight]
        if self.norm is not None:
            assert bias is not None
            kept = torch.zeros_like(bias) if self.bias is None else weights[self.bias].double().reshape(bias.shape)
            mean, variance = sums.moments(matrix, bias)
            scale, result = _split(self.norm, weights, bias, kept, mean, variance)
            matrix = matrix / scale[:, None]
        elif self.bias is not None:
            assert bias is not None
            result[self.bias] = bias.reshape(weights[self.bias].shape).to(weights[self.bias])
        return result | {self.weight: self.forms[0].weight(matrix).to(old).contiguous()}

    def support(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        mask = masks.get(self.weight)
        return None if mask is None else self.forms[0].matrix(mask.double()) > 0


def _split(
    norm: BatchNorm, weights: Weights, bias: Tensor, kept: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scale that the layer's matrix leaves to the norm, and the norm's tensors.

    ``mean`` and ``variance`` are those of y = s (u − m) + β; the running statistics become those of u, the layer's
    output with the bias ``kept``, so that the network goes on alike in training. A norm without gain or shift keeps
    its variance, or takes the bias into its mean.
    """
    old = norm.affine(weights)[0].reshape(bias.shape)
    scale = torch.where(old.abs() > NEGLIGIBLE * old.abs().max(), old, 1.0)
    split: dict[str, Tensor] = {}
    running = weights[norm.names["running_var"]].double().reshape(bias.shape)
    if "weight" in norm.names:
        running = variance / scale.square()
        split["weight"] = scale * (running + norm.eps).sqrt()
    else:
        scale = (running + norm.eps).rsqrt()
    if "bias" in norm.names:
        split["running_mean"], split["bias"] = (mean - bias) / scale + kept, mean
    else:
        split["running_mean"] = kept - bias / scale
    split["running_var"] = running
    flat = {norm.names[role]: tensor.reshape(-1) for role, tensor in split.items()}
    return scale, {name: tensor.to(weights[name]) for name, tensor in flat.items()}


class DiagonalUnit(Unit):
    """A gain and a shift that act entry by entry: y = f(0, 0) + g · (f(1, 0) − f(0, 0)) + b.

    ``axis`` is where a parameter of one axis stands in the value; None where it broadcasts from the last axis on.
    """

    def __init__(self, use: Use, gain: fx.Node | None, shift: fx.Node | None, axis: int | None):
        self.uses, self.gain, self.shift, self.axis = (use,), gain, shift, axis

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(str(node.target) for node in (self.gain, self.shift) if node is not None)

    def collect(self, collected: Collected, use: int, value: Evaluate, goal: Tensor, max_rows: int | None) -> None:
        collected.add(self._sums(value, goal))

    def _sums(self, value: Evaluate, goal: Tensor) -> Sums:
        base = self._run(value, 0.0)
        slope = None if self.gain is None else self._run(value, 1.0) - base
        wanted = (goal - base).double()
        squares, goals = self._reduced(wanted.square()), self._reduced(wanted)
        count = wanted.numel() // max(goals.numel(), 1)
        if slope is None:
            empty = wanted.new_zeros(len(goals), 0, 1)
            return Sums(
                empty.mT[:, :0] @ empty.mT[:, :0].mT, empty, empty[..., 0], goals[:, None], squares[:, None], count
            )
        slope = slope.double()
        gram, cross, inputs = (self._reduced(x) for x in (slope.square(), slope * wanted, slope))
        return Sums(gram[:, None, None], cross[:, None, None], inputs[:, None], goals[:, None], squares[:, None], count)

    def read(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        bias = None if self.shift is None else weights[str(self.shift.target)].double().reshape(-1, 1)
        if self.gain is not None:
            return weights[str(self.gain.target)].double().reshape(-1, 1, 1), bias
        assert bias is not None
        return bias.new_zeros(len(bias), 0, 1), bias

    def write(self, weights: Weights, matrix: Tensor, bias: Tensor | None, sums: Sums) -> dict[str, Tensor]:
        result = {}
        for node, solved in ((self.gain, matrix), (self.shift, bias)):
            if node is not None and solved is not None:
                old = weights[str(node.target)]
                result[str(node.target)] = solved.reshape(old.shape).to(old)
        return result

    def _run(self, value: Evaluate, gain: float) -> Tensor:
        """The call with one value for all entries of its gain, and no shift."""
        node = self.uses[0].node

        def argument(a: fx.Node) -> Any:
            if a is self.gain:
                return torch.full_like(value(a), gain)
            return torch.zeros_like(value(a)) if a is self.shift else value(a)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
        return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]

    def _reduced(self, x: Tensor) -> Tensor:
        """Sums over all positions that share an entry, in the parameter's order."""
        node = self.gain if self.gain is not None else self.shift
        assert node is not None
        shape = list(node.meta["val"].shape)
        if self.axis is not None:
            shape = [shape[0] if dim == self.axis else 1 for dim in range(x.ndim)]
        shape = [1] * (x.ndim - len(shape)) + shape
        over = [dim for dim, size in enumerate(shape) if size == 1 and x.shape[dim] != 1]
        return (x.sum(over) if over else x).reshape(-1)
