"""Proof, not hope: random group elements applied to randomised weights must not change the output.

Constant-valued and zero-initialised parameters hide broken ties, and so do untrained normalisation statistics; both are
randomised first. Statistics are drawn around what each norm really sees, so that signals stay of order one through any
depth. A second run has every layer and norm give values of another order, so that saturations (the upper bound of
relu6) are reached wherever they stand, and features that vanish with depth do not.

The error is relative to how much the output varies over the inputs, so a large bias cannot hide it. Where it hardly
varies, rounding is larger than that: no output is resolved better than ``SHARE`` of its size, nor better than some
units in the last place of the weights and inputs change it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vfx.analyse.groups import Member
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.elements import Elements, act, random_element
from vfx.operators import is_layer, operator_of, weight_name
from vfx.program import Execution, Program, Weights, run

_FEW = 16  # positions of a channel, over the batch too
_LARGE = 10.0  # deviation of every layer's and norm's output where saturations are looked for
SHARE = 2e-4  # of an output's size that its spread counts as at least: 1e-9 of it is a thousand roundings of float64
_PRESERVED = 1e-9  # the largest error that a function which is kept has
_ROUNDINGS = 100  # times the change by one rounding of each weight, which is no more than rounding
_RESOLVED = 1e-4  # of the spread: rounding that goes beyond shows that nothing is proved


@checked
@torch.no_grad()
def verify(symmetry: Symmetry, seed: int = 0, without: tuple[Member, ...] = (), classes: str = "full") -> float:
    """Largest relative output error in float64 between the network and one moved by a random element.

    Every group goes through a map of its full class (orthogonal and invertible ones, scales and signs), or is only
    permuted (``classes="permutation"``); the weights and inputs are tried at two scales. ``without`` leaves parameter
    axes out (a negative control: the error must become large).
    """
    generator = torch.Generator().manual_seed(seed)
    program = in_double(symmetry.program.select(0))
    inputs = [_random_input(x, generator) for x in program.example_inputs]
    chosen = random_element(symmetry, np.random.default_rng(seed), classes)
    weights = randomise(program, inputs, generator)
    error = function_error(program, weights, act(symmetry, chosen, weights, without), inputs)
    inputs = [x * _LARGE if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    weights = randomise(program, inputs, generator, _LARGE)
    if _resolves(program, weights, inputs):
        error = max(error, function_error(program, weights, act(symmetry, chosen, weights, without), inputs))
    return error


@torch.no_grad()
def preserved(symmetry: Symmetry, weights: Weights, element: Elements, seed: int = 0) -> float:
    """Relative output error of one given element on the given weights, in float64 on random inputs."""
    program = in_double(symmetry.program.with_weights([weights]))
    inputs, before = trial(program, seed)
    moved = act(symmetry, element, program.weights[0])
    return output_error(program, program.weights[0], inputs, before, run(program.graph, moved, inputs))


@torch.no_grad()
def trial(program: Program, seed: int = 0) -> tuple[list[Any], Any]:
    """Inputs to prove on, and what a float64 network gives for them.

    They are normal ones; where these lead to NaN (the root or logarithm of a negative number), the example's own.
    """
    inputs = random_inputs(program, seed)
    outputs = run(program.graph, program.weights[0], inputs)
    if not is_defined(outputs):
        inputs = list(program.example_inputs)
        outputs = run(program.graph, program.weights[0], inputs)
    return inputs, outputs


def is_defined(value: Any) -> bool:
    """Whether no tensor in a nested output holds NaN."""
    return not any(bool(tensor.isnan().any()) for tensor in tensors(value))


def random_inputs(program: Program, seed: int = 0) -> list[Any]:
    """Normal float64 inputs in the shapes of the example's; what is not floating stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    return [_random_input(x, generator) for x in program.example_inputs]


def in_double(program: Program) -> Program:
    """The network in float64 on the CPU, casts and tensors that it makes on the way included."""
    return program.to("cpu", torch.float64)


def function_error(program: Program, before: Weights, after: Weights, inputs: list[Any]) -> float:
    """max |f − g| over all outputs, relative to the spread of f over the batch; see ``output_error``."""
    first, second = (run(program.graph, weights, inputs) for weights in (before, after))
    return output_error(program, before, inputs, first, second)


def output_error(program: Program, weights: Weights, inputs: list[Any], expected: Any, given: Any) -> float:
    """The largest ``relative_error`` of outputs that should be those ``expected`` of the network.

    Where that is too large for a function that is kept, it is compared with what rounding does to the network.
    """
    error = largest_error(expected, given)
    if error <= _PRESERVED:
        return error
    rounded = _rounded(program, weights, inputs)
    triples = zip(tensors(expected), tensors(given), rounded, strict=True)
    return max(relative_error(x, y, _rounding(x, z)) for x, y, z in triples)


def largest_error(before: Any, after: Any) -> float:
    """The largest ``relative_error`` over the tensors of two outputs of one structure."""
    return max((relative_error(x, y) for x, y in zip(tensors(before), tensors(after), strict=True)), default=0.0)


