"""Convolutions, transposed and deformable ones among them."""

from __future__ import annotations

from functools import partial

from vfx.operators.operator import OPERANDS, PERMUTATION, UNKNOWN, each

_convolution = partial(each, classes="convolution", space="convolution", resize="convolution", contracts=True)

OPERATORS = (
    *_convolution(
        "conv1d conv2d conv3d convolution", ties="convolution", cost="convolution", layer="convolution", module="Conv"
    ),
    *_convolution(
        "conv_transpose1d conv_transpose2d conv_transpose3d",
        ties="transposed convolution",
        cost="transposed convolution",
        layer="transposed",
        module="ConvTranspose",
    ),
    *each(
        "deform_conv2d",
        "torchvision.",
        ties="deformable convolution",
        classes=PERMUTATION,
        space=UNKNOWN,
        resize=OPERANDS,
        cost="deformable convolution",
        contracts=True,
    ),
)
