"""A Program resized along its symmetry groups: new weights, new graph, sizes that were baked in worked out anew.

The new graph is run once without data (``meta`` tensors), at another batch size than the example's: every value must
have the shape that the axis terms foretell. Reductions and norms over channels run over those that are there, attention
keeps the scale of the original network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.groups import Group
from vfx.analyse.layer_view import statistics_channels
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.errors import ArgumentError, PassError
from vfx.operators import arguments, operator, operator_of, weight_name
from vfx.program import RESIZED, Execution, Goal, Program, Value, Weights, copy_graph
from vfx.resize.layout import Layout
from vfx.resize.operators import Rewriter
from vfx.resize.slots import RemovalUnits
from vfx.resize.weights import Gather, Kept


@dataclass(frozen=True, eq=False)
class Resized:
    """The resized ``program``, and where its channels come from (``gather`` of each edge).

    ``exact`` holds for each edge the tensors that are no selection of the old ones, in float64: the Program's own are
    these, rounded.
    """

    program: Program
    layout: Layout
    gathers: tuple[Gather, ...]
    exact: tuple[Weights, ...]

    def gather(self, node: fx.Node, dim: int) -> Index:
        """Old position of each new position along one axis of an activation (a node of the old graph)."""
        return _along(self.layout, self.gathers[0], node, dim)

    def changes(self, node: fx.Node, dim: int) -> bool:
        """Whether an axis of an activation (a node of the old graph) has other channels now."""
        shape = self.layout.shape(node)
        return shape is not None and dim < len(shape.axes) and self.layout.changed(shape.axes[dim])


def resize(
    program: Program,
    facts: Symmetry,
    kept: Kept | Sequence[Kept],
    *,
    slots: RemovalUnits | None = None,
    note: str = "",
    check: bool = True,
) -> Resized:
    """Keep, reorder, repeat channels: new channel j of group g is old channel ``kept[g][j]``; groups left out stay.

    ``kept`` is one choice for all edges, or one for each, of equal lengths. ``kept[g]`` has shape (n,), n ≥ 1; for a
    group inside blocks (blocks, n) is allowed, row b for new block b (old block ``kept[parent][b]``). ``note`` is what
    the result's history says, ``check`` whether the new graph is run without data.
    Raises ArgumentError for indices out of range, PassError where the sizes do not fit together or an operator cannot
    be resized.
    """
    choices = [kept] * program.edges if isinstance(kept, Mapping) else list(kept)
    choices = [_checked(facts, choice) for choice in choices]
    sizes = {g: p.shape[-1] for g, p in choices[0].items()}
    if len(choices) != program.edges or any({g: p.shape[-1] for g, p in c.items()} != sizes for c in choices):
        raise ArgumentError("one choice of channels is needed for each edge, all of the same sizes")
    slots = slots or RemovalUnits(facts)
    layout = Layout(facts, slots.multiplicity(slots.units(sizes)))
    gathers = tuple(Gather(facts, layout, choice) for choice in choices)
    graph, made = _graph(program, facts, layout)
    weights, exact = [], []
    for edge, gather in enumerate(gathers):
        selected = {**program.weights[edge], **_selected(program.weights[edge], gather), **made}
        computed = _computed(program, edge, selected, gather)
        weights.append(selected | {name: tensor.to(selected[name].dtype) for name, tensor in computed.items()})
        exact.append(computed)
    note = note or f"Resize({sum(sizes[g.index] != g.size for g in facts.groups)} groups)"
    changes = {
        "goals": _goals(program, facts, layout, gathers),
        "buffers": program.buffers | made.keys(),
        "origin": RESIZED,
    }
    result = program.with_graph(graph, weights, note, **changes)
    if check:
        check_shapes(result)
    return Resized(result, layout, gathers, tuple(exact))


def _checked(facts: Symmetry, kept: Kept) -> dict[int, Index]:
    """One choice of channels with every group in it."""
    checked: dict[int, Index] = {}
    for group in facts.groups:
        chosen = np.asarray(kept.get(group.index, np.arange(group.size)), np.int64)
        if chosen.ndim not in ((1,) if group.parent is None else (1, 2)) or not chosen.shape[-1]:
            raise ArgumentError(f"{group.name}: channels to keep must be one list of at least one, got {chosen.shape}")
        if chosen.min() < 0 or chosen.max() >= group.size:
            raise ArgumentError(f"{group.name}: channels to keep lie outside 0…{group.size - 1}")
        checked[group.index] = chosen
    for group in facts.groups:
        _check_blocks(group, checked)
    return checked


def _check_blocks(group: Group, chosen: Mapping[int, Index]) -> None:
    if group.parent is not None and chosen[group.index].ndim == 2:
        blocks = len(chosen[group.parent])
        if len(chosen[group.index]) != blocks:
            raise ArgumentError(f"{group.name}: {len(chosen[group.index])} rows of channels for {blocks} blocks")


# graph ----------------------------------------------------------------------------------------------------------------


def _graph(program: Program, facts: Symmetry, layout: Layout) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph with new sizes, and the tensors that it reads beside the parameters."""
    graph, mapping = copy_graph(program.graph)
    nodes = _same_nodes(program.graph, facts.program.graph)
    rewriter = Rewriter(layout, facts.terms.constant)
    made: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        old, new = nodes[node], mapping[node]
        if old not in facts.terms.used:
            continue
        new.meta = {**new.meta, "val": layout.value(node.meta.get("val"), layout.shapes.get(old))}
        try:
            rewriter.rewrite(old, new)
        except PassError as error:
            raise PassError(f"cannot resize {operator(old)} (node {old.name}): {error}") from error
    _constants(program, facts, layout, mapping, nodes, made)
    made |= rewriter.constants
    for node in [n for n in graph.nodes if n.op == "get_attr" and "val" not in n.meta]:
        node.meta["val"] = Value(tuple(made[str(node.target)].shape), made[str(node.target)].dtype)
    _drop_unread(graph, {mapping[node] for node in program.graph.nodes if nodes[node] not in facts.terms.used})
    graph.lint()
    return graph, made


