"""Notes on channels that cannot move: which layers make them, and what holds them."""

from __future__ import annotations

from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import ALONE, Symmetry
from vfx.operators import output_axis, weight_name
from vfx.program import Program

MODEL_INPUT = "model input"
NAMED = 5  # names that a note lists


def pin_notes(facts: Symmetry) -> list[str]:
    """A note for each operator that holds channels of inner layers; what the last layers give is the network's own.

    Operators without a rule are named wherever they hold a parameter.
    """
    inner = _made_inside(facts.program)
    unknown = {reason for name in facts.unknown_ops for reason in _reasons(name)}
    everywhere = unknown | {MODEL_INPUT}  # one note, whatever the nodes
    held: dict[tuple[str, str], dict[str, int]] = {}
    for pin in facts.pinned:
        if pin.reason in unknown or (pin.reason != ALONE and inner.get(pin.fqn) == pin.dim):
            counts = held.setdefault((pin.reason, "" if pin.reason in everywhere else pin.node), {})
            counts[pin.fqn] = max(counts.get(pin.fqn, 0), pin.count)
    return [f"{_cause(facts, *key)}: channels of {listed(list(names))} stay as they are" for key, names in held.items()]


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _made_inside(program: Program) -> dict[str, int]:
    """Weights of layers that others follow, with the axis of what they make."""
    layers = number_layers(program)
    chosen = [*layers.select(), *(layer for layer in layers if layer.shortcut)]
    nodes = [program.node(layer.node) for layer in chosen]
    return {name: output_axis(node) for node in nodes if (name := weight_name(node)) is not None}


def _reasons(name: str) -> tuple[str, str]:
    return f"no rule for {name}", f"{name} is not covered in this form"


def _cause(facts: Symmetry, reason: str, node: str) -> str:
    for name, nodes in facts.unknown_ops.items():
        if reason in _reasons(name):
            return f"{reason} ({'nodes' if len(nodes) > 1 else 'node'} {listed(list(nodes))})"
    if reason == MODEL_INPUT:
        return "what is added to the network's input"
    return "what the network returns" if node == "output" else f"{reason} (node {node})"
