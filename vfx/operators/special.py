"""Special functions that have no other name: Bessel functions, polynomials, the normal distribution.

Those that are odd stand with their like in ``elementwise``.
"""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, each

_function = partial(
    each, ties="elementwise", classes=PERMUTATION, space="elementwise", resize=OPERANDS, cost="free", keeps_parts=True
)

OPERATORS = (
    *_function("special_bessel_j0 special_bessel_y0 special_bessel_y1 special_spherical_bessel_j0 special_airy_ai"),
    *_function("special_i0e special_modified_bessel_i0 special_modified_bessel_k0 special_modified_bessel_k1"),
    *_function("special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1"),
    *_function("special_ndtr special_ndtri special_log_ndtr special_erfcx special_zeta"),
    *_function("special_chebyshev_polynomial_t special_chebyshev_polynomial_u"),
    *_function("special_chebyshev_polynomial_v special_chebyshev_polynomial_w"),
    *_function("special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u"),
    *_function("special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w"),
    *_function("special_hermite_polynomial_h special_hermite_polynomial_he"),
    *_function("special_laguerre_polynomial_l special_legendre_polynomial_p"),
)
