"""A small GPT-2 (Radford et al. 2019): learned positions, pre-norm causal blocks, a head that gives each next token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfx.models.vit import TransformerBlock


class GPT(nn.Module):
    """Tokens (N, T), T up to ``context``, to the logits (N, T, vocabulary) of the token behind each.

    ``tied`` shares the embedding with the head: the stream's channels then meet the vocabulary on both sides.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        """GPT-2, section 2.3: N(0, 0.02²), what a block adds to the stream smaller by the root of their number."""
        nn.init.normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                added = name.endswith(("attention.proj", "down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if added else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def gpt_tiny(width: float = 1.0, vocabulary: int = 96, context: int = 64, depth: int = 4, tied: bool = False) -> GPT:
    """Build a GPT-2 of 128 × ``width`` channels in four heads, by default for the characters of ``vfx.models.text``."""
    return GPT(vocabulary, context, 4 * max(1, round(32 * width)), depth, 4, tied)
