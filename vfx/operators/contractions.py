"""Products summed over axes: linear layers, matrix products, einsum and its kin, experts' matrices."""

from __future__ import annotations

from functools import partial

from vfx.operators.kernels import grouped_product
from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_LINEAR = {"input": "input", "weight": "weight", "bias": "bias"}
_OTHER = {"input": "self", "weight": "other"}
_MATRIX = {"input": "self", "weight": "mat2"}
_VECTOR = {"input": "self", "weight": "vec"}
_TENSOR = {"input": "self", "weight": "tensor"}
_SUMMED = {"input": "mat1", "weight": "mat2", "bias": "self"}
_BATCHES = {"input": "batch1", "weight": "batch2", "bias": "self"}
_GROUPED = {"input": "input", "weight": "weight"}

_contraction = partial(each, resize=OPERANDS, contracts=True)
_product = partial(
    _contraction, ties="product", classes="product of matrices", space="product", cost="product", multiplies=True
)
_sum = partial(
    _contraction,
    ties="product and sum",
    classes="product and sum",
    space="product and sum",
    cost="product",
    multiplies=True,
)
_sums = partial(_contraction, ties="products and sum", classes=PERMUTATION, space=UNKNOWN)
_dot = partial(_contraction, ties="dot", classes="dot", space=UNKNOWN, cost="product")
_experts = partial(
    each, ties="grouped product", classes="grouped product", space="grouped product", resize=OPERANDS, cost="product"
)

OPERATORS = (
    *_contraction(
        "linear",
        ties="linear",
        classes="linear layer",
        space="linear",
        cost="product",
        roles=_LINEAR,
        layer="linear",
        module="Linear",
    ),
    *_product("matmul/linalg_matmul", roles=_OTHER, batched=True),
    *_product("mm", roles=_MATRIX),
    *_product("bmm", roles=_MATRIX, batched=True),
    *_contraction("mv", ties="product", classes="product of matrices", space="product", cost="product", roles=_VECTOR),
    *_sum("addmm", roles=_SUMMED),
    *_sum("baddbmm", roles=_BATCHES, batched=True),
    *_sums("addmv", cost="product", roles={"input": "mat"}),
    *_sums("addr", cost=UNKNOWN),
    *_sums("addbmm", cost="summed products"),
    *_contraction(
        "embedding",
        ties="embedding",
        classes="embedding",
        space="embedding",
        cost="free",
        linear_time=True,
        module="Embedding",
    ),
    *_contraction("einsum", ties="einsum", classes="einsum", space="einsum", cost="einsum", may_return_input=True),
    *_contraction("bilinear", ties="bilinear", classes="bilinear", space=UNKNOWN, cost="bilinear", module="Bilinear"),
    *_contraction("tensordot", ties="tensordot", classes=PERMUTATION, space=UNKNOWN, cost="tensordot"),
    *_contraction("inner", ties="inner", classes=PERMUTATION, space=UNKNOWN, cost="inner"),
    *_contraction("linalg_vecdot", ties="vector products", classes=PERMUTATION, space=UNKNOWN, cost=UNKNOWN),
    *_contraction("linalg_multi_dot chain_matmul", ties="chain", classes=PERMUTATION, space=UNKNOWN, cost=UNKNOWN),
    *_dot("dot", roles=_TENSOR),
    *_dot("vdot", roles=_OTHER),
    *_contraction("outer/ger", ties="outer", classes=PERMUTATION, space=UNKNOWN, cost=UNKNOWN, linear_time=True),
    *_contraction(
        "cdist _cdist_forward", ties="distances", classes=PERMUTATION, space=UNKNOWN, cost=UNKNOWN, reads_all=True
    ),
    *_experts("_grouped_mm", roles=_MATRIX, in_double=grouped_product),
    *_experts("grouped_mm_fallback", "transformers.", roles=_GROUPED),
)
