"""A small vision transformer (Dosovitskiy et al. 2021): pre-norm blocks, packed qkv, mean of the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, L, width); a causal one looks at no later token."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads must divide a width of {width}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a GELU network of four times the width, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of images (N, C, size, size) to logits (N, num_classes)."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patches of {patch} must tile {size} pixels")
        self.patch = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit_tiny(
    width: float = 1.0, in_channels: int = 3, num_classes: int = 10, size: int = 32, patch: int = 4, depth: int = 6
) -> ViT:
    """Build a ViT of 192 × ``width`` channels in three heads (ViT-Ti), for images of ``size`` pixels."""
    return ViT(size, patch, 3 * max(1, round(64 * width)), depth, 3, in_channels, num_classes)
