"""CenterStream: LayerNorm becomes RMSNorm by centring all that writes its input.

LN(x) = RMS(x − mean x). Centring P = I − 11ᵀ/n is linear, so if every value that is added up to x is centred, x is:
each layer's rows W ← P W and bias b ← P b, token and position tables, class tokens (SliceGPT, Ashkboos et al. 2024,
§3.1). Legal for a stream that is read through LayerNorms alone (``vfx.freedom`` with dense maps finds the writers and
any reader that sees the mean); other streams stay, with a note that names the reader. Layers that read such a norm's
output without gain see centred values only: their columns W ← W P lose nothing, and every matrix then lives in the
space orthogonal to the ones, where orthogonal maps leave the ones alone. The LayerNorms of the user's own class
compute the same on a centred stream (``RestoreStructure``). Dropout on the stream is the exception: in training mode
it is no longer centred.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from vfx.analyse.symmetry import symmetry
from vfx.freedom import Freedom, MapKind, Member, Normed
from vfx.operators import arguments, operator
from vfx.program import Program, copy_graph
from vfx.rewrite import Pass


class CenterStream(Pass):
    """Centre what LayerNorms read and make them RMSNorms, in every weight set.

    ``readers``: centre the columns of the layers that read those norms, too.
    """

    preserves_function = True
    changes_values = True

    def __init__(self, readers: bool = True, verify: bool = True):
        self.readers, self.verify = readers, verify

    def apply(self, program: Program) -> Program:
        freedom = Freedom(symmetry(program), MapKind.DENSE)
        streams = _Streams(freedom)
        graph, mapping = copy_graph(program.graph)
        for node in streams.centred:
            _replace(graph, mapping[node])
        members = streams.writers + (streams.readers if self.readers else [])
        sets = [dict(weights) for weights in program.weights]
        for weights in sets:
            for member in members:
                weights[member.fqn] = _centred(weights[member.fqn], member)
        graph.lint()
        note = f"CenterStream({len(streams.centred)} norms)"
        return replace(program.with_graph(graph, sets, note), notes=(*program.notes, *streams.notes))


class _Streams:
    """The streams that can be centred: their LayerNorms, what writes them, and who reads the norms."""

    def __init__(self, freedom: Freedom):
        self.freedom = freedom
        self.centred: list[fx.Node] = []
        self.writers: list[Member] = []
        self.readers: list[Member] = []
        self._left: dict[str, list[str]] = {}
        streams: dict[Hashable, list[Normed]] = {}
        found = {norm.node for norm in freedom.norms}
        for norm in freedom.norms:
            form = freedom.equations.resolve(norm.form)
            if len(form) == 1:
                streams.setdefault(next(iter(form)), []).append(norm)
            else:
                self._leave([norm.node], str(freedom.equations.reason(norm.form) or "several streams are multiplied"))
        for variable, norms in streams.items():
            self._add(variable, norms)
        for node in freedom.symmetry.program.graph.nodes:
            if operator(node) == "aten.layer_norm" and node not in found:
                self._leave([node], "the axis that it normalises is not one free group of channels")
        self._outputs()

    def _leave(self, norms: Iterable[fx.Node], reason: str) -> None:
        self._left.setdefault(reason, []).extend(node.name for node in norms)

    @property
    def notes(self) -> list[str]:
        """What stays, and why."""
        return [f"LayerNorms that stay: {', '.join(names)}: {reason}" for reason, names in self._left.items()]

    def _add(self, variable: Hashable, norms: list[Normed]) -> None:
        members = self.freedom.variables.get(variable, [])
        sign = self.freedom.equations.resolve(norms[0].form)[variable]
        against = [member for member in members if member.exponent != sign]
        if against:
            readers = _users(self.freedom.symmetry.program, against[0].fqn)
            self._leave(
                [norm.node for norm in norms], f"{', '.join(readers)} ({against[0].fqn}) reads the mean of its input"
            )
            return
        self.centred += [norm.node for norm in norms]
        self.writers += members

    def _outputs(self) -> None:
        """Layers that read norms without gain, and nothing that is written by other layers."""
        for node in self.centred:
            last = self.freedom.rank(node) - 1
            for dim, _, form in self.freedom.carried(node):
                found = self.freedom.equations.resolve(form) if dim == last else {}
                for variable, sign in found.items():
                    members = self.freedom.variables.get(variable, [])
                    if len(found) == 1 and all(m.exponent == -sign for m in members):
                        self.readers += [m for m in members if m not in self.readers]


def _users(program: Program, fqn: str) -> list[str]:
    return [
        user.name for node in program.graph.nodes if node.op == "get_attr" and node.target == fqn for user in node.users
    ]


def _centred(tensor: Tensor, member: Member) -> Tensor:
    """The mean over the channels taken off along one axis, for each copy of them."""
    rows = tensor.double().movedim(member.dim, 0).clone()
    for copy in torch.from_numpy(member.position).T.to(tensor.device):
        rows[copy] -= rows[copy].mean(0, keepdim=True)
    return rows.movedim(0, member.dim).to(tensor.dtype).contiguous()


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
