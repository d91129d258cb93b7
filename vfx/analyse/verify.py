"""Proof, not hope: random group elements applied to randomised weights must not change the output.

Constant-valued and zero-initialised parameters hide broken ties, and so do untrained normalisation statistics; both are
randomised first. Statistics are drawn around what each norm really sees, so that signals stay of order one through any
depth. The error is relative to how much the output varies over the inputs, so a large bias cannot hide it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from vfx.analyse.transform import apply
from vfx.operators import BATCH_NORMS, operator, weight_name
from vfx.program import Execution, Program, Weights, copy_graph, run

if TYPE_CHECKING:
    from vfx.analyse.symmetry import Member, Symmetry
    from vfx.analyse.transform import Elements


_FEW = 16  # positions of a channel, over the batch too


@torch.no_grad()
def verify(symmetry: Symmetry, *, seed: int = 0, without: tuple[Member, ...] = (), classes: str = "full") -> float:
    """Largest relative output error in float64 between the network and one moved by a random element.

    Every group goes through a map of its full class (orthogonal and invertible ones, scales and signs), or is only
    permuted (``classes="permutation"``). ``without`` leaves parameter axes out (a negative control: the error must
    become large).
    """
    generator = torch.Generator().manual_seed(seed)
    program = in_double(symmetry.program.select(0))
    inputs = [_random_input(x, generator) for x in program.example_inputs]
    weights = randomise(program, inputs, generator)
    chosen = symmetry.random_maps(np.random.default_rng(seed), classes)
    return function_error(program, weights, symmetry.transform(weights, chosen, without), inputs)


@torch.no_grad()
def preserved(symmetry: Symmetry, weights: Weights, element: Elements, seed: int = 0) -> float:
    """Relative output error of one given element on the given weights, in float64 on random inputs."""
    program = in_double(symmetry.program.with_weights([weights]))
    inputs, before = trial(program, seed)
    moved = apply(symmetry, program.weights[0], element, check=False)
    return largest_error(before, run(program.graph, moved, inputs))


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
    """The network in float64 on the CPU; where its graph names single precision (casts, tensors made), that too."""
    graph, _ = copy_graph(program.graph)
    for node in graph.nodes:
        node.args, node.kwargs = (map_aggregate(x, _wider) for x in (node.args, node.kwargs))
    return replace(program.to("cpu", torch.float64), graph=graph)


_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def function_error(program: Program, before: Weights, after: Weights, inputs: list[Any]) -> float:
    """max |f − g| over all outputs, relative to the spread of f over the batch (or its size, if it does not vary)."""
    first, second = (run(program.graph, weights, inputs) for weights in (before, after))
    return largest_error(first, second)


def largest_error(before: Any, after: Any) -> float:
    """The largest ``relative_error`` over the tensors of two outputs of one structure."""
    return max((relative_error(x, y) for x, y in zip(tensors(before), tensors(after), strict=True)), default=0.0)


def relative_error(x: Tensor, y: Tensor) -> float:
    """max |x − y| over the spread of x; infinite where that shows nothing.

    Every value is compared: infinities must be the same ones, and NaN, another shape or no finite value at all prove
    nothing.
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
    scale = (x - x.mean(0, keepdim=True)).abs().amax() if x.ndim and x.numel() else x.abs().sum()
    scale = scale if scale > 0 else x.abs().max() if x.numel() else scale
    error = (x - y).abs().max() if x.numel() else scale
    return float(error / scale) if scale > 0 else float(error)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _random_input(x: Any, generator: torch.Generator) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.cpu() if isinstance(x, Tensor) else x


def randomise(program: Program, inputs: list[Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Weights in which every parameter and statistic tells its channels apart."""
    weights = {
        name: _distinct(tensor, generator) if name not in program.buffers else tensor
        for name, tensor in program.weights[0].items()
    }
    execution = Execution(program.graph, weights, inputs)
    while execution.position < len(execution.plan):
        node = execution.plan[execution.position].node
        if operator(node) in BATCH_NORMS:
            _random_statistics(node, execution, weights, generator)
        execution.step()
    return weights


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
