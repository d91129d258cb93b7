"""The one action, written out by hand: what an element does to each weight and to each axis of an activation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import close
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.api import trace
from vfx.elements import (
    Element,
    act,
    act_on,
    behind_exact,
    check_elements,
    compose,
    exact_part,
    identity,
    inverse,
    random_element,
    undone,
)
from vfx.elements.parts import multiplied
from vfx.program import Execution

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ORDER = np.array([2, 0, 4, 1, 3])


class Chain(nn.Module):
    """Two layers, a gain or an activation between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "gain":
            h = h * self.gain
        return self.second(h.relu() if self.kind == "relu" else h)


class Heads(nn.Module):
    """Attention with two heads of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _facts(model: nn.Module, x: Tensor) -> Symmetry:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return symmetry(trace(model.double().eval(), x))


def _moved(facts: Symmetry, elements: dict[int, Element]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = dict(facts.program.weights[0])
    return weights, act(facts, elements, weights)


def _error(facts: Symmetry, moved: dict[str, Tensor], x: Tensor) -> float:
    program = facts.program
    return float((program.with_weights([moved])(x) - program(x)).abs().max())


def test_an_index_orders_what_makes_and_what_reads_a_feature() -> None:
    facts = _facts(Chain("gain"), X)
    w, moved = _moved(facts, {0: Element(ORDER)})
    assert torch.equal(moved["first.weight"], w["first.weight"][ORDER])
    assert torch.equal(moved["first.bias"], w["first.bias"][ORDER])
    assert torch.equal(moved["gain"], w["gain"][ORDER])
    assert torch.equal(moved["second.weight"], w["second.weight"][:, ORDER])
    assert moved["second.bias"] is w["second.bias"], "tensors that do not move are shared"
    assert _error(facts, moved, X) < 1e-13
    left = next(member for member in facts.groups[0].members if member.fqn == "gain")
    assert _error(facts, act(facts, {0: Element(ORDER)}, w, (left,)), X) > 1e-2


def test_scales_stand_behind_the_index_and_are_undone_by_what_reads() -> None:
    facts = _facts(Chain("relu"), X)
    (side,) = (side.index for side in facts.groups[0].sides if side.members)
    scale = np.array([0.5, 1.0, 2.0, 3.0, 4.0])
    w, moved = _moved(facts, {0: Element(ORDER, scales={side: scale})})
    close(moved["first.weight"], w["first.weight"][ORDER] * torch.from_numpy(scale)[:, None], 0)
    close(moved["first.bias"], w["first.bias"][ORDER] * torch.from_numpy(scale), 0)
    close(moved["second.weight"], w["second.weight"][:, ORDER] * torch.from_numpy(1 / scale), 0)
    assert _error(facts, moved, X) < 1e-12
    assert _error(facts, act(facts, {0: Element(ORDER, scales={side: -scale})}, w), X) > 1e-2, "relu sees signs"


def test_a_matrix_mixes_channels_and_its_dual_undoes_it() -> None:
    facts = _facts(Chain("linear"), X)
    matrix = np.eye(5) + 0.2 * np.random.default_rng(0).standard_normal((5, 5))
    w, moved = _moved(facts, {0: Element(matrix=matrix)})
    forth, back = torch.from_numpy(matrix), torch.from_numpy(np.linalg.inv(matrix))
    close(moved["first.weight"], forth @ w["first.weight"], 1e-13)
    close(moved["first.bias"], forth @ w["first.bias"], 1e-13)
    close(moved["second.weight"], w["second.weight"] @ back, 1e-12)
    assert _error(facts, moved, X) < 1e-12
    assert _error(facts, act(facts, {0: Element(matrix=matrix, dual=matrix)}, w), X) > 1e-2


def test_a_way_back_of_its_own_goes_to_what_reads_and_the_index_to_what_acts_channel_by_channel() -> None:
    facts = _facts(Chain("gain"), X)
    rng = np.random.default_rng(1)
    matrix, dual = rng.standard_normal((5, 5)), rng.standard_normal((5, 5))
    element = {0: Element(ORDER, matrix, dual=dual)}
    w, moved = _moved(facts, element)
    close(moved["first.weight"], torch.from_numpy(matrix) @ w["first.weight"], 1e-13)
    close(moved["second.weight"], w["second.weight"] @ torch.from_numpy(dual).T, 1e-13)
    assert torch.equal(moved["gain"], w["gain"][ORDER])
    ordered = act(facts, exact_part(element), w)
    assert torch.equal(ordered["first.weight"], w["first.weight"][ORDER])
    again = act(facts, behind_exact(element), ordered)
    for name, tensor in moved.items():
        close(again[name], tensor, 1e-13)
    assert (ordered["first.weight"] - moved["first.weight"]).abs().max() > 1e-2


def test_blocks_are_ordered_by_their_parent_and_each_has_an_order_of_its_own() -> None:
    """Head b of the result is head heads[b]; its channel j is that head's channel inner[b, j]."""
    facts = _facts(Heads(), TOKENS)
    heads, inner = np.array([1, 0]), np.array([[2, 0, 1], [1, 2, 0]])
    outer = next(group for group in facts.groups if group.size == 2 and group.parent is None)
    values = next(g for g in facts.groups if g.parent is not None and any(m.fqn == "v.weight" for m in g.members))
    w, moved = _moved(facts, {outer.index: Element(heads), values.index: Element(inner)})
    rows = [3 + 2, 3 + 0, 3 + 1, 1, 2, 0]
    assert torch.equal(moved["v.weight"], w["v.weight"][rows])
    assert torch.equal(moved["out.weight"], w["out.weight"][:, rows])
    assert torch.equal(moved["q.weight"], w["q.weight"][[3, 4, 5, 0, 1, 2]])
    assert _error(facts, moved, TOKENS) < 1e-13
    wrong = dict(moved) | {"out.weight": w["out.weight"]}
    assert _error(facts, wrong, TOKENS) > 1e-2


