"""Which maps each operator lets pass, by the kinds that the registry has (``Operator.classes``).

Where the kind is PERMUTATION or UNKNOWN, permutations pass and no more.
"""

from __future__ import annotations

from collections.abc import Mapping

from vfx.analyse.action import contraction, moving, normalizing, pointwise
from vfx.analyse.action.walk import Handler, Walk
from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.store import Rows

HANDLERS: dict[str, Handler] = {
    # products
    "linear layer": contraction.linear,
    "product of matrices": contraction.matmul,
    "product and sum": contraction.addmm,
    "embedding": contraction.embedding,
    "convolution": contraction.convolution,
    "attention": contraction.attention,
    "fused attention": contraction.fused_attention,
    "einsum": contraction.einsum,
    "dot": contraction.dot,
    "bilinear": contraction.bilinear,
    "grouped product": contraction.grouped_product,
    # entry by entry
    "sum": pointwise.mapped,
    "lerp": pointwise.mapped,
    "linear": pointwise.mapped,
    "positive": pointwise.mapped,
    "odd": pointwise.mapped,
    "clamp": pointwise.mapped,
    "product": pointwise.multiplied_entries,
    "power": pointwise.power,
    "absolute": pointwise.absolute,
    "chosen": pointwise.chosen,
    "prelu": pointwise.prelu,
    "same": pointwise.same,
    "fill": pointwise.fill,
    # over axes
    "total": pointwise.total,
    "extreme": pointwise.extreme,
    "length": pointwise.length,
    "average windows": pointwise.average_windows,
    "extreme windows": pointwise.extreme_windows,
    # norms
    "per channel": normalizing.per_channel,
    "layer norm": normalizing.layer_norm,
    "group norm": normalizing.group_norm,
    "weight norm": normalizing.weight_norm,
    "softmax": normalizing.softmax,
    # movement
    "moved": moving.moved,
    "viewed": moving.viewed,
    "turned": moving.turned,
    "spread": moving.expanded,
    "spread together": moving.broadcast_tensors,
    "concatenated": moving.concatenated,
    "stacked": moving.stacked,
    "padded": moving.padding,
    "padded with copies": moving.copied_padding,
    "one kind": moving.one_kind,
    "sampled": moving.sampled,
    "copied": moving.copied,
    "complex pairs": moving.complex_pairs,
    "real pairs": moving.real_pairs,
}


def walked(
    terms: ProgramTerms, labels: Mapping[tuple[str, int], Rows], special: Mapping[str, Handler] | None = None
) -> Walk:
    """The slots of a network; ``special`` has handlers for single nodes, by name, that go before the kinds'."""
    return Walk(terms, labels, HANDLERS, special).run()


__all__ = ["HANDLERS", "Walk", "walked"]
