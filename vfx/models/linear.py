"""Deep linear networks, on which the vanishing feature has a closed form (Vanishing Feature, equations 2 and 3)."""

from itertools import pairwise

from torch import Tensor, nn


class LinearNet(nn.Module):
    """Linear layers without activations over flattened inputs (N, …), returning (N, num_classes) logits."""

    def __init__(self, depth: int, width: int, in_features: int, num_classes: int, residual: bool) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"a linear net needs at least an input and an output layer, got depth={depth}")
        sizes = [in_features, *[width] * (depth - 1), num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        first, *inner, last = self.layers
        x = first(x.flatten(1))
        for layer in inner:
            x = x + layer(x) if self.residual else layer(x)
        return last(x)


def linear_net(
    depth: int = 8, width: int = 32, in_features: int = 784, num_classes: int = 10, residual: bool = False
) -> LinearNet:
    """Build a linear net; the papers use depth 8 on MNIST, and depth 5 with residuals on the inner layers only."""
    return LinearNet(depth, width, in_features, num_classes, residual)
