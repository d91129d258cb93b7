"""Proof that a network with removed channels computes what the masked one computes.

The masked network has its full size, and each feature of a removed channel is exactly zero: after every node the
positions of removed channels are set to zero, so they carry nothing (an activation with f(0) ≠ 0 or the shift of a norm
would bring them back). Operators to whom a zero is a value like any other - norms, softmax and attention, means,
extremes and orders - run over the positions that are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from vfx.analyse.meaning import ENDS, NUMBERS
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Acting, permuted
from vfx.errors import PassError, VerificationError
from vfx.on_read import OnRead
from vfx.operators import arguments, is_layer, operator_of
from vfx.program import BATCH, Program, Value, Weights, copy_graph
from vfx.proof import PRESERVED, function_error, in_double
from vfx.resize.extent import Unfit, check_extent, fewer_positions, fewer_samples, rewritten, written_sizes
from vfx.resize.layout import Layout
from vfx.resize.program import Resized
from vfx.resize.weights import Kept

FEW = 3  # readers of a weight, up to which each reads it for itself


def prove(program: Program, facts: Symmetry, small: Resized, kept: Kept, seed: int = 0) -> float:
    """``masked_error``, or VerificationError where it is above rounding."""
    error = masked_error(program, facts, small, kept, seed)
    if error <= PRESERVED:
        return error
    if not np.isfinite(error):
        raise VerificationError(
            "the smaller network's outputs are NaN or infinite where they were numbers, so nothing can be proved: too "
            "few channels are left for an operator (a deviation, a norm written by hand), or inputs like the example's "
            "are outside the network's domain; remove less, or name the layers in protect="
        )
    raise VerificationError(
        f"the smaller network differs from the masked one by {error:.1e} (relative, float64); a rule of vfx.resize "
        "must be wrong: please report the architecture"
    )


@torch.no_grad()
def masked_error(program: Program, facts: Symmetry, small: Resized, kept: Kept, seed: int = 0) -> float:
    """Relative output error in float64 between a smaller network (one edge) and the masked one (``vfx.proof``).

    Inputs are small where that proves as much (``vfx.resize.extent``).
    """
    moved = OnRead(program.weights[0], Acting(facts, permuted(to_slots(facts, small.layout, kept))))
    full = in_double(fewer_samples(program).with_weights([moved]), on_read=True)
    exact = in_double(small.program.with_weights([{**small.program.weights[0], **small.exact[0]}]), on_read=True)
    masked = MaskedRun(full, small.layout, facts)
    for cut in fewer_positions(full):
        try:
            if (error := _error(masked, exact, cut, seed)) <= PRESERVED:
                return error
        except Unfit:
            continue
        except (PassError, RuntimeError, ValueError, IndexError):  # sizes that the graph holds as numbers
            break
    return _error(masked, exact, full, seed)


def _error(masked: MaskedRun, exact: Program, examples: Program, seed: int) -> float:
    masked.is_cut, masked.sizes = examples is not masked.program, {}
    # the masked network runs first, and says which sizes its inputs have
    return function_error(examples, lambda inputs: rewritten(exact, masked.sizes)(*inputs), seed, masked.given)


def to_slots(facts: Symmetry, layout: Layout, kept: Kept) -> dict[int, Index]:
    """The group element that brings the kept channels to the slots that stay, in order."""
    leaves = facts.leaves
    alive = {group: layout.times[leaves.elements(leaf)] > 0 for leaf, group in facts.group_of.items()}
    slots = {}
    for group in facts.groups:
        indices = kept[group.index]
        if indices.ndim == 1:
            slots[group.index] = _placed(alive[group.index], indices)
            continue
        assert group.parent is not None
        rows = np.repeat(np.arange(group.size)[None], group.outer, axis=0)
        for block, chosen in zip(np.flatnonzero(alive[group.parent]), indices):
            rows[block] = _placed(alive[group.index], chosen)
        slots[group.index] = rows
    return slots


def _placed(alive: Any, chosen: Index) -> Index:
    permutation = np.empty(len(alive), np.int64)
    permutation[alive] = chosen
    permutation[~alive] = np.setdiff1d(np.arange(len(alive)), chosen)
    return permutation


class MaskedRun(fx.Interpreter):
    """Runs an analysed graph at full size without the channels that a Layout removes."""

    def __init__(self, program: Program, layout: Layout, facts: Symmetry):
        graph, name_of = _reading_late(program.graph)
        super().__init__(nn.Module(), graph=graph)
        self.extra_traceback = False
        self.program, self.layout, self.is_cut = program, layout, False
        self.weights = program.weights[0]
        self.sizes: dict[str, tuple[str, dict[int, int]]] = {}  # that the graph holds and cut inputs change
        self._old = {node: facts.program.nodes[name] for node, name in name_of.items()}

    def given(self, weights: Weights, inputs: list[Any]) -> Any:
        """What it gives with other weights."""
        self.weights = weights
        return self.run(*inputs)

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        self.batch = self.program.batch_of(inputs)
        return super().run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            tensor = self.weights[str(n.target)]
            return tensor if _stays_whole(n) else tensor.clone()
        value = self._evaluated(n)
        if self.is_cut:
            check_extent(n, value, self._lengths(n))
        return value

    def _evaluated(self, n: fx.Node) -> Any:
        if any(map(self._cut, n.all_input_nodes)):
            if _sees_zeros(n) and not self._ends(n):
                return self._over_kept(n)
            # features inside: those removed are zero with zero weights
            if operator_of(n).ties == "recurrent layers" or (_is_product(n) and not self._looks_up(n)):
                whole = {source: self.env[source] for source in n.all_input_nodes if source.op == "get_attr"}
                self.env |= {x: self._zeroed(tensor.clone(), self._shapes(x)) for x, tensor in whole.items()}
                value = self._run_here(n)
                self.env |= whole
                return value
        return self._run_here(n)

    def _looks_up(self, n: fx.Node) -> bool:
        """Whether a node reads rows of a table, all of which are kept: nothing is summed over."""
        if operator_of(n).ties != "embedding":
            return False
        shape = self._shape(arguments(n)["weight"])
        return shape is not None and not self.layout.changed(shape.axes[0])

    def _run_here(self, n: fx.Node) -> Any:
        return self._zeroed(self._run_cut(n) if self.is_cut else super().run_node(n), self._shapes(n))

    def _run_cut(self, n: fx.Node) -> Any:
        """An operator at other sizes of positions than it was captured at."""
        source = next((x for x in n.all_input_nodes if isinstance(x.meta.get("val"), Value)), None)
        if source is None or n.op != "call_function":
            return super().run_node(n)
        name, new = written_sizes(n, source.meta["val"].shape, self.env[source].shape)
        if not new:
            return super().run_node(n)
        self.sizes[n.name] = name, new
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names = [argument.name for argument in n.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, args)) | kwargs
        given[name] = [new.get(k, size) for k, size in enumerate(given[name])]
        positional = [given.pop(key) for key in names[: len(args)]]
        return n.target(*positional, **given)  # type: ignore[operator]

    def _lengths(self, node: fx.Node) -> list[tuple[int, int]]:
        """The resized dimensions of a value with their whole lengths."""
        shape = self._shape(node)
        axes = enumerate(shape.axes) if shape is not None else ()
        return [(dim, self._length(entry)) for dim, entry in axes if self.layout.changed(entry)]

    def _shapes(self, node: fx.Node) -> Any:
        return self.layout.shapes.get(self._old[node])

    def _shape(self, node: Any) -> Any:
        return self.layout.shape(self._old[node])

    def _cut(self, node: fx.Node) -> bool:
        shape = self._shape(node)
        return shape is not None and any(map(self.layout.changed, shape.axes))

    def _ends(self, node: fx.Node) -> bool:
        """Whether a value is the running total of counts, to which those removed add nothing."""
        shape = self._shapes(node)
        return getattr(getattr(shape, "meaning", None), "kind", None) == ENDS

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
        a = arguments(node)
        a |= self._sizes_over_kept(node, a)
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = fx.node.map_arg(a, self._small)
        args = [given[argument.name] for argument in schema if not argument.kwarg_only]
        kwargs = {argument.name: given[argument.name] for argument in schema if argument.kwarg_only}
        return self._spread(node.target(*args, **kwargs), self._shapes(node))  # type: ignore[operator]

    def _sizes_over_kept(self, node: fx.Node, a: dict[str, Any]) -> dict[str, Any]:
        """Arguments that count positions, or stand for what was counted over all of them."""
        if "normalized_shape" in a:
            sizes = self._small(a["input"]).shape
            return {"normalized_shape": list(sizes[len(sizes) - len(a["normalized_shape"]) :])}
        name = next((name for name in ("num_groups", "group") if name in a), None)
        if name is not None:
            entry = self._shape(a["input"]).axes[1]
            left = self._index(entry)
            counts = {name: len((left // (entry.size // a[name])).unique())}
            return counts | ({"C": len(left)} if "C" in a else {})
        if "query" in a and a.get("scale") is None:
            return {"scale": self.env[a["query"]].shape[-1] ** -0.5}
        return {}

    def _spread(self, small: Any, shape: Any) -> Any:
        if isinstance(small, (list, tuple)):
            return [self._spread(s, size) for s, size in zip(small, shape)]
        small = self._as_before(small, shape)
        for dim, entry in enumerate(shape.axes if shape is not None else ()):
            if self.layout.changed(entry):
                sizes = [*small.shape[:dim], self._length(entry), *small.shape[dim + 1 :]]
                small = small.new_zeros(sizes).index_copy(dim, self._index(entry), small)
        return small

    def _as_before(self, small: Tensor, shape: Any) -> Tensor:
        """Numbers of positions that are left, as numbers of the positions that were."""
        meaning = getattr(shape, "meaning", None)
        if meaning is None or meaning.kind != NUMBERS or not self.layout.changed(meaning.axis):
            return small
        return self._index(meaning.axis).to(small)[small]

    def _length(self, entry: Any) -> int:
        """Old size of an axis at this batch size."""
        return entry.size if entry.size < BATCH else entry.size // BATCH * self.batch


def _reading_late(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """A copy that reads each weight right before the first node that needs it, and the names of its nodes in the graph.

    Values are freed behind their last reader. Where only a few layers read a weight (an embedding tied to the head),
    each reads it for itself: it is not held in between.
    """
    late, _ = copy_graph(graph)
    name_of = {node: node.name for node in late.nodes}
    for node in [node for node in late.nodes if node.op == "get_attr" and 1 < len(node.users) <= FEW]:
        for reader in list(node.users)[1:] if _stays_whole(node) else ():
            with late.inserting_before(reader):
                again = late.node_copy(node)
            reader.replace_input_with(node, again)
            name_of[again] = name_of[node]
    place = {node: k for k, node in enumerate(late.nodes)}
    for node in [node for node in late.nodes if node.op == "get_attr" and node.users]:
        min(node.users, key=place.__getitem__).prepend(node)
    return late, name_of


def _stays_whole(weight: fx.Node) -> bool:
    """Whether no reader gives a view of a weight, so that what is zeroed in place is never a part of it."""
    return all(is_layer(x) or operator_of(x).is_norm or operator_of(x).ties == "embedding" for x in weight.users)


def _is_product(node: fx.Node) -> bool:
    """Whether an operator may sum over an axis that only parameters have; a layer's input is computed, as a rule."""
    entry = operator_of(node)
    computed = entry.is_layer and arguments(node)["input"].op != "get_attr"
    return entry.contracts and entry.is_known and not computed


def _sees_zeros(node: fx.Node) -> bool:
    """Whether positions that are zero would count in an operator's result."""
    return operator_of(node).reads_all