def relative_error(x: Tensor, y: Tensor, rounding: float = 0.0) -> float:
    """max |x − y| over the spread of x along its first axis, but at least ``SHARE`` of the size of x.

    ``rounding`` is an absolute error that counts as none. Every value is compared: infinities must be the same ones,
    and NaN, another shape or no finite value at all prove nothing (infinite).
    """
    if x.shape != y.shape:
        return float("inf")
    if not (x.is_floating_point() or x.is_complex()):
        return float((x != y).any())
    finite = x.isfinite()
    if x.numel() and (not finite.any() or not torch.equal(x[~finite], y[~finite]) or not y[finite].isfinite().all()):
        return float("inf")
    if not finite.all():
        x, y = x[finite], y[finite]
    if not x.numel():
        return 0.0
    error, scale = float((x - y).abs().max()), max(_scale(x), rounding / _PRESERVED)
    return error / scale if scale > 0 else error


def _scale(x: Tensor) -> float:
    """The spread of finite values along their first axis, or what counts as it where they hardly vary."""
    size = float(x.abs().max())
    spread = float((x - x.mean(0, keepdim=True)).abs().max()) if x.ndim else 0.0
    return max(spread, SHARE * size) if spread > 0 else size


def _rounded(program: Program, weights: Weights, inputs: list[Any]) -> list[Tensor]:
    """The outputs when every weight and input is off by about a unit in its last place."""
    generator = torch.Generator().manual_seed(0)
    off = {name: _nudged(tensor, generator) for name, tensor in weights.items()}
    return tensors(run(program.graph, off, [_nudged(x, generator) for x in inputs]))


def _nudged(value: Any, generator: torch.Generator) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return value * (1 + torch.finfo(value.dtype).eps * noise)


def _rounding(x: Tensor, rounded: Tensor) -> float:
    """The error in x that rounding explains; none where rounding is all that there is to see."""
    if not x.is_floating_point():
        return 0.0
    both = x.isfinite() & rounded.isfinite()
    if not both.any():
        return 0.0
    change = _ROUNDINGS * float((x - rounded)[both].abs().max())
    return change if change <= _RESOLVED * _scale(x[both]) else 0.0


def _resolves(program: Program, weights: Weights, inputs: list[Any]) -> bool:
    """Whether all outputs are finite and show more than rounding: networks of large weights may be chaotic."""
    first, second = tensors(run(program.graph, weights, inputs)), _rounded(program, weights, inputs)
    pairs = [(x, y) for x, y in zip(first, second) if x.is_floating_point()]
    return all(bool(x.isfinite().all()) and relative_error(x, y) <= _PRESERVED / _ROUNDINGS for x, y in pairs)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _random_input(x: Any, generator: torch.Generator) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.cpu() if isinstance(x, Tensor) else x


def randomise(
    program: Program, inputs: list[Any], generator: torch.Generator, scale: float | None = None
) -> dict[str, Tensor]:
    """Weights in which every parameter and statistic tells its channels apart.

    With a ``scale`` layers and norms have weights (and biases) that give outputs of this deviation.
    """
    weights = {
        name: _distinct(tensor, generator) if name not in program.buffers else tensor
        for name, tensor in program.weights[0].items()
    }
    scaled: set[str] = set()
    execution = Execution(program.graph, weights, inputs)
    while execution.position < len(execution.plan):
        node = execution.plan[execution.position].node
        if operator_of(node).is_batch_norm:
            _random_statistics(node, execution, weights, generator)
        if scale is not None and (is_layer(node) or operator_of(node).is_norm):
            _rescale(node, execution, weights, scale, scaled)
        execution.step()
    return weights


def _rescale(node: fx.Node, execution: Execution, weights: dict[str, Tensor], scale: float, scaled: set[str]) -> None:
    """The weight and bias of a node, multiplied so that its output has a deviation; those met before stay."""
    names = {name for role in ("weight", "bias") if (name := weight_name(node, role)) is not None} - scaled
    if not names:
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), execution.value)
    output = tensors(node.target(*args, **kwargs))[0]  # type: ignore[operator]
    size = float(output.square().mean().sqrt())
    if 0 < size < float("inf"):
        weights.update({name: weights[name] * (scale / size) for name in names})
    scaled |= names


def _distinct(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Constant-valued parameters get a spread around their value."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or bool((tensor != tensor.flatten()[0]).any()):
        return tensor
    return tensor + 0.5 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def _random_statistics(node: fx.Node, execution: Execution, weights: dict[str, Tensor], generator: Any) -> None:
    mean, var = weight_name(node, "running_mean"), weight_name(node, "running_var")
    if mean is None or var is None:
        return
    x = execution.value(node.args[0])  # type: ignore[arg-type]
    dims = [d for d in range(x.ndim) if d != 1]
    std = x.std(dims)
    # Few positions make some channels look constant by chance: dividing by that would blow rounding errors up, block
    # after block. The fewer there are, the closer a channel stays to its layer's median.
    floor = 0.3 if x.numel() >= _FEW * x.shape[1] else 1.0
    std = torch.maximum(std, floor * x.mean(dims).abs()).clamp_min(max(floor * float(std.median()), 1e-6))
    noise = torch.randn(std.shape, generator=generator, dtype=std.dtype)
    weights[mean] = x.mean(dims) + 0.3 * std * noise
    weights[var] = std**2 * (0.5 + torch.rand(std.shape, generator=generator, dtype=std.dtype))
