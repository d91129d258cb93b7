"""Recurrent layers: all gates of a cell share one action on its hidden features, and each cell has its own.

A cell reads its input x, and its state h, through weight_ih (gates·H, I) and weight_hh (gates·H, H): the gates are
pinned copies of H. Layers feed each other; the two directions of a layer stand one after the other. Time is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from vfx.analyse.axis import Axis
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.shapes import Shape
from vfx.operators import is_in_place, operator_of
from vfx.operators.calls import recurrent_cells

RECURS = "a recurrence runs over these positions"


def layers(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> list[Shape] | None:
    """lstm, gru, rnn: x (N, T, I) -> every layer's last features (N, T, D·H), final states (layers·D, N, H)."""
    if "batch_sizes" in a or len(t.shape(a["input"]).axes) != 3:  # packed sequences
        return None
    x = t.shape(a["input"])
    batch, time = (0, 1) if a["batch_first"] else (1, 0)
    t.pin_dim(x, time, RECURS)
    cells = recurrent_cells(a)
    states = list(a["hx"]) if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    gates = operator_of(node).gates
    fed, outputs, memories = t.axis(x, 2), [], []
    for layer in range(a["num_layers"]):
        directions = range(layer * len(cells) // a["num_layers"], (layer + 1) * len(cells) // a["num_layers"])
        outputs_of = [_cell(t, cells[index], gates, fed, bool(a["has_biases"])) for index in directions]
        for index, (output, memory) in zip(directions, outputs_of):
            _start(t, states, index, (output, memory))
        outputs += [output for output, _ in outputs_of]
        memories += [memory for _, memory in outputs_of]
        fed = outputs_of[0][0] if len(outputs_of) == 1 else t.concatenate([output for output, _ in outputs_of])
    axes = [x.axes[batch], t.opaque(x.axes[time].size, RECURS)]
    result = Shape((*(axes if batch == 0 else reversed(axes)), fed))
    return [result, *(_final(t, rows, x.axes[batch]) for rows in (outputs, memories)[: len(states)])]


def _cell(t: ProgramTerms, parameters: Sequence[Any], gates: int, fed: Axis, biases: bool) -> tuple[Axis, Axis]:
    """One layer in one direction: its output's axis and its memory's (they differ where a projection follows)."""
    weight, recurrent, *rest = parameters
    width = t.axis(t.shape(weight), 0).size // gates
    memory = t.fresh(width)
    stacked = t.rows(Axis((*t.opaque(gates, "gates of a recurrent cell").factors, *memory.factors)))
    assert stacked is not None
    for parameter in (weight, recurrent, *rest[: 2 * biases]):
        t.tie(t.axis(t.shape(parameter), 0), Axis((stacked,)))
        t.role(parameter, 0, "out")
    t.tie(fed, t.axis(t.shape(weight), 1))
    t.role(weight, 1, "in")
    output = memory
    if len(rest) > 2 * biases:  # a projection of the features (proj, H)
        projection = rest[-1]
        t.tie(memory, t.axis(t.shape(projection), 1))
        output = t.axis(t.shape(projection), 0)
        t.role(projection, 0, "out")
        t.role(projection, 1, "in")
    t.tie(output, t.axis(t.shape(recurrent), 1))
    t.role(recurrent, 1, "in")
    return output, memory


def _start(t: ProgramTerms, states: Sequence[Any], index: int, axes: tuple[Axis, Axis]) -> None:
    """Initial states (cells, N, H): a cell's own slice ties to its features; a uniform fill ties nothing."""
    for state, axis in zip(states, axes):
        if not _is_uniform(t, state):
            t.tie(axis, t.axis(t.select(t.shape(state), 0, index), 1))


def _is_uniform(t: ProgramTerms, state: fx.Node) -> bool:
    """Whether all features start alike: their axis must not tie one cell to the next."""
    if state.op != "get_attr" or state.target not in t.program.buffers:
        return operator_of(state).ties == "fill" and not is_in_place(state)
    values = [weights[str(state.target)] for weights in t.program.weights]
    return all(not v.is_meta and bool((v == v[..., :1]).all()) for v in values)


def _final(t: ProgramTerms, cells: list[Axis], batch: Any) -> Shape:
    """The states of all cells (cells, N, H): each row has its own action."""
    if len(cells) == 1:
        return Shape((t.fresh(1), batch, cells[0]))
    rows = t.view(Shape((t.concatenate(cells),)), (len(cells), cells[0].size))
    return Shape((rows.axes[0], batch, rows.axes[1]))


def cell(t: ProgramTerms, node: fx.Node, a: dict[str, Any]) -> Any:
    """lstm_cell, gru_cell, rnn_cell: one step, x (N, I) -> (N, H)."""
    gates = operator_of(node).gates
    biases = [a[name] for name in ("b_ih", "b_hh") if isinstance(a.get(name), fx.Node)]
    x = t.shape(a["input"])
    features, _ = _cell(t, [a["w_ih"], a["w_hh"], *biases], gates, t.axis(x, len(x.axes) - 1), len(biases) == 2)
    states = list(a["hx"]) if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    for state in states:
        shape = t.shape(state)
        t.tie(features, t.axis(shape, len(shape.axes) - 1))
    result = Shape((*x.axes[:-1], features))
    return [result, result] if len(states) == 2 else result
