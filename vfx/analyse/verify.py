"""Random group elements applied to randomised weights must not change the output (``vfx.proof``).

Constant-valued and zero-initialised parameters hide broken ties, and so do untrained normalisation statistics; both are
randomised first. Statistics are drawn around what each norm really sees, so that signals stay of order one through any
depth. A second run has every layer and norm give values of another order, so that saturations (the upper bound of
relu6) are reached wherever they stand, and features that vanish with depth do not.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.groups import Member
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.capture.outputs import named_tensors
from vfx.elements import Acting, Elements, act, random_element
from vfx.on_read import OnRead
from vfx.operators import is_layer, operator_of, weight_name
from vfx.program import Execution, Program, Weights, moved, run
from vfx.proof import LARGE, Trial, function_error, in_double, random_inputs

_FEW = 16  # positions of a channel, over the batch too


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
    network = partial(run, program.graph)
    inputs = random_inputs(program, generator)
    chosen = random_element(symmetry, np.random.default_rng(seed), classes)
    errors = []
    for scale in (None, LARGE):
        if scale is not None:
            inputs = [x * scale if x.is_floating_point() or x.is_complex() else x for x in inputs]
        weights = randomise(program, inputs, generator, scale)
        trial = Trial(network, weights, inputs, large=scale is not None)
        errors.append(trial.error(network(act(symmetry, chosen, weights, without), inputs)))
    return max(errors)


def preserved(symmetry: Symmetry, weights: Weights, element: Elements, seed: int = 0) -> float:
    """Relative output error of one given element on the given weights, in float64 on random inputs."""
    program, acting = symmetry.program.with_weights([weights]), Acting(symmetry, element)

    def exact(name: str, tensor: Tensor) -> Tensor:
        """A tensor moved in float64; what is only put into another order is widened behind that: half the memory."""
        if acting.rounds(name):
            return acting(name, moved(tensor, "cpu", torch.float64))
        return cast(Tensor, moved(acting(name, tensor), "cpu", torch.float64))

    graph, through = in_double(program, on_read=True).graph, OnRead(weights, exact)
    return function_error(program, lambda inputs: run(graph, through, inputs), seed)


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
    output = next(iter(named_tensors(node.target(*args, **kwargs)).values()))  # type: ignore[operator]
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
