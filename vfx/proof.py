"""Whether two networks are the same function: one measure, one set of inputs, one threshold.

The error is relative to how much an output varies over the inputs, so a large bias cannot hide it. Where it hardly
varies, rounding is larger than that: no output is resolved better than ``SHARE`` of its size, nor better than some
units in the last place of the weights and inputs change it. Every value of every output is compared: another name,
shape or type, and what is no number, prove nothing (infinite).

Inputs are normal ones, and once more ten times as large, so that saturations (the upper bound of relu6) are reached.
Ids are drawn from all that their embedding knows, as equal tokens would hide how they attend to each other, and
booleans from both; other integers are the example's (what they count or point to is not known).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from vfx.capture.outputs import named_tensors
from vfx.on_read import OnRead
from vfx.operators import arguments, operator_of
from vfx.program import Program, Weights, moved, run

PRESERVED = 1e-9  # the largest relative error in float64 of a function that is kept
SINGLE = 1e-4  # the same where networks run in float32
SHARE = 2e-4  # of an output's size that its spread counts as at least: 1e-9 of it is a thousand roundings of float64
LARGE = 10.0  # deviation of the inputs where saturations are looked for
_ROUNDINGS = 100  # times the change by one rounding of each weight, which is no more than rounding
_RESOLVED = 1e-4  # of the spread: rounding that goes beyond shows that nothing is proved

Compute = Callable[[Weights, list[Any]], Any]  # a network's outputs for its weights and one tensor an input


@dataclass(frozen=True)
class Trial:
    """Inputs to prove on: ``network`` gives ``expected`` for them, in float64, and so should others.

    A ``large`` one only proves what shows beside rounding: with large inputs many networks are chaotic.
    """

    network: Compute
    weights: Weights
    inputs: list[Any]
    large: bool = False

    @cached_property
    def expected(self) -> Any:
        return self.network(self.weights, self.inputs)

    def error(self, given: Any) -> float:
        """The largest relative error of outputs that should be those expected; 0 where a large trial shows nothing."""
        if self.large and not all(bool(x.isfinite().all()) for x in named_tensors(self.expected).values()):
            return 0.0
        error = outputs_error(self.expected, given)
        if not PRESERVED < error < float("inf"):
            return error
        first, second, off = (named_tensors(value) for value in (self.expected, given, self._rounded))
        changes = {name: _change(x, off[name]) for name, x in first.items()}
        if self.large and not all(_resolves(x, changes[name]) for name, x in first.items()):
            return 0.0
        return max(relative_error(x, second[name], _floor(x, changes[name])) for name, x in first.items())

    @cached_property
    def _rounded(self) -> Any:
        """The outputs when every weight and input is off by about a unit in its last place."""
        seeds = {name: seed for seed, name in enumerate(self.weights, start=1)}
        off = OnRead(self.weights, lambda name, tensor: _nudged(tensor, torch.Generator().manual_seed(seeds[name])))
        generator = torch.Generator().manual_seed(0)
        return self.network(off, [_nudged(x, generator) for x in self.inputs])


@torch.no_grad()
def same_function(before: Program, after: Program) -> float:
    """Relative output error in float64 between two networks, the first edges of two Programs, at several scales."""
    rewritten = in_double(after, on_read=True)
    return function_error(before, lambda inputs: rewritten(*inputs))


@torch.no_grad()
def function_error(
    program: Program, other: Callable[[list[Any]], Any], seed: int = 0, network: Compute | None = None
) -> float:
    """Relative output error in float64 of ``other`` against a Program's first edge (``network`` runs it) at all scales.

    >>> function_error(program, lambda inputs: run(rewritten, weights, inputs)) <= PRESERVED
    """
    return max(trial.error(other(trial.inputs)) for trial in trials(program, seed, network))


def trials(program: Program, seed: int = 0, network: Compute | None = None) -> list[Trial]:
    """Normal inputs and large ones for a Program's first edge in float64.

    Where drawn ids and booleans lead nowhere, those of the example stay; where normal ones lead to NaN (the root of a
    negative number), all inputs are the example's.
    """
    program = in_double(program, on_read=True)
    weights, network = program.weights[0], network or partial(run, program.graph)
    for drawn in (True, False):
        generator = torch.Generator().manual_seed(seed)
        first = Trial(network, weights, random_inputs(program, generator, drawn=drawn))
        try:
            if not is_defined(first.expected):
                continue
        except (RuntimeError, IndexError):
            if not drawn:
                raise
            continue
        if not any(map(_is_inexact, program.example_inputs)):
            return [first]
        large = [x * LARGE if _is_inexact(x) else x for x in first.inputs]
        return [first, Trial(network, weights, large, large=True)]
    return [Trial(network, weights, list(program.example_inputs))]


def in_double(program: Program, on_read: bool = False) -> Program:
    """The network in float64 on the CPU, casts and tensors that it makes on the way included.

    ``on_read``: its weights are cast when they are read, one at a time, and held in their own precision.
    """
    if not on_read:
        return program.to("cpu", torch.float64)
    exact = lambda name, tensor: moved(tensor, "cpu", torch.float64)  # noqa: E731
    weights = [OnRead(tensors, exact) for tensors in program.weights]
    return replace(program, weights=()).to("cpu", torch.float64).with_weights(weights)


# inputs ---------------------------------------------------------------------------------------------------------------


def random_inputs(program: Program, generator: torch.Generator, drawn: bool = True) -> list[Any]:
    """Normal inputs in the shapes and types of the example's; ids and booleans are drawn too, or stay as they are."""
    pairs = zip(program.placeholders, program.example_inputs, strict=True)
    return [_random(x, generator, _choices(node) if drawn else 0) for node, x in pairs]


