"""Experts whose hidden channels have an order of their own in each: found, proved, matched, merged, pruned."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from micro_models import net
from torch import Tensor, nn

from vfx.api import merge

EXPERTS, STREAM, HIDDEN = 4, 10, 8
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def _letters(self: Any, h: Tensor, share: Tensor) -> Tensor:
    hidden = F.gelu(torch.einsum("td,edh->eth", h, self.up) + self.bias[:, None])
    return torch.einsum("etd,te->td", torch.einsum("eth,ehd->etd", hidden, self.down), share)


def _matrices(self: Any, h: Tensor, share: Tensor) -> Tensor:
    hidden = F.gelu(torch.bmm(h[None].expand(EXPERTS, -1, -1), self.up))
    return (torch.bmm(hidden, self.down) * share.T[..., None]).sum(0)


DENSE = {"einsum": _letters, "bmm": _matrices}


def mixture(experts: Any, seed: int = 0) -> nn.Module:
    """A stream, a mixture of experts with one tensor for all, and a last layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(experts(self, h, self.router(h).softmax(-1)))

    torch.manual_seed(seed)
    layers = {"first": nn.Linear(6, STREAM), "router": nn.Linear(STREAM, EXPERTS), "last": nn.Linear(STREAM, 3)}
    sizes = {"up": (EXPERTS, STREAM, HIDDEN), "bias": (EXPERTS, HIDDEN), "down": (EXPERTS, HIDDEN, STREAM)}
    return net(forward, **layers, **{name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}).eval()


@torch.no_grad()
def reordered(model: nn.Module, experts: bool = True) -> nn.Module:
    """The same function: the channels of each expert in an order of their own, and the experts in another, too."""
    twin = deepcopy(model)
    for e in range(EXPERTS):
        order = torch.randperm(HIDDEN)
        twin.up[e], twin.bias[e], twin.down[e] = twin.up[e][:, order], twin.bias[e][order], twin.down[e][order]
    for tensor in (twin.up, twin.bias, twin.down, twin.router.weight, twin.router.bias) if experts else ():
        tensor.copy_(tensor[torch.tensor([2, 0, 3, 1])])
    return twin


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_orders_inside_each_expert_are_found_again(name: str, experts: bool) -> None:
    """Also where the first weights that are read say nothing of them: a router's biases are those of experts alone."""
    model = mixture(DENSE[name])
    twin = reordered(model, experts)
    close(twin(X), model(X), 1e-5)
    merged = merge([model, twin], X[:2], match="weight", normalize=None, progress=False)
    close(merged.module(X), model(X), 1e-5)
