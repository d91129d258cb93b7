"""The table of ``Freedom``: which rule passes maps of channels on through each ATen operator.

A rule reads the forms of the operands and sets those of the result. It must account for every form it reads: pass it
on, equate it or fix it. It returns False where it does not cover a call; everything it reads is then fixed.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from vfx.freedom import layers, values
from vfx.freedom.names import CATS, CUTS, MOVED
from vfx.operators import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED

if TYPE_CHECKING:
    from vfx.freedom.infer import Freedom

Rule = Callable[["Freedom", fx.Node, dict[str, Any]], bool]

_AVERAGED = """
    mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
"""
_EXTREME = "amax amin max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
_HOMOGENEOUS = "relu leaky_relu prelu abs maximum minimum"
_UNIFORM = """
    zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
    arange rand_like randn_like sym_size
"""


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = {}
    for rule, names in (
        (values.averaged, _AVERAGED),
        (values.extreme, _EXTREME),
        (values.homogeneous, _HOMOGENEOUS),
        (values.uniform, _UNIFORM),
        (values.added, "add sub rsub"),
        (values.multiplied, "mul div"),
        (values.padded, "pad constant_pad_nd"),
        (values.clamped, "clamp clamp_min clamp_max"),
        (layers.linear, "linear"),
        (layers.matmul, "matmul mm bmm"),
        (layers.addmm, "addmm"),
        (layers.attention, "scaled_dot_product_attention"),
        (layers.embedding, "embedding"),
        (layers.layer_norm, "layer_norm rms_norm"),
    ):
        table |= {f"aten.{name}": rule for name in names.split()}
    table |= dict.fromkeys(MOVED | CATS, values.moved) | dict.fromkeys(CUTS, values.parts)
    table |= dict.fromkeys(CONVOLUTIONS | TRANSPOSED, layers.convolution) | dict.fromkeys(
        BATCH_NORMS, layers.batch_norm
    )
    table[python_operator.getitem.__name__] = values.item
    return table


TABLE = _table()