def _same_nodes(graph: fx.Graph, analysed: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each node with the one of the same name that was analysed."""
    if graph is analysed:
        return {node: node for node in graph.nodes}
    by_name = {node.name: node for node in analysed.nodes}
    if by_name.keys() != {node.name for node in graph.nodes}:
        raise ArgumentError("these symmetries belong to another graph; infer them again")
    return {node: by_name[node.name] for node in graph.nodes}


def _constants(
    program: Program, facts: Symmetry, layout: Layout, mapping: Any, nodes: Any, made: dict[str, Tensor]
) -> None:
    """Buffers that are no norm's statistics are uniform along what changes; uses may come to differ in size."""
    for node in program.graph.nodes:
        fqn, shape = str(node.target), layout.shape(nodes[node])
        if node.op != "get_attr" or fqn in facts.terms.parameters or shape is None:
            continue
        if not any(map(layout.changed, shape.axes)):
            continue
        tensor = program.weights[0][fqn]
        for dim, entry in enumerate(shape.axes):
            if layout.changed(entry):
                index = torch.from_numpy(layout.positions(entry)).to(tensor.device)
                tensor = tensor.index_select(dim, index)
        name = f"resized.{node.name}"
        made[name] = tensor
        mapping[node].target = name
        mapping[node].meta["buffer"] = fqn


def _drop_unread(graph: fx.Graph, dead: set[fx.Node]) -> None:
    """Values that nothing reads were not analysed: they would run at sizes that do not fit."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or (node in dead and node.op != "placeholder")):
            graph.erase_node(node)


# weights --------------------------------------------------------------------------------------------------------------


def _selected(weights: Weights, gather: Gather) -> dict[str, Tensor]:
    return {fqn: gather.tensor(fqn, weights[fqn]) for fqn in gather.facts.terms.parameters}


def _computed(program: Program, edge: int, selected: Weights, gather: Gather) -> dict[str, Tensor]:
    """Tensors whose values depend on what was removed, in float64: the gains of weight norms."""
    computed: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        if operator_of(node).ties == "weight norm":
            computed |= _weight_norm(node, program.weights[edge], selected, gather)
    return computed


def _weight_norm(node: fx.Node, old: Weights, selected: Weights, gather: Gather) -> dict[str, Tensor]:
    """v·g/‖v‖ keeps the factor g/‖v‖ that it had with all inputs: g shrinks as much as ‖v‖."""
    a = arguments(node)
    name, gain = weight_name(node, "v"), weight_name(node, "g")
    if name is None or gain is None:
        raise PassError(f"cannot resize {operator(node)} (node {node.name}): it reads a computed weight")
    dims = [d for d in range(old[name].ndim) if d != a["dim"]]
    before, after = (torch.linalg.vector_norm(x[name].double(), dim=dims, keepdim=True) for x in (old, selected))
    before = gather.tensor(gain, before)
    return {gain: selected[gain].double() * torch.where(before > 0, after / before, 1.0)}


def _goals(program: Program, facts: Symmetry, layout: Layout, gathers: Sequence[Gather]) -> dict[str, Goal]:
    """Statistics of the channels that are kept."""
    if not program.goals:
        return {}
    channel = statistics_channels(program)
    goals = {}
    for name, goal in program.goals.items():
        rows = len(goal.mean)
        order = [
            _along(layout, gathers[min(e, len(gathers) - 1)], facts.program.nodes[name], channel[name])
            for e in range(rows)
        ]
        index = [torch.from_numpy(o).to(goal.mean.device) for o in order]
        goals[name] = Goal(*(torch.stack([row[o] for row, o in zip(x, index)]) for x in (goal.mean, goal.std)))
    return goals


def _along(layout: Layout, gather: Gather, node: fx.Node, dim: int) -> Index:
    """Old position of each new position along one axis of an activation."""
    shape = layout.shape(node)
    assert shape is not None
    labels = gather.facts.labels(node, dim)
    return layout.positions(shape.axes[dim]) if labels is None else gather.index(labels)


# check ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_shapes(program: Program) -> None:
    """Run a Program without data, at another batch size than the example's where it may vary.

    Raises PassError where a value has not its foretold shape.
    """
    program = replace(program, graph=_on_meta(program.graph))
    weights = {name: tensor.to("meta") for name, tensor in program.weights[0].items()}
    placeholders = program.placeholders
    symbolic = any(not isinstance(size, int) for node in placeholders for size in node.meta["val"].shape)
    shapes = [
        node.meta["val"].sizes(7) if symbolic else x.shape for node, x in zip(placeholders, program.example_inputs)
    ]
    inputs = [torch.empty(s, dtype=x.dtype, device="meta") for s, x in zip(shapes, program.example_inputs)]
    _check_run(program, weights, inputs)


def _on_meta(graph: fx.Graph) -> fx.Graph:
    """A copy that makes its tensors without data."""
    copied, _ = copy_graph(graph)
    for node in copied.nodes:
        move = lambda value: torch.device("meta") if isinstance(value, torch.device) else value  # noqa: E731
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), move)
    return copied


def _check_run(program: Program, weights: dict[str, Tensor], inputs: list[Any]) -> None:
    execution = Execution(program.graph, weights, inputs)
    batch = program.batch_of(inputs)
    for step in execution.plan:
        try:
            node, value = execution.step()
        except NotImplementedError:  # an operator that needs data
            return
        except (RuntimeError, ValueError, IndexError) as error:
            node = step.node
            raise PassError(f"{operator(node)} (node {node.name}) does not run at its new size: {error}") from error
        foretold = node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(foretold, Value):
            _check_value(node, tuple(value.shape), foretold, batch)


def _check_value(node: fx.Node, shape: tuple[int, ...], foretold: Value, batch: int) -> None:
    if len({s for size in foretold.shape if not isinstance(size, int) for s in size.free_symbols}) > 1:
        return
    sizes = foretold.sizes(batch)
    if shape != sizes:
        raise PassError(f"{operator(node)} (node {node.name}) gives {shape} at its new size, not {sizes}")
