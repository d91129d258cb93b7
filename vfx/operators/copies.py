"""The same values again: copies, casts, dropout in evaluation."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, each

_same = partial(each, ties="same", classes="same", space="nothing", resize=OPERANDS, cost="view", keeps_parts=True)
_copy = partial(_same, is_copy=True)
_cast = partial(_same, is_cast=True)
_dropout = partial(_same, hands_on=True, may_return_input=True)

OPERATORS = (
    *_copy("clone contiguous", hands_on=True, linear_time=True),
    *_copy("detach", is_input=True, linear_time=True),
    *_copy("alias", is_input=True),
    *_same("lift_fresh_copy", linear_time=True),
    *_cast("to", hands_on=True),
    *_cast("_to_copy", linear_time=True),
    *_cast("type_as", may_return_input=True),
    *_same("positive real imag"),
    *_dropout("dropout", module="Dropout"),
    *_dropout("feature_dropout", module="Dropout2d"),
    *_dropout("alpha_dropout", module="AlphaDropout"),
    *_dropout("feature_alpha_dropout", module="FeatureAlphaDropout"),
    *_same("native_dropout"),
    *_same("lift_fresh resolve_conj resolve_neg conj _conj", cost="free"),
    *each("copy", ties="copy", classes="copied", space="elementwise", resize=OPERANDS, cost="view", linear_time=True),
)
