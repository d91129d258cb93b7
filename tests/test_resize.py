"""Networks resized along their symmetry groups compute what the masked ones compute; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from conftest import close, images, lively
from micro_models import MICRO, REFUSED, Micro, conv, net
from test_zoo import maxvit, swin, vit
from torch import Tensor, nn
from torch.nn import functional as F

from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import randomise
from vfx.capture.capture import capture
from vfx.emit.module import graph_module
from vfx.errors import ArgumentError, PassError
from vfx.program import Goal, Program
from vfx.proof import in_double
from vfx.resize import RemovalUnits, resize
from vfx.resize.masked import masked_error
from vfx.resize.program import Resized, check_shapes

EXACT, BROKEN = 1e-9, 1e-4


def _captured(model: nn.Module, *inputs: Tensor) -> tuple[Program, Symmetry]:
    """A network in float64 with random biases, norms and statistics, and its groups."""
    program = in_double(capture(model, inputs))
    weights = randomise(program, list(program.example_inputs), torch.Generator().manual_seed(0))
    program = program.with_weights([weights])
    return program, symmetry(program)


def _drawn(facts: Symmetry, slots: RemovalUnits, fraction: float, seed: int = 0) -> dict[int, Index]:
    """Random channels of each group, ``fraction`` of them, different ones in each block."""
    generator = np.random.default_rng(seed)
    units = [b.units if b.fixed else max(1, round(b.units * fraction)) for b in slots.bundles]
    sizes = slots.sizes(units)
    kept: dict[int, Index] = {}
    for group in sorted(facts.groups, key=lambda group: group.parent is not None):
        draw = lambda g=group: np.sort(generator.permutation(g.size)[: sizes[g.index]])  # noqa: E731
        blocks = [draw() for _ in kept[group.parent]] if group.parent is not None else []
        kept[group.index] = np.stack(blocks) if blocks else draw()
    return kept


def _error(program: Program, facts: Symmetry, found: Resized, kept: dict[int, Index]) -> float:
    return masked_error(program, facts, found, kept)


# soundness ------------------------------------------------------------------------------------------------------------

UNDEFINED = {"deviation"}  # the unbiased deviation of two channels, of which one is left


@pytest.mark.parametrize("micro", [m for m in (*MICRO, *REFUSED) if m.name not in UNDEFINED], ids=lambda m: m.name)
def test_every_hazard_at_half_its_channels(micro: Micro) -> None:
    torch.manual_seed(0)
    program, facts = _captured(micro.build(), *micro.inputs())
    slots = RemovalUnits(facts)
    kept = _drawn(facts, slots, 0.5)
    found = resize(program, facts, kept, slots=slots)
    assert _error(program, facts, found, kept) <= EXACT


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "shufflenet_v2_x0_5": (zoo.shufflenet_v2_x0_5, 32),
    "swin": (swin, 32),
    "vit": (vit, 32),
    "maxvit": (maxvit, 32),
}


HEAVY = {"maxvit", "shufflenet_v2_x0_5"}  # the benchmark takes them at all three


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_a_quarter_half_and_three_quarters(name: str) -> None:
    build, side = NETWORKS[name]
    torch.manual_seed(0)
    program, facts = _captured(build(), images(2, side))
    slots = RemovalUnits(facts)
    for fraction in (0.25,) if name in HEAVY else (0.75, 0.5, 0.25):
        kept = _drawn(facts, slots, fraction)
        found = resize(program, facts, kept, slots=slots)
        assert sum(p.shape[-1] for p in kept.values()) < facts.channels * (fraction + 0.1)
        assert _error(program, facts, found, kept) <= EXACT
        for batch in (1, 5):
            assert found.program(images(batch, side, dtype=torch.float64)).shape[0] == batch


def test_a_plain_network_equals_the_users_own_with_zeroed_columns() -> None:
    model = lively(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 6), nn.Flatten(),
                                 nn.Linear(96, 4)).double(), images(2, 4, dtype=torch.float64))  # fmt: skip
    program = capture(model, images(2, 4, dtype=torch.float64))
    facts = symmetry(program)
    first, second = ([1, 2, 5], [0, 3, 4, 5])
    small = resize(program, facts, {0: np.array(first), 1: np.array(second)}).program
    x = images(3, 4, dtype=torch.float64, seed=1)
    with torch.no_grad():
        model[3].weight[:, [c for c in range(8) if c not in first]] = 0
        model[5].weight.view(4, 6, 16)[:, [1, 2]] = 0
        close(small(x), model(x), EXACT)
        model[5].weight.view(4, 6, 16)[:, [0]] = 0  # one too many
        assert (small(x) - model(x)).abs().max() > BROKEN


def test_the_proof_finds_a_wrong_channel() -> None:
    program, facts = _captured(vit(), images(2, 32))
    slots = RemovalUnits(facts)
    kept = _drawn(facts, slots, 0.5)
    found = resize(program, facts, kept, slots=slots)
    other = kept | {0: np.setdiff1d(np.arange(facts.groups[0].size), kept[0])}
    assert _error(program, facts, found, other) >= BROKEN


def test_keeping_all_is_the_identity() -> None:
    torch.manual_seed(0)
    program, facts = _captured(vit(), images(2, 32))
    same = resize(program, facts, {}).program
    assert str(same.graph) == str(program.graph)
    assert all(torch.equal(same.weights[0][name], tensor) for name, tensor in program.weights[0].items())


def test_nothing_of_the_input_changes() -> None:
    torch.manual_seed(0)
    program, facts = _captured(vit(), images(2, 32))
    before = str(program.graph), {name: tensor.clone() for name, tensor in program.weights[0].items()}
    slots = RemovalUnits(facts)
    resize(program, facts, _drawn(facts, slots, 0.5), slots=slots)
    assert str(program.graph) == before[0]
    assert all(torch.equal(program.weights[0][name], tensor) for name, tensor in before[1].items())


# growing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: nn.Sequential(conv(3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)), images(2, 4)),
        (lambda: nn.Sequential(conv(3, 6), conv(6, 6, groups=6), nn.Flatten(), nn.Linear(96, 2)), images(2, 4)),
    ],
    ids=["flatten", "depthwise"],
)  # fmt: skip
def test_copies_of_channels_that_share_their_output_change_nothing(build: Any, x: Tensor) -> None:
    torch.manual_seed(0)
    program, facts = _captured(build(), x)
    (group,) = facts.groups
    order = np.array([2, 0, 1, *range(2, group.size), 1, 2, 0])
    count = np.bincount(order)[order]
    grown = resize(program, facts, {0: order}).program
    weights = dict(grown.weights[0])
    (member,) = [m for m in group.members if m.role == "in" and weights[m.fqn].ndim == 2]
    copies = member.position.shape[1]
    weights[member.fqn] = weights[member.fqn] / torch.from_numpy(np.repeat(count, copies))
    close(grown.with_weights([weights])(x.double()), program(x.double()), EXACT)


def test_heads_grow_whole() -> None:
    torch.manual_seed(0)
    program, facts = _captured(vit(), images(2, 32))
    heads = [g for g in facts.groups if any(other.parent == g.index for other in facts.groups)]
    grown = resize(program, facts, {g.index: np.array([0, 1, 2, 1]) for g in heads}).program
    x = images(5, 32, dtype=torch.float64)
    assert grown(x).shape == (5, 9)
    assert grown.weights[0]["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].shape == (192, 48)


# what belongs together ------------------------------------------------------------------------------------------------


def _attention(self: Any, x: Tensor) -> Tensor:
    n, length, _ = x.shape
    q, k, v = self.qkv(x).view(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 8))


def test_packed_q_k_and_v_keep_as_many_channels_and_the_scale_of_the_network() -> None:
    torch.manual_seed(0)
    program, facts = _captured(net(_attention, qkv=nn.Linear(5, 24), out=nn.Linear(8, 3)), torch.randn(2, 6, 5))
    slots = RemovalUnits(facts)
    inner = {g.index for g in facts.groups if g.parent is not None}
    assert {frozenset(b.groups) for b in slots.bundles if set(b.groups) & inner} == {frozenset(inner)}
    one = min(inner)
    with pytest.raises(PassError, match="do not fit together"):
        resize(program, facts, {one: np.arange(2)}, slots=slots)
    small = resize(program, facts, {g: np.arange(2) for g in inner}, slots=slots).program
    (node,) = [n for n in small.graph.nodes if "attention" in n.name]
    assert node.kwargs["scale"] == 0.5


def test_shuffled_channels_are_kept_in_numbers_that_interleave() -> None:
    torch.manual_seed(0)
    _, facts = _captured(zoo.shufflenet_v2_x0_5(), images(2, 32))
    slots = RemovalUnits(facts)
    assert any(len(b.groups) > 2 for b in slots.bundles)
    assert slots.sizes([b.units for b in slots.bundles]) == {g.index: g.size for g in facts.groups}
    halved = slots.sizes([max(1, b.units // 2) for b in slots.bundles])
    again = slots.sizes(slots.units(halved))
    assert again == halved


def test_a_sorted_axis_keeps_its_length() -> None:
    torch.manual_seed(0)
    micro = next(m for m in MICRO if m.name == "sorted")
    program, facts = _captured(micro.build(), *micro.inputs())
    with pytest.raises(PassError, match="cannot be removed"):
        resize(program, facts, {0: np.arange(2)})


# statistics and modules -----------------------------------------------------------------------------------------------


def test_goals_are_those_of_the_kept_channels() -> None:
    program, facts = _captured(nn.Sequential(conv(3, 5), nn.ReLU(), conv(5, 4)), images(2, 4))
    node = next(n.name for n in program.graph.nodes if n.name.startswith("conv"))
    goal = Goal(torch.arange(5.0)[None], 10 + torch.arange(5.0)[None])
    found = resize(replace(program, goals={node: goal}), facts, {0: np.array([4, 1])}).program.goals[node]
    assert found.mean.tolist() == [[4.0, 1.0]]
    assert found.std.tolist() == [[14.0, 11.0]]


def test_goals_of_each_edge_are_those_of_its_own_channels() -> None:
    program, facts = _captured(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 5))
    node = next(n.name for n in program.graph.nodes if n.name.startswith("linear"))
    rows = torch.arange(8.0) + torch.tensor([[0.0], [100.0]])
    both = replace(program.with_weights([program.weights[0]] * 2), goals={node: Goal(rows, 10 + rows)})
    goal = resize(both, facts, [{0: np.array([1, 0])}, {0: np.array([6, 7])}]).program.goals[node]
    assert goal.mean.tolist() == [[1.0, 0.0], [106.0, 107.0]]
    assert goal.std.tolist() == [[11.0, 10.0], [116.0, 117.0]]


def test_the_result_is_a_module_with_the_users_names() -> None:
    torch.manual_seed(0)
    program = capture(zoo.resnet18().eval(), images(2, 32))
    facts = symmetry(program)
    slots = RemovalUnits(facts)
    small = resize(program, facts, _drawn(facts, slots, 0.5), slots=slots).program
    assert small.structural
    module = graph_module(small)
    assert module.state_dict()["layer1.0.bn1.running_mean"].shape == (32,)
    x = images(5, 32)
    close(module(x), small(x), 1e-6)
    module.train()(x).sum().backward()


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "cause"),
    [
        ({0: np.array([0, 8])}, "outside 0…7"),
        ({0: np.array([], np.int64)}, "at least one"),
        ({0: np.array([[0, 1]])}, "one list"),
    ],
)
def test_choices_that_are_none(kept: dict[int, Index], cause: str) -> None:
    program, facts = _captured(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 5))
    with pytest.raises(ArgumentError, match=cause):
        resize(program, facts, kept)


def test_edges_keep_channels_of_their_own_but_as_many() -> None:
    program, facts = _captured(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 5))
    both = program.with_weights([program.weights[0]] * 2)
    small = resize(both, facts, [{0: np.array([0, 1])}, {0: np.array([6, 7])}]).program
    for weights, rows in zip(small.weights, (slice(0, 2), slice(6, 8))):
        assert torch.equal(weights["0.weight"], program.weights[0]["0.weight"][rows])
    with pytest.raises(ArgumentError, match="same sizes"):
        resize(both, facts, [{0: np.array([0, 1])}, {0: np.array([6])}])


def test_a_graph_of_other_sizes_than_foretold_is_refused() -> None:
    program, facts = _captured(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 5))
    small = resize(program, facts, {0: np.arange(3)}).program
    weights = dict(small.weights[0])
    weights["0.weight"], weights["0.bias"] = torch.randn(4, 5), torch.randn(4)
    with pytest.raises(PassError, match="linear"):
        check_shapes(small.with_weights([weights]))
