"""One registry of operators, a file a family, and uniform access to calls of them. See README.md beside this file."""

from vfx.operators.calls import (
    arguments,
    defaults,
    in_place,
    is_layer,
    is_product,
    is_transposed,
    layer_arguments,
    operands,
    output_axis,
    weight_name,
)
from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, Operator, each
from vfx.operators.registry import REGISTRY, canonical, enter, entry_of, is_in_place, operator, operator_of

__all__ = [
    "OPERANDS",
    "PERMUTATION",
    "REGISTRY",
    "UNKNOWN",
    "Operator",
    "arguments",
    "canonical",
    "defaults",
    "each",
    "enter",
    "entry_of",
    "in_place",
    "is_in_place",
    "is_layer",
    "is_product",
    "is_transposed",
    "layer_arguments",
    "operands",
    "operator",
    "operator_of",
    "output_axis",
    "weight_name",
]
