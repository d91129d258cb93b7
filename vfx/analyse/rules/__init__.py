"""The rules of how operators tie axes, by the kinds that the registry has (``Operator.ties``).

An operator whose kind is UNKNOWN has no rule: its axes are pinned and reported. Sizes and numbers read out of tensors
have none either, since no axis is part of them.
"""

from __future__ import annotations

from torch import fx

from vfx.analyse.rules import (
    contraction,
    einsum,
    elementwise,
    indexing,
    movement,
    normalization,
    positions,
    recurrent,
    routing,
    windows,
    writes,
)
from vfx.analyse.rules.rule import Rule
from vfx.operators import operator_of

RULES: dict[str, Rule] = {
    # products
    "convolution": contraction.convolution,
    "transposed convolution": contraction.transposed_convolution,
    "linear": contraction.linear,
    "product": contraction.matmul,
    "product and sum": contraction.addmm,
    "embedding": contraction.embedding,
    "attention": contraction.attention,
    "fused attention": contraction.fused_attention,
    "einsum": einsum.einsum,
    "bilinear": einsum.bilinear,
    "tensordot": einsum.tensordot,
    "dot": einsum.dot,
    "outer": einsum.outer,
    "distances": einsum.distances,
    "products and sum": einsum.products_sum,
    "grouped product": routing.grouped_product,
    "recurrent layers": recurrent.layers,
    "recurrent cell": recurrent.cell,
    # norms
    "per channel": normalization.per_channel,
    "layer norm": normalization.layer_norm,
    "group norm": normalization.group_norm,
    "weight norm": normalization.weight_norm,
    "prelu": normalization.prelu,
    "softmax": normalization.softmax,
    # entry by entry, reductions, windows
    "elementwise": elementwise.pointwise,
    "same": elementwise.same,
    "fill": elementwise.fill,
    "ordered": elementwise.ordered,
    "ordered like": elementwise.ordered_like,
    "reduction": elementwise.reduction,
    "scan": elementwise.scan,
    "gated linear": elementwise.gated_linear,
    "windows": elementwise.cross_channel_window,
    "unfolded": windows.windows,
    "columns": windows.columns,
    "image": windows.image,
    "sampled": windows.sampled,
    # movement
    "view": movement.view,
    "permute": movement.permute,
    "transpose": movement.transpose,
    "reverse axes": movement.reverse_axes,
    "transpose matrices": movement.transpose_matrices,
    "move axis": movement.move_axis,
    "unsqueeze": movement.unsqueeze,
    "squeeze": movement.squeeze,
    "expand": movement.expand,
    "broadcast tensors": movement.broadcast_tensors,
    "meshgrid": movement.meshgrid,
    "repeat": movement.repeat,
    "repeat interleave": movement.repeat_interleave,
    "slice": movement.slice_,
    "narrow": movement.narrow,
    "select": movement.select,
    "split": movement.split,
    "unbind": movement.unbind,
    "concatenate": movement.concatenate,
    "stack columns": movement.stack_columns,
    "stack rows": movement.stack_rows,
    "stack": movement.stack,
    "pad": movement.pad,
    "roll": movement.roll,
    "flip": movement.flip,
    "index": movement.gather_constant,
    "channel shuffle": movement.channel_shuffle,
    "pixel shuffle": movement.pixel_shuffle,
    "pixel unshuffle": movement.pixel_unshuffle,
    # positions read and written
    "gather": indexing.gather,
    "take": indexing.take,
    "scatter": indexing.scatter,
    "index put": indexing.index_put,
    "write at": indexing.write_at,
    "embedding bag": indexing.embedding_bag,
    "masked scatter": indexing.masked_scatter,
    "data dependent": indexing.data_dependent,
    "buckets": indexing.buckets,
    "one hot": indexing.one_hot,
    "histogram": routing.histogram,
    "copy": writes.copy,
    "slice scatter": writes.slice_scatter,
    "select scatter": writes.select_scatter,
    # orders and diagonals
    "triangle": positions.triangle,
    "diagonal": positions.diagonal,
    "on diagonal": positions.on_diagonal,
    "sorted": positions.sorted_values,
    "differences": positions.differences,
    "cross product": positions.cross_product,
    "similarity": positions.similarity,
    "complex pairs": positions.complex_pairs,
    "real pairs": positions.real_pairs,
}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call; None where no axis is part of its result, or where the registry does not know it."""
    return RULES.get(operator_of(node).ties)
