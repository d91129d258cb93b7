"""CIFAR ResNets (He et al. 2016, section 4.2): 20 and 32 layers, with BatchNorm, LayerNorm, no norm, or Fixup.

Three stages of 16, 32 and 64 channels; the first block of stages 2 and 3 halves the image and carries a 1×1 stride-2
shortcut. ReLU, the additions and the global pool are functional: the papers' cost tables (torchstat) count them as 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfx.models.vgg import LayerNorm2d, Norm, scaled

Block = Callable[[int, int, int], nn.Module]  # (in channels, out channels, stride)


def _conv3x3(channels: int, out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=bias)


def _conv1x1(channels: int, out: int, stride: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, stride, bias=bias)


class NormBlock(nn.Module):
    """Residual block with a norm after each bias-free convolution (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, out, stride)
        self.bn1 = norm(out)
        self.conv2 = _conv3x3(out, out)
        self.bn2 = norm(out)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(_conv1x1(channels, out, stride), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


class PlainBlock(nn.Module):
    """Residual block without norms, whose convolutions carry biases (Rethinking Model Re-Basin, plain ResNet20)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, out, stride, bias=True)
        self.conv2 = _conv3x3(out, out, bias=True)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(_conv1x1(channels, out, stride, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class FixupBlock(nn.Module):
    """Residual block with four scalar biases and one multiplier in place of norms (Zhang et al. 2019, figure 1)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bias1a = nn.Parameter(torch.zeros(1))
        self.conv1 = _conv3x3(channels, out, stride)
        self.bias1b = nn.Parameter(torch.zeros(1))
        self.bias2a = nn.Parameter(torch.zeros(1))
        self.conv2 = _conv3x3(out, out)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias2b = nn.Parameter(torch.zeros(1))
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(_conv1x1(channels, out, stride))

    def branch(self, biased: Tensor) -> Tensor:
        """Return the residual branch of an input that already carries `bias1a`; zero at initialisation."""
        hidden = F.relu(self.conv1(biased) + self.bias1b)
        return self.conv2(hidden + self.bias2a) * self.scale + self.bias2b

    def forward(self, x: Tensor) -> Tensor:
        biased = x + self.bias1a
        # A projection reads the biased input, as conv1 does; an identity shortcut passes the stream itself.
        skip = self.shortcut(biased) if len(self.shortcut) else x
        return F.relu(self.branch(biased) + skip)


class _Stages(nn.Module):
    """What all variants share: `conv1`, three stages and `fc`; a subclass says how the stem and the head run."""

    def __init__(
        self, depth: int, width: float, in_channels: int, num_classes: int, block: Block, bias: bool = False
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, …), got depth={depth}")
        self.blocks_per_stage = depth // 6
        self.widths = tuple(scaled(c, width) for c in (16, 32, 64))
        first, second, third = self.widths
        self.conv1 = _conv3x3(in_channels, first, bias=bias)
        self.layer1 = self._stage(block, first, first, stride=1)
        self.layer2 = self._stage(block, first, second, stride=2)
        self.layer3 = self._stage(block, second, third, stride=2)
        self.fc = nn.Linear(third, num_classes)

    def _stage(self, block: Block, channels: int, out: int, stride: int) -> nn.Sequential:
        rest = (block(out, out, 1) for _ in range(self.blocks_per_stage - 1))
        return nn.Sequential(block(channels, out, stride), *rest)

    def pooled(self, x: Tensor) -> Tensor:
        """Return the (N, C) global average of the three stages' output."""
        x = self.layer3(self.layer2(self.layer1(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class NormResNet(_Stages):
    """CIFAR ResNet with a norm after each convolution; images (N, in_channels, H, W) to logits (N, num_classes)."""

    def __init__(self, depth: int, width: float, in_channels: int, num_classes: int, norm: Norm) -> None:
        def block(channels: int, out: int, stride: int) -> NormBlock:
            return NormBlock(channels, out, stride, norm)

        super().__init__(depth, width, in_channels, num_classes, block)
        self.bn1 = norm(self.widths[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(F.relu(self.bn1(self.conv1(x)))))


class PlainResNet(_Stages):
    """CIFAR ResNet with biases and no norm; images (N, in_channels, H, W) to logits (N, num_classes)."""

    def __init__(self, depth: int, width: float, in_channels: int, num_classes: int) -> None:
        super().__init__(depth, width, in_channels, num_classes, PlainBlock, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(F.relu(self.conv1(x))))


class FixupResNet(_Stages):
    """CIFAR ResNet with Fixup scalars and start; images (N, in_channels, H, W) to logits (N, num_classes)."""

    def __init__(self, depth: int, width: float, in_channels: int, num_classes: int) -> None:
        super().__init__(depth, width, in_channels, num_classes, FixupBlock)
        self.bias1 = nn.Parameter(torch.zeros(1))
        self.bias2 = nn.Parameter(torch.zeros(1))
        _fixup(self, blocks=3 * self.blocks_per_stage)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(F.relu(self.conv1(x) + self.bias1)) + self.bias2)


def _fixup(model: nn.Module, blocks: int) -> None:
    """Initialise by Fixup (section 3): branches of two layers get L^(-1/2) He and zero, the classifier zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, FixupBlock):
            with torch.no_grad():
                module.conv1.weight.mul_(blocks**-0.5)
            nn.init.zeros_(module.conv2.weight)


def resnet20_bn(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> NormResNet:
    """Build ResNet20 with BatchNorm."""
    return NormResNet(20, width, in_channels, num_classes, nn.BatchNorm2d)


def resnet20_ln(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> NormResNet:
    """Build ResNet20 with LayerNorm over channels."""
    return NormResNet(20, width, in_channels, num_classes, LayerNorm2d)


def resnet20_plain(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> PlainResNet:
    """Build ResNet20 with biases and no norm."""
    return PlainResNet(20, width, in_channels, num_classes)


def resnet20_fixup(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> FixupResNet:
    """Build ResNet20 with Fixup scalars and initialisation."""
    return FixupResNet(20, width, in_channels, num_classes)


def resnet32_bn(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> NormResNet:
    """Build ResNet32 with BatchNorm."""
    return NormResNet(32, width, in_channels, num_classes, nn.BatchNorm2d)


def resnet32_ln(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> NormResNet:
    """Build ResNet32 with LayerNorm over channels."""
    return NormResNet(32, width, in_channels, num_classes, LayerNorm2d)


def resnet32_plain(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> PlainResNet:
    """Build ResNet32 with biases and no norm."""
    return PlainResNet(32, width, in_channels, num_classes)


def resnet32_fixup(width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> FixupResNet:
    """Build ResNet32 with Fixup scalars and initialisation."""
    return FixupResNet(32, width, in_channels, num_classes)


resnet20 = resnet20_bn
resnet32 = resnet32_bn