def _values(facts: Symmetry, weights: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    execution = Execution(facts.program.graph, weights, [x])
    found = {}
    while execution.position < len(execution.plan):
        node, value = execution.step()
        if isinstance(value, Tensor):
            found[node.name] = value
    return found


@pytest.mark.parametrize("kind", ["linear", "relu", "heads"])
@pytest.mark.parametrize("classes", ["full", "permutation"])
def test_activations_go_through_what_makes_them(kind: str, classes: str) -> None:
    """Every layer's output in the moved network is ``act_on`` of what it was."""
    model, x = (Heads(), TOKENS) if kind == "heads" else (Chain(kind), X)
    facts = _facts(model, x)
    elements = random_element(facts, np.random.default_rng(3), classes)
    assert check_elements(facts, elements) is elements
    w, moved = _moved(facts, elements)
    before, after = _values(facts, w, x), _values(facts, moved, x)
    layers = [node for node in facts.program.graph.nodes if node.name.startswith("linear")]
    changed = 0.0
    for node in layers:
        dim = before[node.name].ndim - 1
        expected = act_on(facts, elements, node, dim)(before[node.name].movedim(dim, 0)).movedim(0, dim)
        close(after[node.name], expected, 1e-11)
        changed = max(changed, float((after[node.name] - before[node.name]).abs().max()))
    assert changed > 1e-2, "control: the element does something"


@pytest.mark.parametrize("kind", ["linear", "relu", "gain"])
def test_what_is_done_is_undone(kind: str) -> None:
    facts = _facts(Chain(kind), X)
    rng = np.random.default_rng(4)
    one, two = random_element(facts, rng), random_element(facts, rng)
    w, moved = _moved(facts, one)
    for name, tensor in act(facts, inverse(facts, one), moved).items():
        close(tensor, w[name], 1e-12)
    both = act(facts, compose(facts, one, two), w)
    for name, tensor in act(facts, two, moved).items():
        close(both[name], tensor, 1e-12)
    assert (both["first.weight"] - moved["first.weight"]).abs().max() > 1e-2
    assert all(torch.equal(tensor, w[name]) for name, tensor in act(facts, identity(facts), w).items())
    loose = {0: Element(matrix=np.triu(np.ones((5, 5))), dual=np.linalg.inv(np.triu(np.ones((5, 5)))).mT)}
    for name, tensor in act(facts, undone(loose), act(facts, loose, w)).items():
        close(tensor, w[name], 1e-12)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "position", [[[2], [3], [4]], [[2], [4], [3]], [[0, 4], [1, 5], [2, 6]], [[1, 2], [3, 4], [5, 6]]]
)
def test_slices_are_multiplied_wherever_they_stand(position: list[list[int]], in_place: bool, dim: int) -> None:
    """In a row, where they are written through a view, as apart: what the whole map of the axis gives."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(7, 7, 3, generator=generator, dtype=torch.float64)
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    whole = torch.eye(7, dtype=torch.float64)
    for copy in np.array(position).T:
        whole[np.ix_(copy, copy)] = matrix
    expected = (whole @ tensor.movedim(dim, 0).flatten(1)).reshape(7, 7, 3).movedim(0, dim)
    given = tensor.clone()
    result = multiplied(given, dim, np.array(position), matrix.numpy(), in_place)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert (result.data_ptr() == given.data_ptr()) is in_place
    assert in_place or torch.equal(given, tensor)
