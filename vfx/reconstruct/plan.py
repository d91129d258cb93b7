"""Which parameters are solved, at which calls, and towards which value of the references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from vfx.analyse.layer_view import NORM_TENSORS, BatchNorm, layer_views, not_alone
from vfx.complex_numbers import is_complex
from vfx.operators import arguments, is_in_place, is_layer, operator_of
from vfx.program import Program, Value, readers_of
from vfx.reconstruct.forms import Form, form_of
from vfx.reconstruct.units import DiagonalUnit, MatrixUnit, Unit, Use

Found = tuple[fx.Node, Form, fx.Node, str, str | None]  # call, form, source, weight, bias


def units_of(program: Program, known: frozenset[str], sums: bool) -> tuple[list[Unit], list[str]]:
    """The units of a network in the order in which they are solved, and notes on parameters that keep their values.

    ``known`` are the nodes whose values the references give. With ``sums`` the goal of a layer whose output meets an
    add, whose other operand is known by then, is that of the sum.
    """
    readers = readers_of(program.graph)
    matrices, notes = _matrices(program, known, readers)
    norms = {unit.norm.node for unit in matrices if unit.norm is not None}
    diagonal_units = (_diagonal(program, node, known, readers) for node in program.graph.nodes if node not in norms)
    diagonals = [unit for unit in diagonal_units if unit is not None]
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    units: list[Unit] = sorted([*matrices, *diagonals], key=lambda unit: position[unit.uses[0].node])
    if sums:
        stops = [use.node for unit in units for use in unit.uses]
        stops += [node for node in program.graph.nodes if operator_of(node).ties == "attention"]
        starts = sorted(position[node] for node in stops)
        for unit in units:
            unit.uses = tuple(_towards_sum(use, known, position, starts) for use in unit.uses)
    return units, notes


class ProductCall(NamedTuple):
    """A call that multiplies what ``source`` gives by a parameter, in the ``form`` that its weight is a matrix in."""

    node: fx.Node
    form: Form
    source: fx.Node


def products_of(program: Program) -> dict[str, list[ProductCall]]:
    """The parameters that calls multiply by and do nothing else with, all in one layout, in the order of first use."""
    readers, calls_of = readers_of(program.graph), dict[str, list[ProductCall]]()
    for node in program.graph.nodes:
        product = form_of(node) if node.op == "call_function" else None
        if product is not None and program.is_parameter(str(product[2].target)):
            calls_of.setdefault(str(product[2].target), []).append(ProductCall(node, product[0], product[1]))
    return {
        name: calls
        for name, calls in calls_of.items()
        if set(readers[name]) == {call.node for call in calls} and len({_layout(call.form) for call in calls}) == 1
    }


# layers ---------------------------------------------------------------------------------------------------------------


def _matrices(
    program: Program, kept: frozenset[str], readers: dict[str, list[fx.Node]]
) -> tuple[list[MatrixUnit], list[str]]:
    by_weight: dict[str, list[Found]] = {}
    notes: list[str] = []
    for node in program.graph.nodes:
        form_and_operands = form_of(node) if node.op == "call_function" else None
        if form_and_operands is None:
            if is_layer(node):
                notes.append(_kept(node, "its weight is computed"))
            continue
        form, source, weight, bias = form_and_operands
        name = str(weight.target)
        if bias is not None and _parameter(bias) is None:
            notes.append(_kept(node, "its bias is computed"))
            continue
        if name in program.private or not program.is_parameter(name):
            continue
        if node.name in kept:
            by_weight.setdefault(name, []).append((node, form, source, name, str(bias.target) if bias else None))
    units = []
    for calls in by_weight.values():
        reason = _irregular(calls, readers)
        if reason:
            notes.append(_kept(calls[0][0], reason))
        else:
            units.append(_matrix_unit(program, calls, kept, readers))
    return units, notes


def _kept(node: fx.Node, reason: str) -> str:
    return f"reconstruction: {node.name} keeps its weights, since {reason}"


def _irregular(calls: Sequence[Found], readers: dict[str, list[fx.Node]]) -> str:
    """Why calls of one weight are not one least-squares problem; empty if they are."""
    nodes = [call[0] for call in calls]
    weight, biases = calls[0][3], {call[4] for call in calls}
    others = [node.name for node in readers[weight] if node not in nodes]
    if others:
        return f"{', '.join(others)} read its weight in another way, or in a part of the network without a reference"
    forms = [call[1] for call in calls]
    alike = all(type(form) is type(forms[0]) for form in forms)
    if not alike or len({_layout(form) for form in forms}) > 1:
        return "calls read its weight in different layouts"
    if len(biases) > 1:
        return "calls of its weight add different biases"
    bias = calls[0][4]
    if bias is not None and any(node not in nodes for node in readers[bias]):
        return "its bias is read elsewhere, too"
    return ""


def _layout(form: Form) -> Any:
    """What decides how a form arranges its weight."""
    fields = vars(form)
    return tuple(
        tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
        for name in ("w", "shared", "read", "made", "groups", "transposed", "shape")
        if name in fields
    )


def _matrix_unit(
    program: Program, calls: Sequence[Found], kept: frozenset[str], readers: dict[str, list[fx.Node]]
) -> MatrixUnit:
    node = calls[0][0]
    norm = _batch_norm(program, node, kept, readers) if len(calls) == 1 else None
    uses = [Use(call[0], call[0] if norm is None else norm.node) for call in calls]
    forms, sources = [call[1] for call in calls], [call[2] for call in calls]
    return MatrixUnit(uses, forms, sources, calls[0][3], calls[0][4], norm)


def _batch_norm(
    program: Program, node: fx.Node, kept: frozenset[str], readers: dict[str, list[fx.Node]]
) -> BatchNorm | None:
    """The layer's own BatchNorm that is solved with it: fixed, its tensors its own and no edge's alone."""
    view = layer_views(program).get(node.name)
    norm = None if view is None else view.norm
    if norm is None or not norm.is_fixed or norm.node.name not in kept:
        return None
    shared = not_alone(norm.node, NORM_TENSORS, readers) or program.private.intersection(norm.names.values())
    return norm if not shared and _follows(norm.node, node) else None


def _follows(norm: fx.Node, node: fx.Node) -> bool:
    """Whether nothing with a parameter runs between a layer and its norm, which would be solved before the norm ran."""
    between = node.next
    while between is not norm:
        if between.op == "call_function" and any(a.op == "get_attr" for a in between.all_input_nodes):
            return False
        between = between.next
    return True


# gains and shifts -----------------------------------------------------------------------------------------------------


def _diagonal(
    program: Program, node: fx.Node, kept: frozenset[str], readers: dict[str, list[fx.Node]]
) -> DiagonalUnit | None:
    """A norm's gain and shift, or the parameter that an add or a product applies entry by entry."""
    if node.op != "call_function" or node.name not in kept or not isinstance(node.meta.get("val"), Value):
        return None
    if is_complex(node):
        return None
    gain, shift, axis = _entries(node)
    parameters = [p for p in (gain, shift) if p is not None]
    for parameter in parameters:
        name = str(parameter.target)
        if name in program.private or not program.is_parameter(name) or readers[name] != [node]:
            return None
    if not parameters or any(p.meta["val"].shape != parameters[0].meta["val"].shape for p in parameters):
        return None
    return DiagonalUnit(Use(node, node), gain, shift, axis)


