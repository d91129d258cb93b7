"""Tensors made from nothing: uniform ones, and those whose values depend on the position."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, each

_fill = partial(each, ties="fill", classes="fill", space="nothing", cost="view")
_like = partial(_fill, resize=OPERANDS)
_made = partial(_fill, resize="made")
_ordered = partial(each, ties="ordered", classes=PERMUTATION, space="nothing", resize=OPERANDS, cost="free")
_random_like = partial(_ordered, ties="ordered like")

OPERATORS = (
    *_made("zeros ones full", linear_time=True),
    *_made("empty new_empty"),
    *_made("new_zeros new_full", fills=0),
    *_made("new_ones", fills=1),
    *_like("zeros_like full_like", fills=0),
    *_like("ones_like", fills=1),
    *_like("empty_like"),
    *_like("fill zero scalar_tensor", linear_time=True),
    *_like("empty_permuted new_empty_strided empty_strided", cost="free"),
    *_ordered("arange linspace eye", cost="view", linear_time=True),
    *_ordered("logspace tril_indices triu_indices hann_window"),
    *_ordered("rand randn randint randperm bernoulli multinomial normal uniform exponential cauchy log_normal"),
    *_ordered("geometric random poisson"),
    *_random_like("rand_like randn_like randint_like"),
)
