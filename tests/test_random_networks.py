"""Random small networks: every group found is a symmetry, and a search over all transpositions finds no other.

Networks act on vectors (N, C) with sizes so small that every choice of "swap two positions or none" on each axis of
each parameter can be tried, and that the group that was found can be written out element by element.
"""

from __future__ import annotations

from itertools import combinations, permutations, product
from math import factorial, prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import verify
from vfx.api import symmetry, trace
from vfx.elements import act, permuted
from vfx.program import run
from vfx.proof import relative_error

EXACT = 1e-10
INPUTS, OUTPUTS = 3, 2
MOST_ELEMENTS, MOST_SWAPS = 2000, 600
STEPS = ["linear", "linear", "tanh", "gelu", "softmax", "norm", "scale", "add", "mul"]
STEPS += ["cat", "outer", "turn", "pool", "max", "first", "swap"]
Plan = list[tuple[Any, ...]]


class Net(nn.Module):
    """Runs a plan: each step appends a tensor (N, C) to those before it, the last one is read by a linear layer."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        sizes = [INPUTS]
        for index, (name, *arguments) in enumerate(plan):
            if name == "linear":
                self.layers[str(index)] = nn.Linear(sizes[arguments[0]], arguments[1])
            elif name == "norm":
                self.layers[str(index)] = nn.LayerNorm(sizes[arguments[0]])
            elif name == "scale":
                self.scales[str(index)] = nn.Parameter(torch.ones(sizes[arguments[0]]))
            sizes.append(_size(name, arguments, sizes))
        self.head = nn.Linear(sizes[-1], OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.values(x)[-1])

    def values(self, x: Tensor) -> list[Tensor]:
        """The input and the result of every step."""
        values = [x]
        for index, (name, *arguments) in enumerate(self.plan):
            values.append(self._step(str(index), name, arguments, values))
        return values

    def _step(self, index: str, name: str, arguments: list[int], values: list[Tensor]) -> Tensor:
        x = values[arguments[0]]
        if name in ("linear", "norm"):
            return self.layers[index](x)
        if name == "scale":
            return x * self.scales[index]
        if name in ("add", "mul", "cat", "outer"):
            y = values[arguments[1]]
            return {
                "add": lambda: x + y,
                "mul": lambda: x * y,
                "cat": lambda: torch.cat([x, y], 1),
                "outer": lambda: (x[:, :, None] * y[:, None]).flatten(1),
            }[name]()
        return {
            "tanh": lambda: x.tanh(),
            "gelu": lambda: torch.nn.functional.gelu(x),
            "softmax": lambda: x.softmax(1),
            "turn": lambda: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1),
            "pool": lambda: x.unflatten(1, (2, -1)).square().sum(1),
            "max": lambda: x.unflatten(1, (-1, 2)).amax(2),
            "first": lambda: x.chunk(2, 1)[0],
            "swap": lambda: torch.cat(x.chunk(2, 1)[::-1], 1),
        }[name]()


def _size(name: str, arguments: list[int], sizes: list[int]) -> int:
    own = sizes[arguments[0]]
    if name == "linear":
        return arguments[1]
    if name == "cat":
        return own + sizes[arguments[1]]
    if name == "outer":
        return own * sizes[arguments[1]]
    return own // 2 if name in ("pool", "max", "first") else own


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Two to seven steps behind a first linear layer, no tensor wider than six."""
    plan: Plan = [("linear", 0, draw(st.integers(2, 4)))]
    sizes = [INPUTS, plan[0][2]]
    for _ in range(draw(st.integers(2, 7))):
        name = draw(st.sampled_from(STEPS))
        source = draw(st.integers(1, len(sizes) - 1))
        own = sizes[source]
        if name in ("turn", "pool", "max", "first", "swap") and own % 2:
            continue
        if name == "linear":
            step: tuple[Any, ...] = (name, source, draw(st.integers(2, 4)))
        elif name in ("add", "mul", "cat", "outer"):
            other = draw(st.integers(1, len(sizes) - 1))
            if name in ("add", "mul") and sizes[other] != own:
                continue
            step = (name, source, other)
        else:
            step = (name, source)
        size = _size(name, list(step[1:]), sizes)
        if not 1 < size <= 6:
            continue
        plan.append(step)
        sizes.append(size)
    return plan


def _network(plan: Plan) -> Net:
    torch.manual_seed(0)
    model = Net(plan).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return model.eval()


def _program(plan: Plan) -> Symmetry:
    return symmetry(trace(_network(plan), torch.randn(4, INPUTS, dtype=torch.float64)))


@torch.no_grad()
def _has_equal_features(plan: Plan, x: Tensor) -> bool:
    """Whether two features of one tensor are the same: what reads them may then exchange them, on its own."""
    for value in _network(plan).values(x):
        distance = (value[:, :, None] - value[:, None]).abs().amax(0)
        distance.fill_diagonal_(1)
        if (distance < 1e-12).any():
            return True
    return False


