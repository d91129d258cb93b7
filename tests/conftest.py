"""What the tests share: networks whose channels all differ, and edges that are permutations of each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vfx.analyse.symmetry import Symmetry
from vfx.api import symmetry, trace
from vfx.elements import Permutations, act, permuted, random_permutations
from vfx.program import Program

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


def images(count: int, size: int = 32, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pictures (count, channels, size, size)."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def lively(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with random biases and norm gains, and running statistics that fit ``x``."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.ndim == 1:
            parameter.copy_(0.2 * noise if "bias" in name else 1 + 0.3 * noise)
        elif not parameter.any():  # Fixup starts its branches and its classifier at zero
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()


def network(build: Callable[[], nn.Module], x: Tensor, seed: int = 0) -> nn.Module:
    """One lively network from a seed."""
    torch.manual_seed(seed)
    return lively(build().to(x.dtype), x, seed)


def edges(build: Callable[[], nn.Module], x: Tensor, count: int = 2, seed: int = 0) -> list[nn.Module]:
    """Independent lively networks of one architecture."""
    return [network(build, x, seed + index) for index in range(count)]


def transported(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[nn.Module, Symmetry, Permutations]:
    """π(model) in the model's class for a random group element π that moves every group."""
    program = trace(model, x[:2])
    facts = symmetry(program)
    element = random_permutations(facts.groups, np.random.default_rng(seed))
    moved = act(facts, permuted(element), program.weights[0])
    twin = copy.deepcopy(model)
    state = {name: moved.get(program.aliases.get(name, name), value) for name, value in model.state_dict().items()}
    twin.load_state_dict(state)
    return twin.eval(), facts, element


@torch.no_grad()
def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal to ``tolerance`` times the largest expected value."""
    flat = [torch.as_tensor(value) for value in (actual, expected)]
    scale = max(float(flat[1].abs().max()), 1e-30) if flat[1].numel() else 1.0
    torch.testing.assert_close(flat[0], flat[1], rtol=0, atol=tolerance * scale)


@torch.no_grad()
def node_values(program: Program, x: Tensor, edge: int = 0) -> dict[str, Any]:
    """Every node's value by name: a plain loop over the graph."""
    found: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = x
        elif node.op == "get_attr":
            found[node] = program.weights[edge][node.target]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = node.target(*args, **kwargs)
    return {node.name: value for node, value in found.items()}
