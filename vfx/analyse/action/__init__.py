"""Which maps each operator lets pass, by the rule function of its line in the operator table.

A rule function without a line here lets permutations pass and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfx.analyse.action import contraction, moving, normalizing, pointwise
from vfx.analyse.action.walk import Handler, Walk
from vfx.analyse.rules import contraction as contractions
from vfx.analyse.rules import einsum as products
from vfx.analyse.rules import elementwise, normalization, routing

HANDLERS: dict[Callable[..., Any], Handler] = {
    contractions.linear: contraction.linear,
    contractions.matmul: contraction.matmul,
    contractions.addmm: contraction.addmm,
    contractions.embedding: contraction.embedding,
    contractions.convolution: contraction.convolution,
    contractions.transposed_convolution: contraction.convolution,
    contractions.attention: contraction.attention,
    contractions.fused_attention: contraction.fused_attention,
    products.einsum: contraction.einsum,
    products.dot: contraction.dot,
    products.bilinear: contraction.bilinear,
    routing.grouped_product: contraction.grouped_product,
    elementwise.pointwise: pointwise.pointwise,
    elementwise.same: pointwise.same,
    elementwise.fill: pointwise.fill,
    elementwise.reduction: pointwise.reduction,
    elementwise.cross_channel_window: pointwise.windows,
    normalization.per_channel: normalizing.per_channel,
    normalization.layer_norm: normalizing.layer_norm,
    normalization.group_norm: normalizing.group_norm,
    normalization.weight_norm: normalizing.weight_norm,
    normalization.softmax: normalizing.softmax,
    normalization.prelu: pointwise.prelu,
    **moving.MOVING,
}

__all__ = ["HANDLERS", "Walk"]