def _meets_itself_swapped(plan: Plan) -> bool:
    """Whether a tensor is added to (or multiplied by) itself with its halves exchanged: known to be missed.

    What commutes with that exchange is S_2 inside k pairs (the centralizer of an involution). Inference finds S_k on
    the pairs; the exchange within one pair maps a label to another copy's, and labels have no form for it.
    """
    found: list[set[tuple[int, bool]]] = [{(0, False)}]  # for each value: what it comes from, and whether exchanged
    for index, (name, *arguments) in enumerate(plan, start=1):
        own = found[arguments[0]]
        if name == "swap":
            own = {(source, not swapped) for source, swapped in own}
        elif name in ("add", "mul"):
            own = own | found[arguments[1]]
        elif name not in ("tanh", "gelu", "softmax", "norm", "scale"):
            own = {(index, False)}
        if any((source, not swapped) in own for source, swapped in own):
            return True
        found.append(own)
    return False


def _elements(facts: Symmetry) -> int:
    return prod(factorial(g.size) ** g.outer for g in facts.groups)


def _axes(facts: Symmetry) -> list[tuple[str, int, int]]:
    weights = facts.program.weights[0]
    return [
        (name, dim, size) for name in facts.program.names() for dim, size in enumerate(weights[name].shape) if size > 1
    ]


def _found(facts: Symmetry, axes: list[tuple[str, int, int]]) -> set[tuple[tuple[int, ...], ...]]:
    """What each element of the group does to each axis, identified by a tensor that numbers its entries."""
    weights = facts.program.weights[0]
    numbers = {name: torch.arange(weights[name].numel()).reshape(weights[name].shape) for name, _, _ in axes}
    choices = []
    for group in facts.groups:
        own = [np.array(p) for p in permutations(range(group.size))]
        rows = product(own, repeat=group.outer) if group.parent is not None else ((p,) for p in own)
        choices.append([np.stack(row) if group.parent is not None else row[0] for row in rows])
    found = set()
    for combination in product(*choices):
        moved = act(facts, permuted(dict(enumerate(combination))), numbers)
        found.add(tuple(tuple(moved[name].reshape(-1).tolist()) for name in sorted(numbers)))
    return found


def _swaps(size: int) -> list[tuple[int, ...]]:
    """The identity and every transposition."""
    orders = [tuple(range(size))]
    for i, j in combinations(range(size), 2):
        order = list(range(size))
        order[i], order[j] = order[j], order[i]
        orders.append(tuple(order))
    return orders


def _symmetric(facts: Symmetry, axes: list[tuple[str, int, int]], x: Tensor) -> list[dict[str, Tensor]]:
    """Every choice of swaps that leaves the output as it is, as numbered tensors."""
    weights = facts.program.weights[0]
    numbers = {name: torch.arange(weights[name].numel()).reshape(weights[name].shape) for name, _, _ in axes}
    expected = run(facts.program.graph, weights, [x])
    results = []
    for orders in product(*(_swaps(size) for _, _, size in axes)):
        order = dict(numbers)
        for (name, dim, _), own in zip(axes, orders):
            order[name] = order[name].index_select(dim, torch.tensor(own))
        moved = dict(weights) | {name: weights[name].reshape(-1)[index] for name, index in order.items()}
        if relative_error(expected, run(facts.program.graph, moved, [x])) < 1e-9:
            results.append(order)
    return results


def _without_effect(facts: Symmetry, x: Tensor) -> bool:
    """Whether some parameter does not reach the output (a shift in front of a softmax, a saturated unit)."""
    weights = facts.program.weights[0]
    expected = run(facts.program.graph, weights, [x])
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        for axis in range(tensor.ndim):
            noise = torch.randn(tensor.shape[axis], generator=generator, dtype=tensor.dtype)
            changed = tensor + noise.reshape(-1, *[1] * (tensor.ndim - 1 - axis))
            if relative_error(expected, run(facts.program.graph, dict(weights) | {name: changed}, [x])) < 1e-6:
                return True
    return False


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans())
def test_every_group_of_a_random_network_is_a_symmetry(plan: Plan) -> None:
    facts = _program(plan)
    assert not facts.unknown_ops
    assert verify(facts, seed=1) <= EXACT


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans())
def test_no_transposition_is_missed(plan: Plan) -> None:
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assume(not _meets_itself_swapped(plan))
    assume(not _has_equal_features(plan, x))
    facts = _program(plan)
    axes = _axes(facts)
    assume(prod(1 + size * (size - 1) // 2 for _, _, size in axes) <= MOST_SWAPS)
    assume(_elements(facts) <= MOST_ELEMENTS)
    assume(not _without_effect(facts, x))
    found = _found(facts, axes)
    for order in _symmetric(facts, axes, x):
        moved = tuple(tuple(order[name].reshape(-1).tolist()) for name in sorted(order))
        assert moved in found, [name for name, index in order.items() if (index.diff() < 0).any()]


@pytest.mark.parametrize("plan", [[("linear", 0, 3), ("tanh", 1)]])
def test_the_search_sees_a_group_that_is_left_out(plan: Plan) -> None:
    """Negative control: with no group at all, the swaps of the hidden layer are found missing."""
    facts = _program(plan)
    axes = _axes(facts)
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    found = _symmetric(facts, axes, x)
    assert len(found) == 4  # nothing, and three swaps of two hidden units
    assert len(_found(facts, axes)) == 6
