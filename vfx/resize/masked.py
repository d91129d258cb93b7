"""Proof that a network with removed channels computes what the masked one computes.

The masked network has its full size, and each feature of a removed channel is exactly zero: after every node the
positions of removed channels are set to zero, so they carry nothing (an activation with f(0) ≠ 0 or the shift of a norm
would bring them back). Operators that see several positions of an axis at once - norms, softmax, means and extremes
over channels - run over those that are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from vfx.analyse.infer import BATCH
from vfx.analyse.symmetry import Index, Symmetry
from vfx.analyse.verify import in_double
from vfx.operators import arguments, operator
from vfx.program import Program, Weights
from vfx.resize.layout import Layout
from vfx.resize.weights import Kept
from vfx.rewrite import outputs_error

_OVER_CHANNELS = """
    layer_norm group_norm rms_norm native_layer_norm native_group_norm batch_norm softmax _softmax log_softmax mean var
    std var_mean std_mean amax amin max min logsumexp prod norm linalg_vector_norm median topk
"""
OVER_CHANNELS = {f"aten.{name}" for name in _OVER_CHANNELS.split()}
RECURRENT = {"aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"}


@torch.no_grad()
def masked_error(program: Program, facts: Symmetry, small: Program, layout: Layout, kept: Kept, seed: int = 0) -> float:
    """Relative output error in float64 between a smaller network (one edge) and the masked one, on random inputs."""
    full = in_double(program)
    weights = facts.permute(full.weights[0], to_slots(facts, layout, kept))
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
        for x in full.example_inputs
    ]
    wanted = Masked(full, weights, layout, facts).run(*inputs)
    return outputs_error(wanted, in_double(small)(*inputs), blind=True)


def to_slots(facts: Symmetry, layout: Layout, kept: Kept) -> dict[int, Index]:
    """The group element that brings the kept channels to the slots that stay, in order."""
    leaves = facts._inference.leaves
    alive = {group: layout.times[leaves.elements(leaf)] > 0 for leaf, group in facts._group_of_leaf.items()}
    found = {}
    for group in facts.groups:
        own = kept[group.index]
        if own.ndim == 1:
            found[group.index] = _placed(alive[group.index], own)
            continue
        assert group.parent is not None
        rows = np.repeat(np.arange(group.size)[None], group.outer, axis=0)
        for block, chosen in zip(np.flatnonzero(alive[group.parent]), own):
            rows[block] = _placed(alive[group.index], chosen)
        found[group.index] = rows
    return found


def _placed(alive: Any, chosen: Index) -> Index:
    permutation = np.empty(len(alive), np.int64)
    permutation[alive] = chosen
    permutation[~alive] = np.setdiff1d(np.arange(len(alive)), chosen)
    return permutation


class Masked(fx.Interpreter):
    """Runs an analysed graph at full size without the channels that a Layout removes."""

    def __init__(self, program: Program, weights: Weights, layout: Layout, facts: Symmetry):
        super().__init__(nn.Module(), graph=program.graph)
        self.extra_traceback = False
        self.weights, self.layout = weights, layout
        self._old = {node.name: node for node in facts.program.graph.nodes}

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        self.batch = next((x.shape[0] for x in inputs if x.ndim), 1)
        return super().run(*inputs)

    def fetch_attr(self, target: str) -> Any:
        return self.weights[target].clone()

    def run_node(self, n: fx.Node) -> Any:
        if operator(n) in OVER_CHANNELS and any(self._cut(x) for x in n.all_input_nodes):
            return self._over_kept(n)
        if operator(n) in RECURRENT:  # features go round inside: those removed stay zero with zero weights
            for source in n.all_input_nodes:
                self.env[source] = self._zeroed(self.env[source].clone(), self._shapes(source))
        value = super().run_node(n)
        return value if n.op == "get_attr" else self._zeroed(value, self._shapes(n))

    def _shapes(self, node: fx.Node) -> Any:
        return self.layout.shapes.get(self._old[node.name])

    def _shape(self, node: Any) -> Any:
        return self.layout.shape(self._old[node.name])

    def _cut(self, node: fx.Node) -> bool:
        shape = self._shape(node)
        return shape is not None and any(map(self.layout.changed, shape.axes))

    def _index(self, entry: Any) -> Tensor:
        return torch.from_numpy(self.layout.positions(entry, self.batch))

    def _zeroed(self, value: Any, shape: Any) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(shape, (list, tuple)):
            return [self._zeroed(v, s) for v, s in zip(value, shape)]
        if not isinstance(value, Tensor) or shape is None or value.dtype == torch.bool:
            return value
        whole = all(stride for stride, size in zip(value.stride(), value.shape) if size > 1)
        for dim, entry in enumerate(shape.axes):
            if self.layout.changed(entry):
                gone = torch.ones(value.shape[dim], dtype=torch.bool).index_fill_(0, self._index(entry), False)
                fill = value.index_fill_ if whole else value.index_fill  # in place: others may look at these values
                value = fill(dim, gone.nonzero().squeeze(1), 0)
        return value

    def _small(self, node: Any) -> Any:
        value, shape = self.env[node], self._shape(node)
        for dim, entry in enumerate(shape.axes if shape is not None else ()):
            if self.layout.changed(entry):
                value = value.index_select(dim, self._index(entry))
        return value

    def _over_kept(self, node: fx.Node) -> Any:
        """The operator on the kept positions, its result spread out again."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._small)
        a, x = arguments(node), self._small(node.args[0])
        if "normalized_shape" in a:
            args = (args[0], list(x.shape[x.ndim - len(a["normalized_shape"]) :]), *args[2:])
        if "num_groups" in a:
            entry = self._shape(node.args[0]).axes[1]
            args = (args[0], len((self._index(entry) // (entry.size // a["num_groups"])).unique()), *args[2:])
        small = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._spread(small, self._shapes(node))

    def _spread(self, small: Any, shape: Any) -> Any:
        if isinstance(small, (list, tuple)):
            return [self._spread(s, own) for s, own in zip(small, shape)]
        for dim, entry in enumerate(shape.axes if shape is not None else ()):
            if self.layout.changed(entry):
                sizes = [*small.shape[:dim], self._length(entry), *small.shape[dim + 1 :]]
                small = small.new_zeros(sizes).index_copy(dim, self._index(entry), small)
        return small

    def _length(self, entry: Any) -> int:
        """Old size of an axis at this batch size."""
        return entry.size if entry.size < BATCH else entry.size // BATCH * self.batch
