"""How queries and keys depend on the channels of the layers before them, probed.

Both are linear in those channels (``vfx.analyse.regions``). Channels that are one and the rest zero give a column of
the linear map for each token; all heads are probed at once, and numbers of their own tell which of them each reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.places import Index
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.regions import Region, region, sizes
from vfx.operators import arguments, is_product, layer_arguments, operator_of

TOLERANCE = 1e-10
TOKENS = 12  # at which columns are kept; the proof runs on all
CHUNK = 1 << 24  # numbers in a layer's output that are probed at a time


@dataclass(frozen=True, eq=False)
class Scores:
    """An operator that takes inner products of queries and keys, each linear in the layers of its region."""

    node: fx.Node
    queries: Region
    keys: Region

    @property
    def regions(self) -> tuple[Region, Region]:
        return self.queries, self.keys

    def sides(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (batch, heads, tokens, channels) and keys alike."""
        if operator_of(self.node).is_attention:
            if arguments(self.node).get("enable_gqa"):
                keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], -3)
        else:
            keys = keys.transpose(-1, -2)
        lead = torch.broadcast_shapes(queries.shape[1:-2], keys.shape[1:-2])
        wide = (x.expand(len(x), *lead, *x.shape[-2:]) for x in (queries, keys))
        left, right = (x.reshape(len(x), -1, *x.shape[-2:]) for x in wide)
        return left, right


def scores_of(node: fx.Node, inference: ProgramTerms) -> Scores | None:
    """What a node compares; None where it is no such operator, or constants tell no channels apart on the way."""
    if operator_of(node).is_attention:
        a = arguments(node)
        ends = a["query"], a["key"]
    elif operator_of(node).batched and not operator_of(node).adds_summand and not is_product(node):
        ends = node.args[0], node.args[1]
    else:
        return None
    sides = [region(end, inference) for end in ends if isinstance(end, fx.Node)]
    if len(sides) < 2 or any(side is None or not side.multiplies for side in sides):
        return None
    return Scores(node, *sides)  # type: ignore[arg-type]


def channel_axis(layer: fx.Node) -> int:
    """The channel axis of a layer's output."""
    if operator_of(layer).is_convolving:
        return len(sizes(layer, 1)) - len(layer_arguments(layer)["weight"].meta["val"].shape) + 1
    return len(sizes(layer, 1)) - 1


@dataclass(frozen=True)
class Linear:
    """Queries or keys (copies, heads, tokens, channels) for each copy of a layer's channels, and each head's block."""

    values: Tensor
    block: Index


def probed(scores: Scores, layers: Sequence[fx.Node], tables: Mapping[fx.Node, Index]) -> tuple[Linear, Linear] | None:
    """How queries and keys depend on the layers' channels, from channels that are one and the rest zero.

    All blocks are probed at once; then all channels together, with numbers that tell which block each head reads.
    """
    responses: tuple[list[Tensor], list[Tensor]] = [], []
    generator = torch.Generator().manual_seed(2)
    shares: list[Tensor] = []
    coded = [torch.zeros(()), torch.zeros(())]
    for layer in layers:
        table = tables[layer]
        shape = sizes(layer, 1)
        step = max(1, CHUNK // max(1, int(np.prod(shape))))
        for first in range(0, table.shape[1], step):
            for side, end in zip(responses, _response(scores, layer, table[:, first : first + step])):
                side.append(end)
        shares.append(0.5 + torch.rand(table.shape[1], generator=generator, dtype=torch.float64))
        for k, end in enumerate(_coded(scores, layer, table, shares[-1])):
            coded[k] = coded[k] + end[0]
    sides = [_linear(torch.cat(side), torch.cat(shares), code) for side, code in zip(responses, coded)]
    if sides[0] is None or sides[1] is None or (sides[0].block != sides[1].block).any():
        return None
    return sides[0], sides[1]


def _response(scores: Scores, layer: fx.Node, copies: Index) -> tuple[Tensor, Tensor]:
    """Queries and keys of (copies, …): each copy of all blocks in turn is one."""
    output = torch.zeros(sizes(layer, copies.shape[1]), dtype=torch.float64).movedim(channel_axis(layer), 1)
    for row in copies:
        output[torch.arange(len(row)), torch.from_numpy(row)] = 1.0
    return _ends(scores, layer, output.movedim(1, channel_axis(layer)))


def _coded(scores: Scores, layer: fx.Node, table: Index, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of (1, …): all copies have their share, times the number of their block from 1 on."""
    output = torch.zeros(sizes(layer, 1), dtype=torch.float64).movedim(channel_axis(layer), 1)
    for block, row in enumerate(table):
        codes = (block + 1) * shares
        output[0, torch.from_numpy(row)] = codes.reshape(-1, *[1] * (output.ndim - 2))
    return _ends(scores, layer, output.movedim(1, channel_axis(layer)))


def _ends(scores: Scores, layer: fx.Node, output: Tensor) -> tuple[Tensor, Tensor]:
    count = len(output)
    outputs = {layer: output.contiguous()}
    ends = [side.run(outputs, count)[side.end] for side in scores.regions]
    left, right = scores.sides(*(x.expand(count, *x.shape[1:]) for x in ends))
    return _few(left), _few(right)


def _few(values: Tensor) -> Tensor:
    """Some of the tokens, the first and the last among them."""
    tokens = values.shape[2]
    chosen = np.unique(np.linspace(0, tokens - 1, min(tokens, TOKENS)).round().astype(np.int64))
    return values[:, :, torch.from_numpy(chosen)].clone()


def _linear(plain: Tensor, shares: Tensor, coded: Tensor) -> Linear | None:
    """None where a head reads several blocks, or none."""
    seen = plain.abs() > TOLERANCE * plain.abs().max()
    expected = torch.einsum("c,chte->hte", shares, plain)
    blocks = []
    for wanted, got in zip(expected, coded):
        square = float(wanted.square().sum())
        block = round(float((wanted * got).sum()) / square) if square > 0 else 0
        if block < 1 or (got - block * wanted).abs().max() > TOLERANCE * block * wanted.abs().max():
            return None
        blocks.append(block - 1)
    return Linear(torch.where(seen, plain, 0.0), np.array(blocks))
