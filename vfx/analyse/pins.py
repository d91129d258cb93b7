"""Notes on channels that cannot move: which layers make them, and what holds them."""

from __future__ import annotations

from collections.abc import Sequence

from vfx.analyse.groups import Pinned
from vfx.analyse.infer import MODEL_INPUT, MODEL_OUTPUT
from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import ALONE, Symmetry
from vfx.errors import listed
from vfx.operators import output_axis, weight_name
from vfx.program import Program


def pin_notes(facts: Symmetry) -> list[str]:
    """A note for each operator that holds channels of inner layers; what the last layers give is the network's own.

    Operators without a rule are named wherever they hold a parameter.
    """
    inner = _made_inside(facts.program)
    unknown = {reason for name in facts.unknown_ops for reason in _reasons(name)}
    everywhere = unknown | {MODEL_INPUT}  # one note, whatever the nodes
    held: dict[tuple[str, str], list[Pinned]] = {}
    for pin in facts.pinned:
        if pin.reason in unknown or (pin.reason != ALONE and inner.get(pin.fqn) == pin.dim):
            returned = pin.node == "output"  # one note for all outputs
            key = (pin.reason, "") if pin.reason in everywhere else ("" if returned else pin.reason, pin.node)
            held.setdefault(key, []).append(pin)
    return [_note(facts, pins) for pins in held.values()]


def _note(facts: Symmetry, pins: Sequence[Pinned]) -> str:
    names = list(dict.fromkeys(pin.fqn for pin in pins))
    note = f"{_cause(facts, pins)}: channels of {listed(names)} stay as they are"
    return f"{note}; outputs= names those that count" if _outputs(pins) else note


def _made_inside(program: Program) -> dict[str, int]:
    """Weights of layers that others follow, with the axis of what they make."""
    layers = number_layers(program)
    chosen = [*layers.select(), *(layer for layer in layers if layer.shortcut)]
    nodes = [program.node(layer.node) for layer in chosen]
    return {name: output_axis(node) for node in nodes if (name := weight_name(node)) is not None}


def _reasons(name: str) -> tuple[str, str]:
    return f"no rule for {name}", f"{name} is not covered in this form"


def _cause(facts: Symmetry, pins: Sequence[Pinned]) -> str:
    reason, node = pins[0].reason, pins[0].node
    for name, nodes in facts.unknown_ops.items():
        if reason in _reasons(name):
            return f"{reason} ({'nodes' if len(nodes) > 1 else 'node'} {listed(list(nodes))})"
    if reason == MODEL_INPUT:
        return "what is added to the network's input"
    if node == "output":
        returned = _outputs(pins)
        return "what the network returns" + (f" as {listed(returned)}" if returned else "")
    return f"{reason} (node {node})"


def _outputs(pins: Sequence[Pinned]) -> list[str]:
    """Which of several outputs hold channels; none where there is one."""
    reasons = dict.fromkeys(pin.reason for pin in pins if pin.reason.startswith(f"{MODEL_OUTPUT} "))
    return [reason.removeprefix(f"{MODEL_OUTPUT} ") for reason in reasons]
