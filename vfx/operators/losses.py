"""Losses: entries compared one by one, or classes told apart."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_loss = partial(each, classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="free")
_compared = partial(_loss, ties="compared", reads_all=True)
_pinned = partial(_loss, ties="pinned", space="nothing")

OPERATORS = (
    *_compared("mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss poisson_nll_loss"),
    *_compared("binary_cross_entropy binary_cross_entropy_with_logits hinge_embedding_loss margin_ranking_loss dist"),
    *_pinned("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d multi_margin_loss multilabel_margin_loss"),
    *_pinned("cosine_embedding_loss triplet_margin_loss ctc_loss"),
)
