"""Functions of one or several operands, entry by entry; activation functions have a file of their own."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, each

_function = partial(each, ties="elementwise", space="elementwise", resize=OPERANDS, cost="free", keeps_parts=True)

OPERATORS = (
    # sums and products
    *_function("add", classes="sum", is_add=True, is_affine=True, is_additive=True, runs_in_place=True),
    *_function("sub/subtract", classes="sum", is_affine=True, is_additive=True, runs_in_place=True),
    *_function("rsub", classes="sum", is_affine=True, is_additive=True),
    *_function("neg/negative", classes="linear", is_affine=True),
    *_function("mul/multiply", classes="product", exponent=Fraction(1), is_affine=True, runs_in_place=True),
    *_function("div/divide/true_divide", classes="product", exponent=Fraction(-1), is_affine=True, runs_in_place=True),
    *_function("lerp", classes="lerp"),
    *_function("addcmul addcdiv", classes=PERMUTATION),
    *_function("complex deg2rad rad2deg conj_physical", classes="linear"),
    # powers
    *_function("pow", classes="power", is_magnitude=True),
    *_function("square", classes="power", exponent=Fraction(2), is_magnitude=True),
    *_function("sqrt", classes="power", exponent=Fraction(1, 2)),
    *_function("rsqrt", classes="power", exponent=Fraction(-1, 2)),
    *_function("reciprocal", classes="power", exponent=Fraction(-1)),
    *_function("float_power", classes=PERMUTATION),
    # f(c·x) = c·f(x) for positive c
    *_function("maximum/max.other minimum/min.other fmax fmin hypot", classes="positive"),
    # f(−x) = −f(x)
    *_function("sin asin/arcsin sinh asinh/arcsinh atan/arctan atanh/arctanh tan", classes="odd"),
    *_function("erf/special_erf erfinv/special_erfinv", classes="odd"),
    *_function("sign sgn round/special_round trunc/fix frac", classes="odd"),
    # clamps: by their bounds
    *_function("clamp/clip", classes="clamp", runs_in_place=True),
    *_function("clamp_min clamp_max", classes="clamp"),
    *_function("special_i1 special_i1e special_modified_bessel_i1 special_bessel_j1", classes="odd"),
    # choices
    *_function("where", classes="chosen", is_additive=True),
    *_function("masked_fill", classes="chosen"),
    # permutations and no more
    *_function("cos acos/arccos cosh acosh/arccosh atan2/arctan2 angle polar", classes=PERMUTATION),
    *_function("exp exp2/special_exp2 expm1/special_expm1", classes=PERMUTATION),
    *_function("log log1p/special_log1p log2 log10 logit/special_logit", classes=PERMUTATION),
    *_function("xlogy/special_xlogy special_entr special_xlog1py logaddexp logaddexp2", classes=PERMUTATION),
    *_function("erfc/special_erfc i0/special_i0 sinc/special_sinc", classes=PERMUTATION),
    *_function("lgamma/special_gammaln digamma/special_digamma/special_psi", classes=PERMUTATION),
    *_function("polygamma/special_polygamma mvlgamma/special_multigammaln", classes=PERMUTATION),
    *_function("igamma/special_gammainc igammac/special_gammaincc", classes=PERMUTATION),
    *_function("remainder fmod floor ceil floor_divide copysign nextafter ldexp", classes=PERMUTATION),
    *_function("nan_to_num isnan isinf isfinite isposinf isneginf isclose", classes=PERMUTATION),
    *_function("eq ne/not_equal lt/less le/less_equal gt/greater ge/greater_equal", classes=PERMUTATION),
    *_function("logical_and logical_or logical_not logical_xor heaviside signbit", classes=PERMUTATION),
    *_function("bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__", classes=PERMUTATION),
    *_function("bitwise_left_shift bitwise_right_shift __lshift__ __rshift__", classes=PERMUTATION),
)
