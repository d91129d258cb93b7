"""Attention as one operator: the call that models write, and the kernels that it is lowered to."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import each

_attention = partial(each, space="attention", resize="attention", cost="attention", contracts=True, reads_all=True)
_fused = partial(_attention, ties="fused attention", classes="fused attention")

OPERATORS = (
    *_attention("scaled_dot_product_attention", ties="attention", classes="attention"),
    *_fused("_scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu"),
    *_fused("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"),
    *_fused("_scaled_dot_product_cudnn_attention"),
)
