"""GroupNorm on residual streams: each group's channels have orders of their own; permuted copies are found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import close, images, network, transported
from torch import Tensor, nn

from vfx.analyse.verify import verify
from vfx.api import collect, merge, prune_structured, symmetry, trace
from vfx.elements import act, permuted
from vfx.match.activation import ActivationMatching
from vfx.match.matcher import Problem

X = images(48, 6)


class Stream(nn.Module):
    """Pre-norm residual blocks on one stream, each with its own number of groups."""

    def __init__(self, norms: Sequence[int], width: int = 16):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(width, 3, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for groups in norms)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in norms)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for norm, layer in zip(self.norms, self.layers):
            h = h + layer(F.silu(norm(h)))
        return self.last(h)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(groups, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.n2, self.c2 = nn.GroupNorm(groups, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.c2(F.silu(self.n2(self.c1(F.silu(self.n1(x))))))


class UNet(nn.Module):
    """One level down and up; the norm behind the concatenation cuts both parts into groups of its own size."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.down, self.middle = Block(width, width, groups), Block(width, 2 * width, groups)
        self.up = Block(3 * width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(self.first(x))
        below = F.interpolate(self.middle(F.avg_pool2d(skip, 2)), scale_factor=2.0)
        return self.last(self.up(torch.cat([below, skip], 1)))


def _inside(model: nn.Module) -> list[tuple[int, int]]:
    """Blocks and size of each group inside others'."""
    facts = symmetry(model.eval(), X[:2])
    assert verify(facts) < 1e-10
    return sorted(group.blocks for group in facts.groups if group.parent is not None)


def test_each_group_of_a_stream_has_an_order_of_its_own() -> None:
    """The stream stands on both axes of a layer's weight, which has its blocks on each."""
    assert _inside(Stream([4])) == [(4, 4)]
    assert _inside(Stream([4, 4])) == [(4, 4)]
    assert _inside(Stream([1])) == []
    assert _inside(Stream([4, 2])) == [(2, 2), (2, 4)]  # one level deep: orders of a half


def test_groups_across_a_concatenation_are_no_blocks_of_one_another() -> None:
    """Norm groups of 12 on parts of 64 and 32: the groups that a part fills may not be permuted channel by channel."""
    facts = symmetry(UNet(32, 8).eval(), X[:2])
    assert verify(facts) < 1e-10
    (whole,) = (group for group in facts.groups if group.size == 5)  # the groups that lie in the first part
    assert whole.parent is None


@torch.no_grad()
def test_orders_that_no_norm_allows_are_noticed() -> None:
    """Control: the same orders in a stream whose norm has other groups are another function."""
    _, facts, element = transported(network(lambda: Stream([4]), X), X)
    other = network(lambda: Stream([8]), X)
    moved = act(facts, permuted(element), trace(other, X[:2]).weights[0])
    twin = Stream([8]).eval()
    twin.load_state_dict(dict(moved))
    assert float((twin(X) - other(X)).abs().max()) > 1e-2


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "stream": lambda: Stream([4]),
    "nested": lambda: Stream([4, 2]),
    "three": lambda: Stream([8, 2, 4]),
    "unet": lambda: UNet(8, 4),
}


@pytest.mark.parametrize("match", ["weight", "activation"])
@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_copies_are_found_again(name: str, match: str) -> None:
    for seed in range(3):
        model = network(NETWORKS[name], X, seed)
        twin, _, _ = transported(model, X, seed)
        result = merge([model, twin], X[:2], data=X, match=match, normalize=None, solve=None, progress=False)
        close(result.module(X), model(X), 1e-4)


def test_pruning_takes_channels_of_each_group() -> None:
    model = network(lambda: Stream([4, 4]), X)
    result = prune_structured(model, X[:2], sparsity=0.5, progress=False)
    assert result.module(X).shape == model(X).shape
    assert result.report.params_ratio < 0.6


def test_restarts_of_activation_matching_keep_the_best() -> None:
    """Groups that share features are matched in turn; other starts lead elsewhere."""
    models = [network(lambda: UNet(8, 4), X, seed) for seed in (0, 1)]
    program = trace(models, X[:2])
    facts = symmetry(program)
    statistics = collect(program, data=X, progress=False)
    for classes in ("full", "permutation"):
        once, more = (ActivationMatching(classes, restarts)(Problem(program, facts, statistics)) for restarts in (0, 3))
        assert more.attempts[0] == once.attempts[0] == once.objective
        assert len({objective for (objective,) in more.attempts}) > 1
        assert more.objective[0] == max(objective for (objective,) in more.attempts)
