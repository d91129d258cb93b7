"""UntieWeights: layers that read one tensor get one each.

A tensor that both writes a feature and reads one (token embeddings that are the classifier too) admits no gain to be
folded into it and no map but the same for both. The first reader keeps the tensor; every further layer gets a copy,
under its own name in the user's model where it has one. The result is no longer of the user's class.
"""

from __future__ import annotations

from torch import fx

from vfx.arguments import checked
from vfx.operators import is_layer, layer_arguments, operator_of, weight_name
from vfx.program import Program, copy_graph
from vfx.rewrite import Pass, PassResult


class UntieWeights(Pass[None]):
    """Give every layer weights that no other layer reads; calls of one layer go on sharing theirs."""

    preserves_function = True

    @checked
    def __init__(self, verify: bool = True):
        self.verify = verify

    def apply(self, program: Program) -> PassResult[None]:
        graph, _ = copy_graph(program.graph)
        sets = [dict(weights) for weights in program.weights]
        owners: dict[str, str] = {}
        copies: dict[tuple[str, str], str] = {}
        for node in list(graph.nodes):
            reads = is_layer(node) or operator_of(node).ties == "embedding"
            for name in ("weight", "bias") if reads else ():
                value = layer_arguments(node).get(name)
                fqn = weight_name(node, name)
                if not isinstance(value, fx.Node) or fqn is None or not program.is_parameter(fqn):
                    continue
                layer = str(node.meta.get("module") or node.name)
                if owners.setdefault(fqn, layer) == layer:
                    continue
                new = copies.get((fqn, layer)) or _name(program, fqn, layer, name, set(sets[0]))
                copies[fqn, layer] = new
                for weights in sets:
                    weights.setdefault(new, weights[fqn])
                _redirect(graph, node, value, new)
        return PassResult(program.rewritten(graph, sets, f"UntieWeights({len(copies)} tensors)"))


def _name(program: Program, fqn: str, layer: str, parameter: str, taken: set[str]) -> str:
    """The tensor's name in the layer that reads it: an alias of the user's model, or a free one."""
    aliases = [alias for alias, name in program.aliases.items() if name == fqn and alias.rpartition(".")[0] == layer]
    wanted = aliases[0] if aliases else f"{layer}.{parameter}"
    names = (wanted, *(f"{wanted}_{index}" for index in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _redirect(graph: fx.Graph, node: fx.Node, value: fx.Node, name: str) -> None:
    with graph.inserting_before(node):
        reader = graph.create_node("get_attr", name)
    reader.meta = dict(value.meta)
    node.replace_input_with(value, reader)
