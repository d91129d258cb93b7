"""VGG for 32×32 images: plain, with BatchNorm and with LayerNorm between convolution and ReLU.

Names and sizes follow Vanishing Feature Table 12: `features.i`, `avgpool`, `classifier.0`. The last stage ends in
AvgPool2d(2) instead of a max-pool, so a 32×32 image leaves `avgpool` as 1×1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Stages = tuple[tuple[int, ...], ...]

VGG11: Stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG13: Stages = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
VGG16: Stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
VGG19: Stages = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


def scaled(channels: int, width: float) -> int:
    """Return `channels` times the width multiplier, rounded, at least 1."""
    return max(1, round(channels * width))


class LayerNorm2d(nn.Module):
    """Normalise (N, C, H, W) over the channels of each pixel, as a channels-last LayerNorm (VGG16-LN of the papers)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        last = F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), self.weight, self.bias, self.eps)
        return last.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class VGG(nn.Module):
    """VGG over (N, in_channels, 32, 32) images, returning (N, num_classes) logits (Vanishing Feature Table 12)."""

    def __init__(
        self, stages: Stages, width: float = 1.0, in_channels: int = 3, num_classes: int = 10, norm: Norm | None = None
    ) -> None:
        super().__init__()
        widths = tuple(tuple(scaled(c, width) for c in stage) for stage in stages)
        self.features = nn.Sequential(*_features(widths, in_channels, norm))
        self.avgpool = nn.AvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(widths[-1][-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))


def _features(stages: Stages, channels: int, norm: Norm | None) -> list[nn.Module]:
    """List convolutions, norms and ReLUs, with a max-pool between stages but none after the last."""
    layers: list[nn.Module] = []
    for number, stage in enumerate(stages):
        if number:
            layers.append(nn.MaxPool2d(2))
        for out in stage:
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            if norm is not None:
                layers.append(norm(out))
            layers.append(nn.ReLU(inplace=True))
            channels = out
    return layers


def initialise(model: nn.Module) -> None:
    """Draw convolutions Kaiming-normal by fan-out and linear layers from N(0, 0.01); zero biases (torchvision VGG)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _vgg(stages: Stages, width: float, in_channels: int, num_classes: int, norm: Norm | None = None) -> VGG:
    model = VGG(stages, width, in_channels, num_classes, norm)
    # The papers keep PyTorch's default initialisation for the LayerNorm networks.
    if norm is not LayerNorm2d:
        initialise(model)
    return model


def vgg11(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build plain VGG11 (no norm)."""
    return _vgg(VGG11, width, in_channels, num_classes)


def vgg11_bn(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG11 with BatchNorm."""
    return _vgg(VGG11, width, in_channels, num_classes, nn.BatchNorm2d)


def vgg11_ln(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG11 with LayerNorm over channels."""
    return _vgg(VGG11, width, in_channels, num_classes, LayerNorm2d)


def vgg13(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build plain VGG13 (no norm)."""
    return _vgg(VGG13, width, in_channels, num_classes)


def vgg13_bn(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG13 with BatchNorm."""
    return _vgg(VGG13, width, in_channels, num_classes, nn.BatchNorm2d)


def vgg13_ln(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG13 with LayerNorm over channels."""
    return _vgg(VGG13, width, in_channels, num_classes, LayerNorm2d)


def vgg16(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build plain VGG16 (no norm)."""
    return _vgg(VGG16, width, in_channels, num_classes)


def vgg16_bn(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG16 with BatchNorm."""
    return _vgg(VGG16, width, in_channels, num_classes, nn.BatchNorm2d)


def vgg16_ln(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG16 with LayerNorm over channels."""
    return _vgg(VGG16, width, in_channels, num_classes, LayerNorm2d)


def vgg19(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build plain VGG19 (no norm)."""
    return _vgg(VGG19, width, in_channels, num_classes)


def vgg19_bn(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG19 with BatchNorm."""
    return _vgg(VGG19, width, in_channels, num_classes, nn.BatchNorm2d)


def vgg19_ln(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> VGG:
    """Build VGG19 with LayerNorm over channels."""
    return _vgg(VGG19, width, in_channels, num_classes, LayerNorm2d)
