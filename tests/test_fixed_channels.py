"""Free channels and fixed ones side by side: what a reduction and a norm behind them leave of each class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from micro_models import net, parameter
from torch import Tensor, nn

import vfx
from vfx.analyse.classes import Maps
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import verify
from vfx.capture.capture import capture

EXACT = 1e-10

JOINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "behind": lambda h, x: torch.cat([h, x[:, :1]], 1),
    "in front": lambda h, x: torch.cat([x[:, :1], h], 1),
    "amid": lambda h, x: torch.cat([h[:, :5], x[:, :1], h[:, 5:]], 1),
    "three": lambda h, x: torch.cat([h[:, :6], x], 1),
    "zeros": lambda h, x: F.pad(h, (0, 1)),
    "ones": lambda h, x: torch.cat([h, torch.ones_like(x[:, :1])], 1),
    "a copy": lambda h, x: torch.cat([h, h[:, :1]], 1),
}
REDUCED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "amax": lambda h, d: h.amax(d),
    "sum": lambda h, d: h.sum(d),
    "deviation": lambda h, d: h.std(d),
    "length": lambda h, d: h.norm(dim=d),
    "squares": lambda h, d: h.square().sum(d),
    "softmax": lambda h, d: (h * h.softmax(d)).sum(d),
    "distance": lambda h, d: (h - h.mean(d, keepdim=True)).abs().sum(d),
    "spread out": lambda h, d: (h * h.amax(d, keepdim=True).expand_as(h)).sum(d),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(3),
    "BatchNorm without gain": lambda: nn.BatchNorm1d(3, affine=False),
    "LayerNorm": lambda: nn.LayerNorm(3),
    "RMSNorm": lambda: nn.RMSNorm(3),
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "PReLU": lambda: nn.PReLU(3),
    "gain": lambda: net(lambda s, h: h * s.g + s.b, g=parameter(3), b=parameter(3)),
    "divisor": lambda: net(lambda s, h: h / (2 + s.g), g=parameter(3)),
}
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "none": lambda h: h}
COMBINATIONS = [
    (join, reduce, norm, list(ACTIVATIONS)[(a + b + c) % 3], 1 + (a + c) % 2)
    for a, join in enumerate(JOINED)
    for b, reduce in enumerate(REDUCED)
    for c, norm in enumerate(NORMS)
    if (3 * a + 5 * b + c) % 8 == 0
]


def _network(join: str, reduce: str, norm: str, activation: str, dim: int, seed: int = 0) -> nn.Module:
    """Eight free channels and a fixed one as a square of nine, reduced, normalised, read."""
    torch.manual_seed(seed)
    model = net(
        lambda s, x: s.o(ACTIVATIONS[activation](s.n(REDUCED[reduce](JOINED[join](s.c(x), x).view(-1, 3, 3), dim)))),
        c=nn.Linear(3, 8),
        n=NORMS[norm](),
        o=nn.Linear(3, 5),
    )
    for one in model.parameters():
        nn.init.normal_(one)
    return model.eval()


def _facts(*options: object) -> Symmetry:
    return symmetry(capture(_network(*options), (torch.randn(6, 3),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("join", "reduce", "norm", "activation", "dim"), COMBINATIONS)
def test_every_element_of_the_classes_leaves_the_function(
    join: str, reduce: str, norm: str, activation: str, dim: int
) -> None:
    facts = _facts(join, reduce, norm, activation, dim)
    assert not facts.unknown_ops
    assert verify(facts) <= EXACT


def test_scales_pass_a_maximum_over_free_and_fixed_rows() -> None:
    """Columns without the fixed channel scale through amax and BatchNorm; its row and column stay."""
    facts = _facts("behind", "amax", "BatchNorm", "relu", 1)
    rows, columns = sorted(facts.groups, key=lambda group: len(group.members))
    assert rows.kind is Maps.PERMUTATION
    assert columns.kind is Maps.POSITIVE_MONOMIAL
    for group in facts.groups:
        for member in group.members:
            assert verify(facts, without=(member,)) >= 1e-4, member.fqn


@pytest.mark.parametrize("norm", ["BatchNorm", "LayerNorm", "gain"])
@pytest.mark.parametrize("match", ["weight", "activation"])
def test_a_merge_with_all_weight_on_the_second_network_is_that_network(norm: str, match: str) -> None:
    x, data = torch.randn(6, 3), torch.randn(64, 3)
    for seed in range(2):
        first, second = (_network("behind", "amax", norm, "relu", 1, seed=k) for k in (seed, seed + 50))
        merged = vfx.merge(
            [first, second], x, data=[data], match=match, normalize=None, weights=[0.0, 1.0], progress=False
        )
        torch.testing.assert_close(merged.module(x), second(x), rtol=1e-4, atol=1e-4)


def test_a_norm_of_a_value_that_is_alike_in_all_channels_keeps_its_gains() -> None:
    """One number for all channels, less a mean of each: neither mean nor gain has a scale of its own."""
    torch.manual_seed(0)
    model = net(
        lambda s, x: s.o(torch.tanh(s.n(s.c(x).sum(1, keepdim=True).expand(-1, 6)))),
        c=nn.Linear(3, 4),
        n=nn.BatchNorm1d(6),
        o=nn.Linear(6, 2),
    )
    facts = symmetry(capture(model.eval(), (torch.randn(6, 3),)))
    (group,) = (group for group in facts.groups if group.size == 6)
    assert group.kind is Maps.PERMUTATION
    assert verify(facts) <= EXACT
