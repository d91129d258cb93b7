"""Functions of matrices, norms of them, systems of equations: most of them pin rows and columns."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_fact = partial(each, classes=PERMUTATION, resize=OPERANDS, cost=UNKNOWN)
_of_matrix = partial(_fact, ties="of matrix", space=UNKNOWN)
_pinned = partial(_fact, ties="pinned", space="nothing")
# rows and columns of a matrix may be permuted, but not each row by itself: no space
_norm = partial(_fact, ties="reduction", space=UNKNOWN, reads_all=True)

OPERATORS = (
    *_norm("linalg_norm linalg_matrix_norm"),
    *_of_matrix("linalg_inv/inverse linalg_inv_ex linalg_pinv/pinverse"),
    *_of_matrix("linalg_det/det logdet linalg_slogdet/slogdet linalg_cond linalg_matrix_rank"),
    *_of_matrix("linalg_cholesky linalg_cholesky_ex linalg_eigh linalg_eigvalsh linalg_eig linalg_eigvals"),
    *_of_matrix("linalg_svd svd linalg_svdvals linalg_qr linalg_lu"),
    *_of_matrix("linalg_matrix_exp/matrix_exp linalg_matrix_power/matrix_power"),
    *_pinned("linalg_solve linalg_solve_ex linalg_solve_triangular triangular_solve cholesky_solve"),
    *_pinned("linalg_lu_solve linalg_householder_product/orgqr linalg_tensorsolve"),
    *_pinned("kron trace pdist renorm"),
)
