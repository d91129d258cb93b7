"""Router-weighted scores of experts: how much each adds to what its layer gives (REAP, Lasby et al. 2025, eq. 3).

The experts of a layer are a group whose positions a router names (``vfx.analyse.routed``). The score of expert j is the
mean of g_j(x) ‖f_j(x)‖ over the tokens x that are sent to it. A layer's output is y(x) = Σ g_j(x) f_j(x), so that
g_j f_j is what y loses with the tensors of expert j at zero: no form of router or expert has to be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from vfx.analyse.groups import Group, Member
from vfx.analyse.layers import ancestors, descendants
from vfx.analyse.symmetry import Symmetry
from vfx.errors import PassError
from vfx.operators import operator_of
from vfx.program import Execution, Program
from vfx.resize.implied import numbered_axes


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """A group of experts, the members that are not the router's, and where the layer begins and gives its sum."""

    group: Group
    members: tuple[Member, ...]
    start: fx.Node
    output: fx.Node


def expert_groups(facts: Symmetry) -> frozenset[int]:
    """The groups whose positions a router names, with tensors of their own beside the router's."""
    named = {int(leaf) for rows in numbered_axes(facts) for leaf in np.unique(facts.leaves.leaf_of(rows[:, 1:]))}
    groups = {facts.group_of[leaf] for leaf in named if leaf in facts.group_of}
    return frozenset(g for g in groups if facts.groups[g].parent is None and _own(facts, facts.groups[g]))


def expert_layers(program: Program, facts: Symmetry) -> list[ExpertLayer]:
    """The layers of experts of a network. Raises PassError where the experts' contributions meet nowhere."""
    return [_layer(program, facts, facts.groups[index]) for index in sorted(expert_groups(facts))]


@torch.no_grad()
def expert_scores(program: Program, facts: Symmetry, batches: Iterable[list[Tensor]]) -> dict[int, NDArray[np.float64]]:
    """The score of each expert by group; zeros for all other groups. Raises PassError."""
    total, tokens = expert_totals(program, expert_layers(program, facts), batches)
    means = {index: (total[index] / tokens[index].clamp_min(1)).numpy() for index in total}
    return {group.index: np.zeros(group.shape) for group in facts.groups} | means


@torch.no_grad()
def expert_totals(
    program: Program, layers: Sequence[ExpertLayer], batches: Iterable[list[Tensor]]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By group, float64 (experts,): the sum of g_j ‖f_j‖ over tokens, and the number of tokens that are sent there."""
    total = {layer.group.index: torch.zeros(layer.group.size, dtype=torch.float64) for layer in layers}
    tokens = {index: torch.zeros_like(zeros) for index, zeros in total.items()}
    for batch in batches:
        for layer in layers:
            silenced = (_without(program.weights[0], layer, expert) for expert in range(layer.group.size))
            for expert, added in enumerate(changed_by(program, layer, batch, silenced)):
                total[layer.group.index][expert] += added.sum()
                tokens[layer.group.index][expert] += (added > 0).sum()
    return total, tokens


@torch.no_grad()
def changed_by(
    program: Program, layer: ExpertLayer, batch: list[Tensor], changes: Iterable[Mapping[str, Tensor]]
) -> Iterator[Tensor]:
    """By how much each of some ``changes`` of a layer's tensors moves its output at each token: (tokens,), float64."""
    plan = [step._replace(in_place=None) for step in program.plan]
    run = Execution(program.graph, program.weights[0], batch, plan)
    while run.plan[run.position].node is not layer.start:
        run.step()
    whole = _value(run.fork(plan), layer.output).double()
    for changed in changes:
        twin = run.fork(plan)
        twin.weights = {**program.weights[0], **changed}
        off = whole - _value(twin, layer.output).double()
        yield off.flatten(0, -2).norm(dim=-1).cpu()


def _without(weights: Mapping[str, Tensor], layer: ExpertLayer, expert: int) -> dict[str, Tensor]:
    """The tensors of a layer with zeros for one expert."""
    silenced: dict[str, Tensor] = {}
    for member in layer.members:
        tensor = silenced.get(member.fqn, weights[member.fqn])
        places = torch.from_numpy(member.position[expert].reshape(-1)).to(tensor.device)
        silenced[member.fqn] = tensor.index_fill(member.dim, places, 0)
    return silenced


def _value(run: Execution, node: fx.Node) -> Tensor:
    while True:
        current, value = run.step()
        if current is node:
            return value  # type: ignore[no-any-return]


# where a layer is -----------------------------------------------------------------------------------------------------


def _own(facts: Symmetry, group: Group) -> tuple[Member, ...]:
    """The members that no router reads: what positions were read from does not depend on them."""
    numbers = [n for n, shape in facts.terms.shapes.items() if _names(facts, shape, group)]
    routers = {str(node.target) for node in ancestors(numbers) if node.op == "get_attr"}
    return tuple(member for member in group.members if member.fqn not in routers)


def _names(facts: Symmetry, shape: Any, group: Group) -> bool:
    """Whether a value's integers name positions of a group."""
    shapes = shape if isinstance(shape, (list, tuple)) else [shape]
    axes = [part.meaning.axis for part in shapes if getattr(part, "meaning", None) is not None]
    rows = [facts.terms.rows(axis) for axis in axes if not axis.opaque]
    leaf = facts.leaf_of[group.index]
    return any(r is not None and (facts.leaves.leaf_of(facts.leaves.resolve(r)[:, 1:]) == leaf).any() for r in rows)


def _layer(program: Program, facts: Symmetry, group: Group) -> ExpertLayer:
    members = _own(facts, group)
    names = {member.fqn for member in members}
    read = [n for n in program.graph.nodes if n.op == "get_attr" and n.target in names]
    reached = descendants(read)
    start = next(node for node in program.graph.nodes if node in reached)
    output = _sum(program, read, reached)
    if output is None:
        raise PassError(f"{group.name}: what its experts give meets nowhere, so that they have no score; protect it")
    return ExpertLayer(group, members, start, output)


def _sum(program: Program, read: list[fx.Node], reached: set[fx.Node]) -> fx.Node | None:
    """The last value that all that the experts' tensors lead to goes through and that is still their sum.

    It ends where another value is added, or where a layer or a norm reads it.
    """
    meeting = None
    waiting = {node: len(node.users) for node in read}  # readers that are still to come
    for node in (n for n in program.graph.nodes if n in reached):
        inputs = set(node.all_input_nodes)
        others = [x for x in inputs if x not in reached and x.op != "get_attr"]
        ends = operator_of(node).is_layer or operator_of(node).is_norm or node.op == "output"
        if meeting is not None and (ends or (operator_of(node).is_add and others)):
            return meeting
        waiting = {x: count - (x in inputs) for x, count in waiting.items() if count > (x in inputs)}
        waiting |= {node: len(node.users)}
        meeting = node if set(waiting) == {node} else meeting
    return meeting
