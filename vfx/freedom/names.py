"""Which ATen operators move values, cut them and put them together."""

from __future__ import annotations

from vfx.operators import DROPOUTS

_MOVED = """
    clone contiguous to _to_copy type_as dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout
    detach alias lift_fresh lift_fresh_copy positive float double half
    view reshape _unsafe_view view_as reshape_as flatten unflatten permute transpose swapaxes swapdims t numpy_T mT
    movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to ravel repeat tile repeat_interleave slice narrow
    select roll flip index index_select channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle neg
"""
_CUT = "split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk unbind"
_MEANS = {"aten.mean", *(f"aten.adaptive_avg_pool{rank}d" for rank in (1, 2, 3))}

MOVED = {f"aten.{name}" for name in _MOVED.split()}
CATS = {f"aten.{name}" for name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack")}
CUTS = {f"aten.{name}" for name in _CUT.split()}
KEPT = (MOVED - DROPOUTS - {"aten.neg", "aten.native_dropout"}) | _MEANS  # of x + β they make what they make of x, + β
