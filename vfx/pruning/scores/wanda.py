"""Wanda: |w_ij| · ‖X_j‖₂, compared within each output row (Sun et al. 2024).

X_j is all that input j of a layer sees in the data. A convolution is its im2col form: input j is a channel at one tap
of the kernel, and ‖X_j‖² sums the squares of the positions that this tap ever reads. These are, along each spatial
axis, the inputs i = stride · o + dilation · k − padding for outputs o (for a transposed convolution the inputs whose
output falls inside), so one 0/1 matrix a spatial axis gives all norms from the squares summed over the samples.

With ``propagation="dense"`` the norms are those of the unpruned network, in one pass over the data. With "pruned"
layers are pruned one after another, each on what the layers pruned before it give it: one pass too, all batches
together, but only where a layer can be pruned alone (not in the global scope).
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from vfx.arguments import checked
from vfx.errors import ArgumentError
from vfx.on_read import OnRead
from vfx.operators import arguments, is_transposed, operator_of
from vfx.progress import track
from vfx.pruning.scores.score import Pruned, Score, Select, Subject, Values
from vfx.pruning.scores.sequential import one_by_one, read_input
from vfx.pruning.selection import Selection
from vfx.pruning.targets import Target, groups_of
from vfx.statistics.frontier import ValueReader, advance_together

Propagation = Literal["dense", "pruned"]


class Wanda(Score):
    """The absolute weight times the norm of its input over the data."""

    name: ClassVar[str] = "wanda"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[str] = "row"
    protect: ClassVar[tuple[str, ...]] = ("head",)

    @checked
    def __init__(self, propagation: Propagation = "dense"):
        if propagation not in ("dense", "pruned"):
            raise ArgumentError(f"propagation={propagation!r} is unknown; choose 'dense' or 'pruned'")
        self.propagation = propagation
        self.layer_by_layer = propagation == "pruned"

    def check(self, selection: Selection) -> None:
        if self.layer_by_layer and selection.scope == "global":
            raise ArgumentError(
                "propagation='pruned' prunes layer by layer, and scope='global' compares all layers at once; choose "
                "scope 'row', 'layer' or a pattern such as 2:4, or propagation='dense'"
            )

    def scores(self, subject: Subject) -> Values:
        """Scores on the network as it stands, whatever the propagation; each is made when it is read."""
        squares: dict[str, Tensor] = {}
        readers: dict[fx.Node, ValueReader] = {}
        for target in subject.targets:
            for node in target.nodes:
                read_input(subject, readers, node, partial(_add, squares, target, node))
        batches = subject.batches()
        weights = dict(subject.program.weights[0])
        for batch in track(batches, "activations", len(batches), subject.progress):
            advance_together(subject.program, weights, [batch], readers, progress=False)
        targets = {target.name: target for target in subject.targets}
        dense = {name: subject.weight(target) for name, target in targets.items()}
        return OnRead(dense, lambda name, weight: score(targets[name], weight, squares[name]))

    def prune(self, subject: Subject, select: Select) -> Pruned:
        if not self.layer_by_layer:
            return super().prune(subject, select)

        def prune_one(target: Target, weight: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
            squares: dict[str, Tensor] = {}
            _add(squares, target, target.nodes[0], values)
            mask = select({target.name: score(target, weight, squares[target.name])})[target.name]
            return mask, weight.masked_fill(~mask, 0)

        return one_by_one(subject, prune_one, resumes=True)


def score(target: Target, weight: Tensor, squares: Tensor) -> Tensor:
    """|w| ‖x‖ of the weight's shape; ``squares`` (outputs or 1, inputs, taps) are ‖x‖²."""
    return target.restored(target.matrix(weight).abs().double() * squares.sqrt())


def _add(squares: dict[str, Tensor], target: Target, node: fx.Node, values: list[Tensor]) -> None:
    total = sum((input_squares(target, node, x) for x in values[1:]), input_squares(target, node, values[0]))
    squares[target.name] = squares[target.name] + total if target.name in squares else total


def input_squares(target: Target, node: fx.Node, x: Tensor) -> Tensor:
    """‖X_j‖² of one batch for each entry of a layer's matrix (outputs or 1, inputs, taps), in float64."""
    if not operator_of(node).is_convolving:
        return x.double().square().reshape(-1, x.shape[-1]).sum(0).reshape(1, -1, 1)
    axes = _axes(node, target.shape[2:])
    batched = x if x.ndim == len(axes) + 2 else x[None]
    summed = batched.double().square().sum(0)
    reads = [axis.taps(size).to(summed) for axis, size in zip(axes, summed.shape[1:])]
    groups = groups_of(node)
    sums = _einsum(summed, reads).reshape(groups, summed.shape[0] // groups, -1)
    outputs = target.shape[1] * groups if is_transposed(node) else target.shape[0]
    return sums if groups == 1 else sums.repeat_interleave(outputs // groups, 0)


@dataclass(frozen=True)
class _Axis:
    """How a kernel moves along one spatial axis; ``padding`` before and behind."""

    kernel: int
    stride: int
    dilation: int
    padding: tuple[int, int]
    output_padding: int | None  # None: not transposed

    def taps(self, size: int) -> Tensor:
        """Whether tap k reads position i: (kernel, size) of 0 and 1."""
        k, i = torch.arange(self.kernel)[:, None], torch.arange(size)[None]
        reach, margin = self.dilation * (self.kernel - 1), sum(self.padding)
        if self.output_padding is not None:
            outputs = (size - 1) * self.stride - margin + reach + self.output_padding + 1
            landing = i * self.stride - self.padding[0] + k * self.dilation
            return (landing >= 0) & (landing < outputs)
        outputs = (size + margin - reach - 1) // self.stride + 1
        place = i + self.padding[0] - k * self.dilation
        return (place >= 0) & (place % self.stride == 0) & (place < outputs * self.stride)


def _axes(node: fx.Node, kernel: tuple[int, ...]) -> list[_Axis]:
    a, count = arguments(node), len(kernel)
    strides, dilations = _each(a["stride"], count), _each(a["dilation"], count)
    if a["padding"] in ("same", "valid"):
        margins = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilations, kernel)]
        paddings = [(margin // 2, margin - margin // 2) for margin in margins]
    else:
        paddings = [(p, p) for p in _each(a["padding"], count)]
    extra = _each(a["output_padding"], count) if is_transposed(node) else [None] * count
    return [_Axis(*axis) for axis in zip(kernel, strides, dilations, paddings, extra)]


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


def _einsum(summed: Tensor, reads: list[Tensor]) -> Tensor:
    """Σ over the positions that each combination of taps reads: (C, *size), (kernel, size) an axis → (C, *kernel)."""
    sizes, taps = string.ascii_lowercase[: len(reads)], string.ascii_uppercase[: len(reads)]
    matrices = ",".join(f"{tap}{size}" for tap, size in zip(taps, sizes))
    return torch.einsum(f"z{sizes},{matrices}->z{taps}", summed, *reads)