def samples(inputs: Sequence[Any], axes: Sequence[int | None], count: int, generator: torch.Generator) -> list[Any]:
    """Inputs of ``count`` samples along their ``axes``: normal ones, or rows of the given integers."""

    def sample(x: Any, axis: int | None) -> Any:
        if not isinstance(x, Tensor) or axis is None:
            return _random(x, generator) if isinstance(x, Tensor) else x
        rows = x.index_select(axis, torch.randint(x.shape[axis], (count,), generator=generator).to(x.device))
        return _random(rows, generator)

    return [sample(x, axis) for x, axis in zip(inputs, axes, strict=True)]


def _random(x: Any, generator: torch.Generator, choices: int = 0) -> Any:
    """A tensor of one's shape and type: normal, one of some choices, or the same where there are none."""
    if _is_inexact(x):
        dtype = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, generator=generator, dtype=dtype).to(x)
    if not choices or not isinstance(x, Tensor):
        return x
    return torch.randint(choices, x.shape, generator=generator).to(x)


def _choices(node: fx.Node) -> int:
    """How many values an input may have, from 0 on: those that its embeddings know, or two; 0 where nobody says."""
    if node.meta["val"].dtype == torch.bool:
        return 2
    reads = [arguments(user) for user in node.users if operator_of(user).ties == "embedding"]
    return min((a["weight"].meta["val"].shape[0] for a in reads if a["indices"] is node), default=0)


def _is_inexact(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


# the measure ----------------------------------------------------------------------------------------------------------


def outputs_error(x: object, y: object) -> float:
    """Largest relative error over all outputs, compared by key; infinite where there are none, or others."""
    first, second = named_tensors(x), named_tensors(y)
    if first.keys() != second.keys():
        return float("inf")
    return max((relative_error(tensor, second[name]) for name, tensor in first.items()), default=float("inf"))


def relative_error(x: Tensor, y: Tensor, rounding: float = 0.0) -> float:
    """max |x − y| over the spread of x along its first axis, but at least ``SHARE`` of the size of x.

    ``rounding`` is an absolute error that counts as none. For integers 1 where any differs.
    """
    error, finite = _largest_difference(x, y), x.isfinite()
    if error in (0, float("inf")) or not _is_inexact(x):
        return error
    scale = max(_scale(x if finite.all() else x[finite]), rounding / PRESERVED)
    return error / scale if scale > 0 else error


def error_to_size(x: Tensor, y: Tensor, least: float = 0.0) -> float:
    """max |x − y| over the largest |x|, or over ``least`` where that is larger: what files are compared by."""
    error = _largest_difference(x, y)
    if error in (0, float("inf")) or not _is_inexact(x):
        return error
    return error / max(least, float(x[x.isfinite()].abs().max()), torch.finfo(torch.float32).tiny)


def _largest_difference(x: Tensor, y: Tensor) -> float:
    """max |x − y|, in float64, or 1 where values that are no floating ones differ; 0 of empty tensors.

    Infinities must be the same ones; NaN, another shape or type, or no finite value at all prove nothing (infinite).
    """
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    if not _is_inexact(x):
        return float((x != y).any())
    if not x.numel() or (torch.equal(x, y) and not x.is_complex() and all(map(torch.isfinite, x.aminmax()))):
        return 0.0
    x, y = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (x, y))
    finite = x.isfinite()
    if not finite.any() or not torch.equal(x[~finite], y[~finite]) or not y[finite].isfinite().all():
        return float("inf")
    return float((x - y)[finite].abs().max())


def is_defined(value: Any) -> bool:
    """Whether no tensor in a nested output holds NaN."""
    return not any(bool(tensor.isnan().any()) for tensor in named_tensors(value).values())


def _scale(x: Tensor) -> float:
    """The spread of finite values along their first axis, or what counts as it where they hardly vary."""
    size = float(x.abs().max())
    spread = float((x - x.mean(0, keepdim=True)).abs().max()) if x.ndim else 0.0
    return max(spread, SHARE * size) if spread > 0 else size


# rounding -------------------------------------------------------------------------------------------------------------


def _nudged(value: Any, generator: torch.Generator) -> Any:
    if not _is_inexact(value):
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return value * (1 + torch.finfo(value.dtype).eps * noise)


def _change(x: Tensor, rounded: Tensor) -> float:
    """The absolute error that rounding may explain; 0 for what is no floating number."""
    both = x.isfinite() & rounded.isfinite()
    return _ROUNDINGS * float((x - rounded)[both].abs().max()) if _is_inexact(x) and both.any() else 0.0


def _resolves(x: Tensor, change: float) -> bool:
    """Whether an output shows more than rounding."""
    return not change or change <= _RESOLVED * _scale(x[x.isfinite()])


def _floor(x: Tensor, change: float) -> float:
    """The error that counts as none; where rounding is all that there is to see, an error is an error."""
    return change if _resolves(x, change) else 0.0
