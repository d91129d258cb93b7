"""Activation functions: what a module of ``torch.nn`` runs behind a layer."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_function = partial(each, ties="elementwise", space="elementwise", resize=OPERANDS, cost="activation", keeps_parts=True)
_in_place = partial(_function, runs_in_place=True)
_softmax = partial(
    each, ties="softmax", classes="softmax", space="along", resize=OPERANDS, cost="activation", reads_all=True
)

OPERATORS = (
    *_in_place("relu leaky_relu", classes="positive"),
    *_in_place("tanh", classes="odd"),
    *_in_place("hardtanh", classes="clamp"),
    *_in_place("relu6 elu celu silu gelu mish hardswish hardsigmoid sigmoid/special_expit", classes=PERMUTATION),
    *_function("abs/absolute", classes="absolute", is_magnitude=True),
    *_function("hardshrink softshrink", classes="odd"),
    *_function("selu softplus threshold log_sigmoid rrelu", classes=PERMUTATION),
    *_function("glu_jvp", classes=PERMUTATION, cost="free"),
    *_function("_prelu_kernel", classes="prelu", cost="free"),
    *each("prelu", ties="prelu", classes="prelu", space="prelu", resize=OPERANDS, cost="activation", module="PReLU"),
    *each("glu", ties="gated linear", classes=PERMUTATION, space="halves", resize=OPERANDS, cost="activation"),
    *_softmax("softmax/special_softmax", linear_time=True),
    *_softmax("_softmax log_softmax/special_log_softmax _log_softmax"),
    *_softmax("_safe_softmax", cost=UNKNOWN),
)
