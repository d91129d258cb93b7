"""Folding beside BatchNorms: those over tokens are not the layer's own, and small gains do not change the function."""

from __future__ import annotations

import pytest
import torch
from conftest import close
from torch import Tensor, nn
from vfx.passes.fold_channels import FoldChannels
from vfx.passes.fold_normalization import FoldNormalization

from vfx.api import prune_structured, trace
from vfx.pruning.clusters import pairs

EXACT = 1e-9


class _Unbatched(nn.Module):
    """A convolution without a batch axis: the BatchNorm behind it stands over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.BatchNorm1d(4), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x[0]))))


def _settled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        norm.running_var.uniform_(0.2, 3, generator=generator)
    return model


def _over_tokens(tokens: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(tokens), nn.ReLU(), nn.Linear(8, 3))
    return _settled(model), torch.randn(4, tokens, 5, dtype=torch.float64)


def _unbatched() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _settled(_Unbatched()), torch.randn(2, 3, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [6, 8])
def test_a_norm_over_tokens_is_not_scaled_into_the_layer(tokens: int, sparsity: float) -> None:
    model, x = _over_tokens(tokens)
    result = prune_structured(model, x, sparsity=sparsity, method="fold", progress=False)
    assert result.report.error <= EXACT
    if sparsity == 0:
        close(result.module(x), model(x), EXACT)


def test_only_norms_over_the_channels_belong_to_a_layer() -> None:
    for model, x in (_over_tokens(8), _unbatched()):
        program = trace(model, x)
        assert pairs(program) == []
        assert len(FoldNormalization(batch_norm=True)(program).notes) == 1
    model, x = _over_tokens(8)
    assert len(pairs(trace(model, x[:, 0]))) == 1  # two axes: the same norm stands over the channels


def test_gains_below_the_epsilon_keep_the_function() -> None:
    model, x = _over_tokens(8)
    model[1].weight.data[:4] = torch.tensor([0.0, 1e-3, -1e-3, 3e-3])
    program = trace(model, x[:, 0])
    close(FoldChannels(0.0)(program)(x[:, 0]), model(x[:, 0]), EXACT)
