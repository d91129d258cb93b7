"""Recurrent layers over all steps, and single steps of their cells."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_layers = partial(
    each, ties="recurrent layers", classes=PERMUTATION, space=UNKNOWN, resize="recurrent", cost="recurrent"
)
_cell = partial(each, ties="recurrent cell", classes=PERMUTATION, space=UNKNOWN, resize=OPERANDS, cost="recurrent")

OPERATORS = (
    *_layers("lstm", gates=4, module="LSTM"),
    *_layers("gru", gates=3, module="GRU"),
    *_layers("rnn_tanh rnn_relu", gates=1, module="RNN"),
    *_cell("lstm_cell", gates=4, module="LSTMCell"),
    *_cell("gru_cell", gates=3, module="GRUCell"),
    *_cell("rnn_tanh_cell rnn_relu_cell", gates=1, module="RNNCell"),
)
