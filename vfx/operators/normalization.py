"""Norms of values and of weights."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, UNKNOWN, each

_per_channel = partial(
    each, ties="per channel", classes="per channel", space="per channel", resize=OPERANDS, reads_all=True
)
_layer_norm = partial(
    each, ties="layer norm", classes="layer norm", space="layer norm", resize="layer norm", reads_all=True
)
_group_norm = partial(
    each, ties="group norm", classes="group norm", space="group norm", resize="group norm", cost="norm", reads_all=True
)

OPERATORS = (
    *_per_channel("batch_norm", cost="norm", norm="batch", module="BatchNorm"),
    *_per_channel("_native_batch_norm_legit_no_training", cost="norm", norm="batch"),
    *_per_channel("instance_norm", cost="norm", norm="instance", module="InstanceNorm"),
    *_per_channel("native_batch_norm cudnn_batch_norm _native_batch_norm_legit", cost=UNKNOWN),
    *_layer_norm("layer_norm", cost="norm", norm="layer", module="LayerNorm"),
    *_layer_norm("native_layer_norm", cost="norm"),
    *_layer_norm("rms_norm", cost="norm", norm="rms", module="RMSNorm"),
    *_layer_norm("_fused_rms_norm", cost=UNKNOWN),
    *_group_norm("group_norm", norm="group", module="GroupNorm"),
    *_group_norm("native_group_norm"),
    *each(
        "_weight_norm _weight_norm_interface",
        ties="weight norm",
        classes="weight norm",
        space=UNKNOWN,
        resize=OPERANDS,
        cost=UNKNOWN,
    ),
)
