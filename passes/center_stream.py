"""CenterStream: LayerNorm becomes RMSNorm by centring all that writes its input.

LN(x) = RMS(x − mean x). Centring P = I − 11ᵀ/n is linear, so if every value that is added up to x is centred, x is:
each layer's rows W ← P W and bias b ← P b, token and position tables, class tokens (SliceGPT, Ashkboos et al. 2024,
§3.1). Legal for a stream that is read through LayerNorms alone (``vfx.analyse.centring`` finds the writers and any
reader that sees the mean); other streams stay, with a note that names the reader. Layers that read such a norm's
output without gain see centred values only: their columns W ← W P lose nothing, and every matrix then lives in the
space orthogonal to the ones, where orthogonal maps leave the ones alone. The LayerNorms of the user's own class
compute the same on a centred stream (``RestoreStructure``). Dropout on the stream is the exception: in training mode
it is no longer centred.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from vfx.analyse.centring import StreamNorms, StreamPlace
from vfx.analyse.symmetry import symmetry
from vfx.arguments import checked
from vfx.operators import arguments
from vfx.program import Program, copy_graph
from vfx.rewrite import Pass, PassResult


class CenterStream(Pass[None]):
    """Centre what LayerNorms read and make them RMSNorms, in every weight set.

    ``readers``: centre the columns of the layers that read those norms, too.
    """

    needs = (symmetry,)
    preserves_function = True
    changes_values = True

    @checked
    def __init__(self, readers: bool = True, verify: bool = True):
        self.readers, self.verify = readers, verify

    def apply(self, program: Program) -> PassResult[None]:
        streams = StreamNorms(symmetry(program))
        graph, mapping = copy_graph(program.graph)
        for node in streams.centred:
            _replace(graph, mapping[node])
        places = streams.writers + (streams.readers if self.readers else [])
        sets = [dict(weights) for weights in program.weights]
        for weights in sets:
            for place in places:
                weights[place.fqn] = _centred(weights[place.fqn], place)
        graph.lint()
        note = f"CenterStream({len(streams.centred)} norms)"
        return PassResult(program.with_graph(graph, sets, note).with_notes(_notes(streams.left)))


def _notes(left: Mapping[fx.Node, str]) -> list[str]:
    """What stays, and why."""
    by_reason: dict[str, list[str]] = {}
    for node, reason in left.items():
        by_reason.setdefault(reason, []).append(node.name)
    return [f"LayerNorms that stay: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _centred(tensor: Tensor, place: StreamPlace) -> Tensor:
    """The mean over the channels taken off along one axis, for each copy of them."""
    rows = tensor.double().movedim(place.dim, 0).clone()
    for copy in torch.from_numpy(place.position).T.to(tensor.device):
        rows[copy] -= rows[copy].mean(0, keepdim=True)
    return rows.movedim(0, place.dim).to(tensor.dtype).contiguous()


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    """layer_norm(x) -> rms_norm(x), and its bias added behind."""
    a = arguments(node)
    with graph.inserting_before(node):
        args = (a["input"], a["normalized_shape"], a["weight"], a["eps"])
        new = graph.call_function(torch.ops.aten.rms_norm.default, args)
        new.meta = dict(node.meta)
        if a["bias"] is not None:
            new = graph.call_function(torch.ops.aten.add.Tensor, (new, a["bias"]))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
