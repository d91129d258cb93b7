"""The papers' networks, small enough to train on two cores, and the training loop."""

from collections.abc import Callable

from torch import nn

from vfx.models.gpt import GPT, gpt_tiny
from vfx.models.linear import LinearNet, linear_net
from vfx.models.resnet20 import (
    FixupResNet,
    NormResNet,
    PlainResNet,
    resnet20,
    resnet20_bn,
    resnet20_fixup,
    resnet20_ln,
    resnet20_plain,
    resnet32,
    resnet32_bn,
    resnet32_fixup,
    resnet32_ln,
    resnet32_plain,
)
from vfx.models.training import Training, accuracy, fit, predict
from vfx.models.vgg import (
    VGG,
    LayerNorm2d,
    vgg11,
    vgg11_bn,
    vgg11_ln,
    vgg13,
    vgg13_bn,
    vgg13_ln,
    vgg16,
    vgg16_bn,
    vgg16_ln,
    vgg19,
    vgg19_bn,
    vgg19_ln,
)
from vfx.models.vit import ViT, vit_tiny

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg11": vgg11,
    "vgg11_bn": vgg11_bn,
    "vgg11_ln": vgg11_ln,
    "vgg13": vgg13,
    "vgg13_bn": vgg13_bn,
    "vgg13_ln": vgg13_ln,
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "vgg16_ln": vgg16_ln,
    "vgg19": vgg19,
    "vgg19_bn": vgg19_bn,
    "vgg19_ln": vgg19_ln,
    "resnet20": resnet20,
    "resnet20_bn": resnet20_bn,
    "resnet20_fixup": resnet20_fixup,
    "resnet20_ln": resnet20_ln,
    "resnet20_plain": resnet20_plain,
    "resnet32": resnet32,
    "resnet32_bn": resnet32_bn,
    "resnet32_fixup": resnet32_fixup,
    "resnet32_ln": resnet32_ln,
    "resnet32_plain": resnet32_plain,
    "gpt_tiny": gpt_tiny,
    "linear_net": linear_net,
    "vit_tiny": vit_tiny,
}

__all__ = [
    "FixupResNet",
    "GPT",
    "LayerNorm2d",
    "LinearNet",
    "MODELS",
    "NormResNet",
    "PlainResNet",
    "Training",
    "VGG",
    "ViT",
    "accuracy",
    "fit",
    "predict",
    *MODELS,
]
