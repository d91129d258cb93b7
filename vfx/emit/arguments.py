"""The emitted module is called like the user's: nested arguments and constants as the capture saw them."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from vfx.capture.signature import Argument, Leaf, Signature, key_of, require_constant


class Constant(nn.Module):
    """Refuses any other value of an argument that the capture baked in."""

    _is_impure = True  # nothing reads its result, yet it must run

    def __init__(self, name: str, value: Any):
        super().__init__()
        self.name, self.value = name, value

    def forward(self, found: Any) -> None:
        require_constant(self.name, self.value, found)


def with_arguments(graph: fx.Graph, root: nn.Module, signature: Signature) -> fx.Graph:
    """The graph with the arguments of the user's ``forward``; constants given by keyword may be left out.

    A graph that takes one tensor for each argument is returned as it is.
    """
    if all(len(a.leaves) == 1 and _bare(a) and a.tensors for a in signature.arguments):
        return graph
    new = fx.Graph()
    optional = [a for a in signature.arguments if a.keyword and _bare(a) and not a.tensors]
    required = [a for a in signature.arguments if a not in optional]
    given = {argument.name: new.placeholder(argument.name) for argument in required}
    for a in optional:  # behind all others, since Python wants defaults last
        given[a.name] = new.placeholder(a.name, default_value=a.leaves[0].value)
    tensors = {
        str(leaf.name): value
        for argument in signature.arguments
        for leaf, value in _unpacked(new, root, argument, given[argument.name])
    }
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = tensors[str(node.target)] if node.op == "placeholder" else new.node_copy(node, mapping.get)
    return new


def _bare(argument: Argument) -> bool:
    """Whether the argument is a leaf itself."""
    return len(argument.leaves) == 1 and not argument.leaves[0].path


def _unpacked(graph: fx.Graph, root: nn.Module, argument: Argument, node: fx.Node) -> list[tuple[Leaf, fx.Node]]:
    """The tensors inside an argument; each constant gets its check."""
    leaves = []
    for leaf in argument.leaves:
        value = node
        for step in leaf.path:
            getter = getattr if isinstance(step, pytree.GetAttrKey) else operator.getitem  # a named tuple's field
            value = graph.call_function(getter, (value, key_of(step)))
        if leaf.name is not None:
            leaves.append((leaf, value))
        else:
            name = f"{argument.name}_{len(root._modules)}"
            root.add_module(name, Constant(argument.name, leaf.value))
            graph.call_module(name, (value,))
    return leaves
