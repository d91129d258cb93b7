"""DuplicateBranches: Preserve-First Merging (*Vanishing Feature* §5.4).

The first l layers are kept for each edge under ``branches.i.<fqn>``; every value that crosses the cut is joined as
Σ αᵢ vᵢ; the rest stays one network that Interpolate merges. Edges must be aligned first: their permutations are then
folded into the branches' last layers, and the join is a plain weighted sum. Inside a residual stage the stream crosses
the cut as well as the branch, and both are joined. Linear maps (ZipIt!, CCA, optimal transport) stand on the join edge:
in the layer that ends the branch if nothing else reads it, else as a matrix of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from vfx.alphas import edge_weights
from vfx.analyse.layers import Join, number_layers
from vfx.arguments import checked
from vfx.errors import PassError
from vfx.operators import arguments, operator_of
from vfx.program import Program, Value, copy_node
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.copies import Duplicator, weighted_sum


class DuplicateBranches(Pass[None]):
    """Keep the first ``preserve`` layers (a number, or up to and including a module) of each edge.

    ``join="preactivation"`` averages conv and linear outputs before norm and activation, ``"activation"`` after them.
    """

    needs = (number_layers,)
    weight_sets = "several"
    carries_maps = True

    @checked
    def __init__(
        self, preserve: int | str, weights: float | Sequence[float] | None = None, join: Join = "preactivation"
    ):
        self.preserve, self.weights, self.join = preserve, weights, join

    def requires(self, program: Program) -> None:
        if program.private:
            raise PassError("DuplicateBranches acts once, on edges that share one graph; run it before DuplicateHeads")

    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        layers = number_layers(program)
        cut = layers.cut(self.preserve, self.join)
        if not cut.branch:
            return PassResult(program)
        note = f"DuplicateBranches({layers.number(self.preserve)}/{len(layers)}, {self.join})"
        return _Branches(program, cut, alphas).result(note)


class _Branches(Duplicator):
    """The branch repeated for each edge; ``folded`` are maps of the layer that ends it: y = T (W x + b)."""

    root, single = "branches", "branch"

    def build(self) -> None:
        for node in self.program.graph.nodes:
            if node not in self.cut.branch:
                self.rest[node] = copy_node(self.graph, node, self.rest)
                continue
            copies = [self.copy(node, edge) for edge in range(len(self.alphas))]
            if node in self.cut.joins:
                self.rest[node] = self._join(node, copies)

    def _join(self, node: fx.Node, copies: list[fx.Node]) -> fx.Node:
        """Σ αᵢ vᵢ; what is not a floating or complex tensor (a size) is the same in every branch."""
        value = node.meta.get("val")
        if not isinstance(value, Value) or not (value.dtype.is_floating_point or value.dtype.is_complex):
            return copies[0]
        copies = [self._transported(node, copy, edge) for edge, copy in enumerate(copies)]
        total = weighted_sum(self.graph, copies, self.alphas, value)
        total.name = node.name
        return total

    def _transported(self, node: fx.Node, copy: fx.Node, edge: int) -> fx.Node:
        """A branch's value in the common space, axis by axis."""
        transport = self.program.transport
        for dim in range(len(node.meta["val"].shape)) if transport is not None else ():
            matrix = transport.on(edge, node, dim)
            if matrix is None:
                continue
            parameters = self._last_parameters(node)
            if parameters:
                self.folded |= {self.prefixes[edge] + name: (0, matrix) for name in parameters}
                continue
            copy = self.mapped(node, copy, edge, dim, matrix)
        return copy

    def _last_parameters(self, node: fx.Node) -> list[str]:
        """Weight and bias of the layer that ends the branch, if nothing else there reads them or its output."""
        entry = operator_of(node)
        if not entry.is_layer or entry.is_transposed or any(user in self.cut.branch for user in node.users):
            return []
        values = arguments(node)
        parameters = [values[name] for name in ("weight", "bias") if values[name] is not None]
        if values.get("groups", 1) != 1 or not all(p.op == "get_attr" and self._read_once(p) for p in parameters):
            return []
        return [str(parameter.target) for parameter in parameters]

    def _read_once(self, parameter: fx.Node) -> bool:
        nodes = [n for n in self.program.graph.nodes if n.op == "get_attr" and n.target == parameter.target]
        return sum(user in self.cut.branch for n in nodes for user in n.users) == 1
