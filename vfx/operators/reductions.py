"""Sums, extremes and norms over axes, and running ones along an axis."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, each

_reduction = partial(each, ties="reduction", space="reduction", resize=OPERANDS, cost="free", reads_all=True)
_scan = partial(each, ties="scan", classes=PERMUTATION, space="along", resize=OPERANDS, cost="free")

OPERATORS = (
    *_reduction("sum", classes="total"),
    *_reduction("mean", classes="total", averages=True, divides_by_count=True, hands_on=True),
    *_reduction("amax amin max min median", classes="extreme"),
    *_reduction("norm linalg_vector_norm", classes="length"),
    *_reduction("std", classes="extreme", least="two", divides_by_count=True),
    *_reduction("var", classes=PERMUTATION, least="two", divides_by_count=True),
    *_reduction("var_mean std_mean", classes=PERMUTATION, least="two"),
    *_reduction("kthvalue", classes=PERMUTATION, least="k"),
    *_reduction("argmax argmin", classes=PERMUTATION, gives_positions=True),
    *_reduction("logsumexp/special_logsumexp prod any all nansum nanmean nanmedian mode", classes=PERMUTATION),
    *_reduction("aminmax count_nonzero frobenius_norm", classes=PERMUTATION),
    *_scan("cumsum", linear_time=True),
    *_scan("cumprod logcumsumexp cummax cummin"),
)
