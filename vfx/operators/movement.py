"""Values that stay as they are and go elsewhere: views, turns, cuts, joins, shuffles."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, each

_moved = partial(each, space="nothing", moves=True)
_view = partial(_moved, classes="viewed", cost="view", ties="view")
_turn = partial(_moved, classes="turned", resize=OPERANDS, cost="view")
_cut = partial(_moved, classes="moved", cost="view")
_spread = partial(_moved, classes="spread", cost="view", ties="expand")
_joined = partial(_moved, resize=OPERANDS, cost="free")
_padded = partial(_moved, ties="pad", cost="free")
_permuted = partial(_moved, classes="moved", cost="free")

OPERATORS = (
    # views
    *_view("view reshape _unsafe_view", resize="view", hands_on=True),
    *_view("flatten", resize=OPERANDS, hands_on=True),
    *_view("unflatten", resize="unflatten", hands_on=True),
    *_view("view_as reshape_as", resize=OPERANDS),
    *_moved("ravel", ties="view", classes="viewed", resize=OPERANDS, cost="free"),
    # turns
    *_turn("permute", ties="permute", keeps_parts=True, hands_on=True),
    *_turn("transpose/swapaxes/swapdims", ties="transpose", keeps_parts=True, hands_on=True),
    *_turn("t", ties="reverse axes", hands_on=True),
    *_turn("numpy_T", ties="reverse axes"),
    *_turn("mT", ties="transpose matrices"),
    *_moved("mH/adjoint", ties="transpose matrices", classes="turned", resize=OPERANDS, cost="free"),
    *_turn("movedim/moveaxis", ties="move axis"),
    # axes of size one, and broadcasting
    *_cut("unsqueeze", ties="unsqueeze", resize=OPERANDS, keeps_parts=True, hands_on=True),
    *_cut("squeeze", ties="squeeze", resize="squeeze", hands_on=True),
    *_cut("atleast_1d", ties="at least", resize=OPERANDS, rank=1, may_return_input=True),
    *_cut("atleast_2d", ties="at least", resize=OPERANDS, rank=2, may_return_input=True),
    *_cut("atleast_3d", ties="at least", resize=OPERANDS, rank=3, may_return_input=True),
    *_spread("expand broadcast_to", resize="made"),
    *_spread("expand_as", resize=OPERANDS),
    *_joined(
        "broadcast_tensors",
        ties="broadcast tensors",
        classes="spread together",
        may_return_input=True,
        linear_time=True,
    ),
    *_joined("meshgrid", ties="meshgrid", classes=PERMUTATION, may_return_input=True, linear_time=True),
    *_permuted("repeat tile", ties="repeat", resize="repeat", linear_time=True),
    *_permuted("repeat_interleave", ties="repeat interleave", resize="repeat interleave", linear_time=True),
    # cuts
    *_cut("slice", ties="slice", resize="slice", keeps_parts=True, hands_on=True),
    *_cut("narrow", ties="narrow", resize="narrow", keeps_parts=True, hands_on=True),
    *_cut("select", ties="select", resize="select", hands_on=True),
    *_cut("split split_with_sizes chunk", ties="split", resize="split", keeps_parts=True, hands_on=True),
    *_cut("tensor_split", ties="split", resize="split", keeps_parts=True),
    *_permuted("unsafe_split unsafe_split_with_sizes unsafe_chunk", ties="split", resize="split", keeps_parts=True),
    *_cut("unbind", ties="unbind", resize="unbind", hands_on=True),
    *_cut("vsplit", ties="split rows", resize=OPERANDS),
    *_cut("hsplit", ties="split columns", resize=OPERANDS),
    *_cut("dsplit", ties="split depth", resize=OPERANDS),
    # joins
    *_joined("cat/concat/concatenate", ties="concatenate", classes="concatenated", hands_on=True, linear_time=True),
    *_joined("hstack", ties="stack columns", classes="moved"),
    *_joined("vstack/row_stack", ties="stack rows", classes="moved"),
    *_joined("stack", ties="stack", classes="stacked", linear_time=True),
    *_joined("dstack", ties="stack depth", classes="moved"),
    *_joined("column_stack", ties="stack vectors", classes="moved"),
    *_joined("block_diag", ties="block diagonal", classes=PERMUTATION),
    # padding
    *_padded("pad constant_pad_nd", classes="padded", resize="pad", hands_on=True, linear_time=True),
    *_padded("reflection_pad1d reflection_pad2d reflection_pad3d", classes="padded with copies", resize=OPERANDS),
    *_padded("replication_pad1d replication_pad2d replication_pad3d", classes="padded with copies", resize=OPERANDS),
    *_padded("_pad_circular", classes="padded with copies", resize=OPERANDS),
    # shuffles
    *_permuted("roll", ties="roll", resize="roll", hands_on=True, linear_time=True),
    *_permuted("flip", ties="flip", resize=OPERANDS, hands_on=True, linear_time=True),
    *_permuted("flipud", ties="flip rows", resize=OPERANDS),
    *_permuted("fliplr", ties="flip columns", resize=OPERANDS),
    *_permuted("rot90", ties="turn quarters", resize=OPERANDS),
    *_permuted("channel_shuffle", ties="channel shuffle", resize="shuffle", hands_on=True),
    *_permuted("native_channel_shuffle", ties="channel shuffle", resize="shuffle"),
    *_permuted("pixel_shuffle", ties="pixel shuffle", resize=OPERANDS),
    *_permuted("pixel_unshuffle", ties="pixel unshuffle", resize=OPERANDS),
    *_permuted("index index_select", ties="index", resize="index", linear_time=True),
    *_permuted("_unsafe_index", ties="index", resize="index"),
)
