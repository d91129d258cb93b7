"""Uniform access to the arguments of calls, and to layers in whatever form they are written."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from vfx.operators.registry import operator_of, written


def in_place(target: Any) -> Any:
    """The form of an elementwise ATen overload that writes into its first argument, or None."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::") + "_", None)
    return getattr(packet, target._overloadname, None)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    values = defaults(node.target)
    if values is None:
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    return {**values, **dict(zip(values, node.args)), **node.kwargs}


@cache
def defaults(target: Any) -> dict[str, Any] | None:
    """The default of each argument by name, None where there is none; None for what is no ATen overload.

    An alias' arguments have the names of the operator that it stands for.
    """
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    names, kinds = [a.name for a in schema.arguments], [str(a.type) for a in schema.arguments]
    packet = getattr(torch.ops.aten, written(target).removeprefix("aten."), None)
    for overload in packet.overloads() if packet is not None and str(packet) != str(target.overloadpacket) else ():
        arguments = getattr(packet, overload)._schema.arguments
        if [str(a.type) for a in arguments] == kinds:
            names = [a.name for a in arguments]
            break
    return {n: a.default_value if a.has_default_value() else None for n, a in zip(names, schema.arguments)}


def recurrent_cells(a: dict[str, Any]) -> list[list[fx.Node]]:
    """The parameters of every cell of a recurrent call, layer by layer, direction by direction."""
    count = (2 if a["bidirectional"] else 1) * a["num_layers"]
    size = len(a["params"]) // count
    return [a["params"][k * size : (k + 1) * size] for k in range(count)]


def is_layer(node: fx.Node) -> bool:
    """A convolution or linear call, or a product with a parameter (x W or x W + b, as GPT-2 writes its layers)."""
    return operator_of(node).is_layer or is_product(node)


def is_product(node: fx.Node) -> bool:
    """Whether a product is a linear layer: a computed value times a matrix that the graph reads, plus a bias or none.

    Its weight is (in, out), the other way round than a linear call's.
    """
    if not operator_of(node).multiplies:
        return False
    a, inputs = arguments(node), operands(node)
    parameters = [inputs["weight"], inputs["bias"]] if "bias" in inputs else [inputs["weight"]]
    ranks = [len(p.meta["val"].shape) if isinstance(p, fx.Node) and p.op == "get_attr" else 0 for p in parameters]
    computed = isinstance(inputs["input"], fx.Node) and inputs["input"].op != "get_attr"
    return computed and ranks == [2, 1][: len(ranks)] and a.get("alpha", 1) == a.get("beta", 1) == 1


def layer_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name; those of a product that is a layer as ``input``, ``weight`` and ``bias``."""
    return {"bias": None} | operands(node) if is_product(node) else arguments(node)


def operands(node: fx.Node) -> dict[str, Any]:
    """A product's operands by what they are: "input", "weight" and, where one is added, "bias"; {} for other calls."""
    a = arguments(node)
    return {role: a[name] for role, name in operator_of(node).roles.items()}


def output_axis(node: fx.Node) -> int:
    """The axis of a layer's weight on which its outputs stand (transposed convolutions: within each group)."""
    return 1 if is_product(node) or is_transposed(node) else 0


def is_transposed(node: fx.Node) -> bool:
    """Whether a call is a transposed convolution, by its name or its argument."""
    return operator_of(node).is_transposed or bool(arguments(node).get("transposed"))


def weight_name(node: fx.Node, argument: str = "weight") -> str | None:
    """FQN of a call's parameter, or None where it is absent or computed."""
    value = layer_arguments(node).get(argument)
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None
