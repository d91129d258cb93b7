"""Queries and keys that lost inner channels, fitted to the dense network's attention logits (CORP's closed form).

With Q', K' the heads that are left and Q, K the dense network's, each head gets the T that minimises, over all samples,

    Σ ‖Q' T K'ᵀ − Q Kᵀ‖² + λ ‖T − I‖²,    Σ (Q'ᵀQ') T (K'ᵀK') = Σ Q'ᵀQ KᵀK' at λ = 0,

a linear system of d'² unknowns. T goes into the layer that makes the queries, where its channels stand in the heads as
they are (views alone lie between); that is found out by sending the channels' numbers through the graph. Keys that a
mask hides from every query do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vfx.operators import arguments, operator_of
from vfx.program import Execution, Program
from vfx.reconstruct.references import Reference
from vfx.reconstruct.units import MatrixUnit, Use

LARGEST = 1 << 27  # elements of all heads' systems
RIDGE = 1e-4


@dataclass(frozen=True, eq=False)
class LogitUnit:
    """An attention call whose queries are to be turned: the unit of the layer that makes them, and the ``channels``
    (heads, d') of that layer which stand in each head."""

    node: fx.Node
    layer: MatrixUnit
    channels: Tensor

    @property
    def uses(self) -> tuple[Use, ...]:
        return (Use(self.node, self.node),)

    @property
    def query(self) -> fx.Node:
        return arguments(self.node)["query"]  # type: ignore[no-any-return]

    def operands(self, run: Execution) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """Queries and keys (samples, heads, tokens, d), the keys that count, and the scale, before the call runs."""
        a = arguments(next(step.node for step in run.plan if step.node.name == self.node.name))
        query, key = run.value(a["query"]).double(), run.value(a["key"]).double()
        scale, mask = a.get("scale"), a.get("attn_mask")
        keep = visible(run.value(mask)) if isinstance(mask, fx.Node) else None
        return query, key, keep, float(scale) if scale is not None else query.shape[-1] ** -0.5

    def add(
        self, total: tuple[Tensor, Tensor] | None, network: Execution, dense: Execution, reference: Reference
    ) -> tuple[Tensor, Tensor]:
        """The sums (heads, d', d', d', d') and (heads, d', d') with one batch more."""
        q, k, keep, scale = self.operands(network)
        dense_q, dense_k, _, dense_scale = self.operands(dense)
        dense_q, dense_k = (
            _heads(x, reference.carry(arguments(self.node)[role].name, 1))
            for x, role in ((dense_q, "query"), (dense_k, "key"))
        )
        k, dense_k = (_shared(x, q.shape[1]) for x in (k, dense_k))
        if keep is not None:
            k, dense_k = k * keep[..., None], dense_k * keep[..., None]
            if q.shape[2] == k.shape[2]:
                q = q * keep[..., None]
        left = torch.einsum("bhij,bhkl->hikjl", q.mT @ q, k.mT @ k)
        right = ((q.mT @ dense_q) @ (dense_k.mT @ k)).sum(0) * (dense_scale / scale)
        return (left, right) if total is None else (total[0].add_(left), total[1].add_(right))

    def solve(self, total: tuple[Tensor, Tensor], ridge: float) -> Tensor:
        """T (heads, d', d')."""
        left, right = total
        heads, size = right.shape[:2]
        system = left.reshape(heads, size * size, size * size).clone()
        strength = ridge * system.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(size, dtype=right.dtype, device=right.device).expand(heads, size, size)
        missing = right - torch.einsum("hikjl,hjl->hik", left, eye)
        system.diagonal(dim1=1, dim2=2).add_(strength[:, None].clamp_min(1e-300))
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed.any():
            return eye.clone()
        return eye + torch.cholesky_solve(missing.reshape(heads, -1, 1), factor).reshape(heads, size, size)

    def write(self, weights: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
        """The query layer's tensors with T in them."""
        matrix, bias = self.layer.read(weights)
        rows = matrix[0].clone()
        columns = self.channels.to(rows.device)
        for head, columns_of in enumerate(columns):
            rows[:, columns_of] = matrix[0][:, columns_of] @ turn[head]
        written = {
            self.layer.weight: self.layer.forms[0].weight(rows[None]).to(weights[self.layer.weight]).contiguous()
        }
        if bias is not None and self.layer.bias is not None:
            shift = bias[0].clone()
            for head, columns_of in enumerate(columns):
                shift[columns_of] = bias[0][columns_of] @ turn[head]
            written[self.layer.bias] = shift.reshape(weights[self.layer.bias].shape).to(weights[self.layer.bias])
        return written


def _heads(x: Tensor, kept: Tensor | None) -> Tensor:
    """The heads of the dense network that are left."""
    return x if kept is None else x.index_select(1, kept.to(x.device))


def _shared(keys: Tensor, heads: int) -> Tensor:
    """Keys as the queries see them: several heads may share one (grouped queries)."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], 1)


def visible(mask: Tensor) -> Tensor:
    """Keys (samples, heads or 1, tokens) that some query sees, 1.0 or 0.0."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(-2).double()


@torch.no_grad()
def logit_units(program: Program, layers: list[MatrixUnit], dense: Program) -> list[LogitUnit]:
    """The attention calls whose heads lost inner channels of those that they had in the ``dense`` network."""
    logit_layers = []
    for node in program.graph.nodes:
        if operator_of(node).ties != "attention":
            continue
        query = arguments(node)["query"]
        value = query.meta["val"]
        whole = dense.nodes[query.name].meta["val"] if query.name in dense.nodes else value
        if len(value.shape) != 4 or whole.shape[3] == value.shape[3]:
            continue
        heads, size = value.shape[1], value.shape[3]
        if not isinstance(heads, int) or heads * size**4 > LARGEST:
            continue
        for layer in layers:
            simple = len(layer.uses) == 1 and layer.norm is None and layer.uses[0].other is None
            channels = _channels(program, layer, query) if simple and _feeds(layer.uses[0].node, query) else None
            if channels is not None:
                logit_layers.append(LogitUnit(node, layer, channels))
    return logit_layers


def _feeds(layer: fx.Node, node: fx.Node) -> bool:
    """Whether a value comes from a layer through calls with one computed operand."""
    while node is not layer:
        sources = [a for a in node.all_input_nodes if a.op == "call_function" and hasattr(a.meta.get("val"), "shape")]
        if len(sources) != 1:
            return False
        node = sources[0]
    return True


def _channels(program: Program, layer: MatrixUnit, query: fx.Node) -> Tensor | None:
    """The layer's channel at each (head, channel) of the queries; None where they do not stand there as they are."""
    run = Execution(program.graph, program.weights[0], list(program.example_inputs))
    run.plan = [step._replace(in_place=None) for step in run.plan]
    while run.position < len(run.plan):
        node, value = run.step()
        if node is layer.uses[0].node:
            numbers = torch.arange(value.shape[-1], dtype=value.dtype, device=value.device)
            run.values[node] = numbers.expand(value.shape).clone()
        if node is query:
            break
    queries = run.value(query)
    heads = queries[:1, :, :1]
    if not torch.equal(queries, heads.expand_as(queries)):
        return None
    channels = heads[0, :, 0].round().long()
    whole = torch.equal(channels.reshape(-1).sort().values.cpu(), torch.arange(channels.numel()))
    return channels.cpu() if whole and torch.equal(heads[0, :, 0], channels.to(queries)) else None
