"""Rounding is no broken rule: outputs that hardly vary over the inputs, and networks that make rounding grow."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import close
from micro_models import net
from torch import Tensor, nn

import vfx
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import verify
from vfx.capture.capture import capture
from vfx.program import run
from vfx.proof import PRESERVED, Trial, relative_error


def deep(depth: int, seed: int = 0, width: int = 16) -> nn.Sequential:
    """Linear layers as PyTorch initialises them: what the inputs do shrinks at each."""
    torch.manual_seed(seed)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 4)).eval()


def faint(scale: float, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    model[0].weight.data *= scale
    return model


def fresh(seed: int = 0) -> nn.Sequential:
    """Convolutions and norms whose statistics were never measured."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1)]
    for _ in range(12):
        layers += [nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


NETWORKS = {
    "26 layers": (lambda seed: deep(26, seed), (8, 16)),
    "60 layers": (lambda seed: deep(60, seed), (8, 16)),
    "weights of 1e-7": (lambda seed: faint(1e-7, seed), (2, 16)),
    "weights of 1e-14": (lambda seed: faint(1e-14, seed), (2, 16)),
    "weights of 0": (lambda seed: faint(0.0, seed), (2, 16)),
    "fresh statistics": (fresh, (2, 3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", ["full", "permutation"])
def test_networks_whose_outputs_hardly_vary_are_merged(name: str, classes: str) -> None:
    build, shape = NETWORKS[name]
    first, second, x = build(0), build(1), torch.randn(shape)
    merged = vfx.merge(
        [first, second], x, match="weight", normalize=None, weights=[0.0, 1.0], classes=classes, progress=False
    )
    close(merged.module(x), second(x), 1e-4)


def _facts(model: nn.Module, x: Tensor) -> Symmetry:
    return symmetry(capture(model, (x,)))


@pytest.mark.parametrize("name", ["26 layers", "60 layers", "weights of 1e-7"])
def test_a_broken_tie_is_seen_where_outputs_hardly_vary(name: str) -> None:
    build, shape = NETWORKS[name]
    facts = _facts(build(0), torch.randn(shape))
    assert verify(facts) <= PRESERVED
    for group in facts.groups[:: max(1, len(facts.groups) // 4)]:
        for member in group.members:
            for classes in ("full", "permutation"):
                assert verify(facts, without=(member,), classes=classes) >= 1e-4, member.fqn


@pytest.mark.parametrize(
    ("x", "difference", "kept"),
    [
        ([1.0, 1.0 + 1e-9], 1e-15, True),  # rounding, a millionth of the spread
        ([1.0, 1.0 + 1e-9], 1e-10, False),
        ([1.0, 1.0 + 1e-9], 1e-12, False),
        ([1e-20, 2e-20], 1e-30, True),
        ([1e-20, 2e-20], 1e-25, False),
        ([1e6, 1e6 + 1], 1e-3, False),  # a large bias hides nothing
        ([1e6, 1e6 + 1], 1e-10, True),
        ([0.0, 0.0], 1e-8, False),
    ],
)
def test_errors_are_measured_against_the_spread_but_not_below_rounding(
    x: list[float], difference: float, kept: bool
) -> None:
    values = torch.tensor(x, dtype=torch.float64)
    assert (relative_error(values, values + difference) <= PRESERVED) is kept


def test_rounding_that_a_network_makes_grow_is_told_from_a_change() -> None:
    """A difference of numbers that are 1e9 times as large: its last seven digits are rounding."""
    torch.manual_seed(0)

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(((h + 1e7) - 1e7) * 3)

    facts = _facts(Cancelling().eval(), torch.randn(6, 5))
    program = facts.program.to("cpu", torch.float64)
    inputs = [torch.randn(6, 5, dtype=torch.float64)]
    weights = dict(program.weights[0])
    changed = weights | {"a.weight": weights["a.weight"] * (1 + 1e-6)}
    assert verify(facts, classes="permutation") <= PRESERVED
    network = partial(run, program.graph)
    assert Trial(network, weights, inputs).error(network(changed, inputs)) >= 1e-8


def test_chaos_proves_nothing() -> None:
    """Where rounding drowns the outputs, an error is an error."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(30)]

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        for layer in s.layers:
            x = torch.sin(20 * layer(x))
        return s.out(x)

    model = net(forward, layers=nn.ModuleList(layers), out=nn.Linear(16, 3))
    facts = _facts(model.eval(), torch.randn(6, 16))
    assert verify(facts, classes="permutation") > PRESERVED
