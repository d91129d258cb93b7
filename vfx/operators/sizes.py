"""What has no axes: sizes, arithmetic on them, numbers read out of tensors, assertions, and taking items."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_size = partial(each, ties="sizes", classes=PERMUTATION, space="nothing", resize=OPERANDS, cost="view")
_number = partial(each, ties="number", classes=PERMUTATION, space="nothing", resize=OPERANDS, cost="view")
_assertion = partial(each, ties=UNKNOWN, classes=UNKNOWN, space=UNKNOWN, resize=UNKNOWN, cost=UNKNOWN, asserts=True)

OPERATORS = (
    *_size("sym_size sym_numel sym_stride sym_storage_offset numel"),
    *_number("item is_nonzero _local_scalar_dense"),
    *_number("add", "", is_add=True),
    *_number("sub mul floordiv mod truediv neg pow ceil floor trunc round", ""),
    *_number("eq ne lt le gt ge and_ or_", ""),
    *_number("sym_sum sym_max sym_min sym_not sym_float sym_int sym_ite _sym_sqrt", ""),
    *_assertion("_assert_async _assert_scalar _assert_tensor_metadata"),
    *_assertion("sym_constrain_range sym_constrain_range_for_size"),
    *each(
        "getitem", "", ties="item", classes=PERMUTATION, space="nothing", resize=OPERANDS, cost="view", hands_on=True
    ),
)
