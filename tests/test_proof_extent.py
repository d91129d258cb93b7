"""The proof of structured pruning runs on small inputs where these prove as much, else on the example's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from micro_models import conv, net
from torch import Tensor, nn
from torch.nn import functional as F

import vfx.resize.masked as masked
from vfx.analyse.symmetry import symmetry
from vfx.api import trace
from vfx.program import Program
from vfx.resize import resize
from vfx.resize.masked import masked_error

EXACT, BROKEN = 1e-9, 1e-4


def _convolutions(*behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(4), conv(8, 6), *behind).eval()


def _pyramid(self: Any, x: Tensor) -> Tensor:
    """The upper level is brought to a size that the capture wrote down."""
    lower = torch.relu(self.a(x))
    upper = F.interpolate(F.max_pool2d(lower, 4), size=lower.shape[-2:])
    return self.c(self.b(lower + upper).mean((2, 3)))


def _anchors(self: Any, x: Tensor) -> Tensor:
    """A detector's head: channels taken apart in front of the image's axes, whose sizes the capture wrote down."""
    n, _, height, width = x.shape
    y = self.b(torch.relu(self.a(x))).view(n, 2, 3, height, width).permute(0, 3, 4, 1, 2)
    return y.sigmoid().mean((1, 2))


def _fixed_kernel(self: Any, x: Tensor) -> Tensor:
    return self.c(F.avg_pool2d(torch.relu(self.a(x)), 128).flatten(1))


# network -> the side of the inputs that prove it
SIDES = {
    "pooled": (lambda: _convolutions(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)), 64),
    "pooled to a grid": (lambda: _convolutions(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 2)), 64),
    "flattened positions": (lambda: _convolutions(nn.MaxPool2d(8), nn.Flatten(), nn.Linear(384, 2)), 256),
    "one position of a quarter": (lambda: _convolutions(nn.MaxPool2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128),
    "one position of a half": (lambda: _convolutions(nn.MaxPool2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 256),
    "pyramid": (lambda: net(_pyramid, a=conv(3, 8), b=conv(8, 6), c=nn.Linear(6, 2)).eval(), 64),
    "anchors": (lambda: net(_anchors, a=conv(3, 8), b=conv(8, 6)).eval(), 64),
    "kernel of a fixed size": (lambda: net(_fixed_kernel, a=conv(3, 8), c=nn.Linear(32, 2)).eval(), 256),
}


def _proved(program: Program, kept: dict[int, Any], monkeypatch: pytest.MonkeyPatch, wrong: bool) -> tuple[float, int]:
    """The error, and the side of the inputs that it was found on."""
    sides: list[int] = []

    def compared(examples: Program, *arguments: Any) -> float:
        sides.append(examples.example_inputs[0].shape[-1])
        return compare(examples, *arguments)

    compare = masked.function_error
    monkeypatch.setattr(masked, "function_error", compared)
    facts = symmetry(program)
    small = resize(program, facts, kept)
    other = {0: np.setdiff1d(np.arange(facts.groups[0].size), kept[0])} if wrong else {}
    return masked_error(program, facts, small, kept | other), sides[-1]


@pytest.mark.parametrize("name", SIDES)
def test_inputs_are_as_small_as_the_network_allows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, side = SIDES[name]
    program = trace(build(), torch.randn(1, 3, 256, 256))
    kept = {group.index: np.arange(1, group.size, 2) for group in symmetry(program).groups}
    error, found = _proved(program, kept, monkeypatch, wrong=False)
    assert error <= EXACT
    assert found == side


@pytest.mark.parametrize("name", ["pooled", "pyramid"])
def test_a_wrong_channel_is_found_and_judged_at_full_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(SIDES[name][0](), torch.randn(1, 3, 256, 256))
    kept = {group.index: np.arange(1, group.size, 2) for group in symmetry(program).groups}
    error, side = _proved(program, kept, monkeypatch, wrong=True)
    assert error >= BROKEN
    assert side == 256
