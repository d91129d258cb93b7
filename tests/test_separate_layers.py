"""Layers that each edge keeps for itself (heads, preserved ones) say nothing of the scales of those that are merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import close
from micro_models import net
from torch import Tensor, nn

import vfx

SCALES = {"alike": 1.0, "faint": 1e-2, "loud": 30.0}


def _mlp(outputs: int, activation: Callable[[Tensor], Tensor]) -> nn.Module:
    return net(
        lambda s, x: s.head(activation(s.g(torch.relu(s.f(x))))),
        f=nn.Linear(6, 20),
        g=nn.Linear(20, 16),
        head=nn.Linear(16, outputs),
    )


def _moved(model: nn.Module, outputs: int, scaled: bool, activation: Callable[[Tensor], Tensor]) -> nn.Module:
    """A permuted (and scaled) copy; with a head of its own where that has other outputs."""
    twin = _mlp(outputs, activation).eval()
    p, q = torch.randperm(20), torch.randperm(16)
    c, d = (torch.rand(n) * 3 + 0.2 if scaled else torch.ones(n) for n in (20, 16))
    with torch.no_grad():
        twin.f.weight.copy_(c[:, None] * model.f.weight[p])
        twin.f.bias.copy_(c * model.f.bias[p])
        twin.g.weight.copy_(d[:, None] * model.g.weight[q][:, p] / c)
        twin.g.bias.copy_(d * model.g.bias[q])
        if outputs == len(model.head.weight):
            twin.head.weight.copy_(model.head.weight[:, q] / d)
            twin.head.bias.copy_(model.head.bias)
    return twin


def _first_layer_apart(model: nn.Module, scaled: bool) -> nn.Module:
    """A permuted (and scaled) copy whose first layer is louder, each channel by a factor of its own."""
    twin = copy.deepcopy(model)
    p, q = torch.randperm(20), torch.randperm(16)
    c, d = (torch.rand(n) * 3 + 0.2 if scaled else torch.ones(n) for n in (20, 16))
    with torch.no_grad():
        louder = torch.rand(20) * 10 + 0.1
        twin.f.weight.copy_(louder[:, None] * model.f.weight[p])
        twin.f.bias.copy_(louder * model.f.bias[p])
        twin.g.weight.copy_(d[:, None] * model.g.weight[q][:, p] / c)
        twin.g.bias.copy_(d * model.g.bias[q])
        twin.head.weight.copy_(model.head.weight[:, q] / d)
    return twin


def _merge(models: list[nn.Module], x: Tensor, match: str, **options: Any) -> nn.Module:
    return vfx.merge(models, x, data=[x], match=match, normalize=None, solve=None, progress=False, **options).module


@pytest.mark.parametrize("match", ["weight", "activation"])
@pytest.mark.parametrize("outputs", [2, 8])
@pytest.mark.parametrize("loudness", SCALES)
@pytest.mark.parametrize("kind", ["permuted", "scaled", "permutations alone", "linear feature", "odd feature"])
def test_trunks_that_are_copies_merge_exactly_in_front_of_separate_heads(
    match: str, outputs: int, loudness: str, kind: str
) -> None:
    torch.manual_seed(0)
    activation = {"linear feature": lambda h: h, "odd feature": torch.tanh}.get(kind, torch.relu)
    first, x = _mlp(8, activation).eval(), torch.randn(256, 6)
    other = _moved(first, outputs, kind == "scaled", activation)
    nn.init.normal_(other.head.weight, std=SCALES[loudness])
    classes = "permutation" if kind == "permutations alone" else "full"
    merged = _merge([first, other], x, match, heads=1, classes=classes)
    for output, model in zip(merged(x), (first, other)):
        close(output, model(x), 1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_follows_a_preserved_layer_is_balanced_without_it(scaled: bool) -> None:
    """The copies' merged layers are the first network's, whatever the layers are that each edge keeps."""
    torch.manual_seed(0)
    first, x = _mlp(8, torch.relu).eval(), torch.randn(256, 6)
    other = _first_layer_apart(first, scaled)
    merged = _merge([first, other], x, "weight", preserve=1).state_dict()
    for name in ("g.weight", "g.bias", "head.weight", "head.bias"):
        close(merged[name], first.state_dict()[name], 1e-4)


@pytest.mark.parametrize(
    ("options", "scaled"),
    [({"preserve": 1}, True), ({"heads": 1}, True), ({"preserve": 1, "heads": 1}, False), ({}, True)],
)
def test_a_copy_is_found_again_with_heads_and_preserved_layers(options: dict[str, int], scaled: bool) -> None:
    """Between both nothing tells how large the features are as a whole: there the copy is permuted alone."""
    torch.manual_seed(0)
    first, x = _mlp(4, torch.relu).eval(), torch.randn(256, 6)
    other = _moved(first, 4, scaled, torch.relu)
    output = _merge([first, other], x, "weight", **options)(x)
    for own in output if isinstance(output, list) else [output]:
        close(own, first(x), 1e-4)


def test_heads_that_count_would_spoil_the_merge() -> None:
    """Negative control: aligned as if nothing were to stay apart, the trunks differ."""
    torch.manual_seed(0)
    first, x = _mlp(8, torch.relu).eval(), torch.randn(256, 6)
    other = _moved(first, 8, False, torch.relu)
    nn.init.normal_(other.head.weight, std=30.0)
    errors = []
    for heads in (0, 1):
        passes = [vfx.Align(heads=heads, progress=False), vfx.DuplicateHeads(1), vfx.Interpolate()]
        merged = vfx.compile([first, other], x[:2], passes=passes).module
        with torch.no_grad():
            errors.append(float((merged(x)[0] - first(x)).abs().max() / first(x).abs().max()))
    assert errors[0] > 0.05
    assert errors[1] < 1e-5


def test_silent_channels_in_front_of_separate_heads_stay() -> None:
    torch.manual_seed(0)
    first, x = _mlp(8, torch.relu).eval(), torch.randn(256, 6)
    with torch.no_grad():
        first.g.weight[3], first.g.bias[3] = 0.0, 0.0
        first.g.weight[5], first.g.bias[5] = first.g.weight[5] * 1e-6, first.g.bias[5] * 1e-6
    other = _moved(first, 8, True, torch.relu)
    for options in ({"heads": 1}, {"heads": 1, "preserve": 1}):
        merged = _merge([first, other], x, "weight", **options)
        assert all(bool(p.isfinite().all()) for p in merged.parameters())
    close(_merge([first, other], x, "weight", heads=1)(x)[1], other(x), 1e-4)
