"""Operators that see where values stand: orders, diagonals, differences, pairs of real and imaginary parts."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_ordered = partial(each, classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="free")
_view = partial(each, space=UNKNOWN, resize=OPERANDS, cost="view")

OPERATORS = (
    *_ordered("sort msort", ties="sorted", reads_all=True),
    *_ordered("argsort", ties="sorted", reads_all=True, gives_positions=True),
    *_ordered("topk", ties="sorted", reads_all=True, least="k"),
    *_view("tril triu", ties="triangle", classes=PERMUTATION, linear_time=True),
    *_view("diagonal/linalg_diagonal", ties="diagonal", classes=PERMUTATION),
    *_ordered("diag_embed", ties="on diagonal"),
    *_ordered("diag", ties="vector or diagonal"),
    *_ordered("diff", ties="differences"),
    *_ordered("cross linalg_cross", ties="cross product"),
    *_ordered("cosine_similarity pairwise_distance", ties="similarity", reads_all=True),
    *_view("view_as_complex", ties="complex pairs", classes="complex pairs"),
    *_view("view_as_real", ties="real pairs", classes="real pairs"),
)
