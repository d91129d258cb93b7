"""FoldGain: gains go into the layers next to them, and with them the shift of a LayerNorm.

W (γ ⊙ z + β) + b = (W γ) z + (W β + b): the columns of every layer that reads a norm are scaled, its bias takes the
shift up. The other way round a layer scale γ ⊙ (W h + b) goes back into the rows that write it. A gain folds where
the symmetry classes leave it free (``vfx.analyse.folding``), so that a change is undone by weights that nobody else
reads; nothing is divided, so gains may be zero or negative. What does not fold stays, with the reason in the
Program's notes. A residual stream whose norms have no gains admits orthogonal maps (SliceGPT, Ashkboos et al. 2024,
§3).

Weights keep their names and shapes: with gains of one and shifts of zero they compute the same in the user's own
class (``RestoreStructure``), unless a layer that had no bias was given one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from vfx.analyse.folding import Folding, GainShare, Refused
from vfx.analyse.gains import Gain, gains
from vfx.analyse.shift import shift_readers
from vfx.analyse.symmetry import symmetry
from vfx.arguments import checked
from vfx.operators import arguments, layer_arguments, weight_name
from vfx.program import Program, copy_graph, readers_of
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.biases import add_bias
from vfx.rewrite.nodes import call

Sets = list[dict[str, Tensor]]


class FoldGain(Pass[None]):
    """Fold the gains and shifts of LayerNorms and RMSNorms, and layer scales, in every weight set.

    ``biases``: give a bias to layers that need one for a shift; without it such a norm stays as it is.
    """

    needs = (symmetry,)
    preserves_function = True
    changes_values = True

    @checked
    def __init__(self, biases: bool = True, verify: bool = True):
        self.biases, self.verify = biases, verify

    def apply(self, program: Program) -> PassResult[None]:
        run = _Run(program, self.biases)
        count = run.count
        while run.waiting:
            run = _Run(run.program(), self.biases)
            count += run.count
        result = run.program()
        folded = program.with_graph(result.graph, result.weights, f"FoldGain({count} gains)")
        return PassResult(folded.with_notes(run.notes))


class _Run:
    """One sweep over the gains of a Program; a gain whose takers another has changed waits for the next."""

    def __init__(self, program: Program, biases: bool):
        self.source, self.biases = program, biases
        found_gains = list(gains(program))
        self.folding = Folding(symmetry(program), found_gains)
        self.graph, self._mapping = copy_graph(program.graph)
        self.sets: Sets = [dict(weights) for weights in program.weights]
        self.notes: list[str] = []
        self.count = 0
        self.waiting = False
        self._changed: set[str] = set()  # gains that went, and weights of layers that were given a bias
        for gain in found_gains:
            reason = self._fold(gain)
            if reason:
                self.notes.append(f"gain of {gain.node.name} not folded: {reason}")

    def program(self) -> Program:
        return self.source.rewritten(self.graph, self.sets, "FoldGain")

    def _fold(self, gain: Gain) -> str:
        """Fold one gain; why it stays, or nothing."""
        if gain.weight is None:
            return "it has a shift alone"
        readers = readers_of(self.graph)
        shared = [name for name in (gain.weight, gain.bias) if name is not None and len(readers[name]) > 1]
        if shared:
            return f"{shared[0]} is used by {', '.join(node.name for node in readers[shared[0]])}"
        try:
            shares = self.folding.shares(gain)
        except Refused as reason:
            return str(reason)
        if self._changed & {share.fqn for share in shares}:
            self.waiting = True
            return "another gain was folded before"
        refusal = self._fold_shift(gain, shares)
        if refusal:
            return refusal
        for weights in self.sets:
            factor = gain.offset + weights[gain.weight].double().reshape(-1)
            for share in shares:
                weights[share.fqn] = _scaled(weights[share.fqn], share, factor)
        self._remove(gain)
        self._changed.add(gain.weight)
        self.count += 1
        return ""

    # shifts -------------------------------------------------------------------------------------------------------

    def _fold_shift(self, gain: Gain, shares: Sequence[GainShare]) -> str:
        """Add W β to the biases of all readers, in every weight set; why that cannot be, or nothing."""
        if gain.bias is None or not any(weights[gain.bias].any() for weights in self.sets):
            return ""
        readers = shift_readers(self._mapping[gain.node])
        if isinstance(readers, str):
            return readers
        columns = {name: [share for share in shares if share.fqn == name] for name in {s.fqn for s in shares}}
        reason = next((r for r in (self._refuses(node, readers, columns) for node in readers) if r), "")
        if reason:
            return reason
        done: set[str] = set()
        for node in readers:
            weight = str(weight_name(node))
            if weight not in done:
                self._shift(node, weight, columns[weight], gain.bias)
            done.add(weight)
        return ""

    def _refuses(self, node: fx.Node, readers: Sequence[fx.Node], columns: Mapping[str, Sequence[GainShare]]) -> str:
        """Why a layer cannot take a shift into its bias, or nothing."""
        weight, bias = str(weight_name(node)), weight_name(node, "bias")
        if weight not in columns:
            return f"{node.name} reads it with a weight that is computed"
        if len({share.dim for share in columns[weight]}) > 1:
            return f"{weight} holds its channels on several axes"
        for name in (weight, bias):
            strangers = [r for r in readers_of(self.graph)[name] if r not in readers] if name else []
            if strangers:
                return f"{name} is used by {strangers[0].name}"
        twins = [
            r for r in readers if weight_name(r) == weight or (bias is not None and weight_name(r, "bias") == bias)
        ]
        if len({(weight_name(r), weight_name(r, "bias")) for r in twins}) > 1 or (len(twins) > 1 and bias is None):
            return f"{weight} and {bias} are shared among layers"
        if bias is None and (not self.biases or layer_arguments(node)["bias"] is not None):
            return f"{node.name} has no bias for the norm's shift"
        return ""

    def _shift(self, node: fx.Node, weight: str, shares: Sequence[GainShare], shift: str) -> None:
        name, added, dim = weight_name(node, "bias"), [], shares[0].dim
        for weights in self.sets:
            tensor = weights[weight].double()
            column = torch.zeros(tensor.shape[dim], dtype=torch.float64, device=tensor.device)
            value = weights[shift].double().reshape(-1)
            for share in shares:
                column[torch.from_numpy(share.where)] = value[torch.from_numpy(share.source)]
            moved = torch.tensordot(tensor, column, ([dim], [0])).flatten(1).sum(1) if tensor.ndim > 2 else None
            added.append(tensor.movedim(dim, -1) @ column if moved is None else moved)
        if name is None:
            self._changed.add(weight)
            new = add_bias(self.graph, node, self.sets, added)
            if new is not node:
                node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        else:
            for weights, extra in zip(self.sets, added):
                weights[name] = (weights[name].double() + extra).to(weights[name].dtype)

    def _remove(self, gain: Gain) -> None:
        node = self._mapping[gain.node]
        if gain.norm:
            values = arguments(node) | {"weight": None} | ({"bias": None} if "bias" in arguments(node) else {})
            node.args, node.kwargs = tuple(values.values()), {}
            return
        value = self._mapping[gain.value]
        old_value, wanted = value.meta["val"], node.meta["val"]
        if old_value.dtype != wanted.dtype:
            with self.graph.inserting_before(node):
                value = call(self.graph, torch.ops.aten.to.dtype, (value, wanted.dtype), wanted)
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        self._mapping[gain.node] = value  # what another gain may multiply


def _scaled(tensor: Tensor, share: GainShare, factor: Tensor) -> Tensor:
    """Some positions of one axis of a tensor multiplied by entries of a gain."""
    scale = torch.ones(tensor.shape[share.dim], dtype=torch.float64, device=tensor.device)
    scale[torch.from_numpy(share.where)] = factor[torch.from_numpy(share.source)].to(scale)
    shape = [1] * tensor.ndim
    shape[share.dim] = -1
    return (tensor.double() * scale.reshape(shape)).to(tensor.dtype)
