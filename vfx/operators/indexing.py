"""Reading and writing at positions that are computed, and writing into a part."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_at = partial(each, classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="free")
_into = partial(each, classes=PERMUTATION, space="nothing", cost="free", linear_time=True)

OPERATORS = (
    *_at("gather", ties="gather", linear_time=True),
    *_at("take_along_dim", ties="gather"),
    *_at("take", ties="take"),
    *_at("scatter", ties="scatter", linear_time=True),
    *_at("scatter_add scatter_reduce", ties="scatter"),
    *_at("index_put", ties="index put", linear_time=True),
    *_at("_unsafe_index_put", ties="index put"),
    *_at("index_fill", ties="write at", linear_time=True),
    *_at("index_add index_copy index_reduce", ties="write at"),
    *_at("embedding_bag _embedding_bag _embedding_bag_forward_only", ties="embedding bag"),
    *_at("masked_scatter", ties="masked scatter"),
    *_at("masked_select nonzero nonzero_static _unique2", ties="data dependent"),
    *_at("bucketize searchsorted", ties="buckets"),
    *_at("one_hot", ties="one hot", resize="one hot", linear_time=True),
    *_into("slice_scatter", ties="slice scatter", resize="slice"),
    *_into("select_scatter", ties="select scatter", resize="select"),
    *each(
        "histc", ties="histogram", classes=PERMUTATION, space=UNKNOWN, resize="histogram", cost="view", reads_all=True
    ),
)