def _entries(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None, int | None]:
    """The gain and the shift of a call, and the axis on which they stand, None for the last ones."""
    entry, a = operator_of(node), arguments(node)
    if entry.is_norm:
        axis = None if entry.is_vector_norm else 1
        return _parameter(a.get("weight")), _parameter(a.get("bias")), axis
    if entry.ties == "prelu":
        weight = _parameter(a["weight"])
        scalar = weight is not None and tuple(weight.meta["val"].shape) in ((), (1,))
        return weight, None, None if scalar else 1
    multiplies = entry.name == "aten.mul"
    if (multiplies or entry.is_add) and not is_in_place(node) and a.get("alpha", 1) == 1:
        operands = [a.get("self"), a.get("other")]
        parameter = next((p for p in map(_parameter, operands) if p is not None), None)
        computed = [x for x in operands if isinstance(x, fx.Node) and x.op == "call_function"]
        if parameter is not None and len(computed) == 1 and _broadcasts_to(parameter, node):
            return (parameter, None, None) if multiplies else (None, parameter, None)
    return None, None, None


def _broadcasts_to(parameter: fx.Node, node: fx.Node) -> bool:
    parameter_shape, whole = parameter.meta["val"].shape, node.meta["val"].shape
    return len(parameter_shape) <= len(whole) and all(
        a in (1, b) for a, b in zip(reversed(parameter_shape), reversed(whole))
    )


def _parameter(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


# goals ----------------------------------------------------------------------------------------------------------------


def _towards_sum(use: Use, kept: frozenset[str], position: dict[fx.Node, int], starts: Sequence[int]) -> Use:
    """The same use with the goal of the sum that its output goes into, where the other operand is known by then."""
    for total, addend in _sums(use.goal):
        ready = position[addend] < position[use.node] and addend.op != "get_attr"
        between = any(position[use.node] < start < position[total] for start in starts)
        if ready and not between and total.name in kept:
            return replace(use, goal=total, other=addend)
    return use


def _sums(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The add that alone reads a value (through what does not change it), and its other operand."""
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        a = arguments(user) if user.op == "call_function" else {}
        if operator_of(user).is_add and a.get("alpha", 1) == 1:
            operands = [a.get("self"), a.get("other")]
            others = [x for x in operands if isinstance(x, fx.Node) and x is not current]
            same = [x for x in others if _shape(x) == _shape(current) == _shape(user)]
            if len(same) == 1 and len(others) == 1:
                yield user, others[0]
            return
        if not operator_of(user).is_identity or user.args[0] is not current:
            return
        current = user


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Value) else None
