"""Channels cut apart and put together again: their group is kept where the same is done to all parts, not elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import close
from torch import Tensor, nn

from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import verify
from vfx.api import symmetry
from vfx.resize import resize

C = 6
EXACT = 1e-10
X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Step = Callable[[Tensor], Tensor]


class _Net(nn.Module):
    """A layer of C channels, a step on (N, tokens, C), a layer behind it."""

    def __init__(self, step: Step, size: int) -> None:
        super().__init__()
        self.step = step
        self.first, self.last = nn.Linear(5, C), nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self.first(x)))


def _facts(step: Step, size: int = C) -> Symmetry:
    torch.manual_seed(0)
    return symmetry(_Net(step, size).double(), X)


def _cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


TOGETHER: dict[str, Step] = {
    "chunks in another order": lambda x: _cat(*x.chunk(2, -1)[::-1]),
    "three parts of different sizes": lambda x: _cat(x[..., 3:], x[..., 1:3], x[..., :1]),
    "parts of a part": lambda x: _cat(x[..., :4][..., 2:], x[..., 4:], x[..., :4][..., :2]),
    "narrow": lambda x: _cat(x.narrow(-1, 3, 3), x.narrow(-1, 0, 3)),
    "the same function of both": lambda x: _cat(*(part.relu() * 2 for part in x.chunk(2, -1)[::-1])),
    "the same movement of both": lambda x: _cat(*(part.transpose(0, 1)[1:] for part in x.split(2, -1))),
    "and apart again": lambda x: _cat(*_cat(*x.chunk(2, -1)[::-1]).chunk(3, -1)),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_parts_put_together_are_one_group(name: str) -> None:
    facts = _facts(TOGETHER[name])
    assert [group.size for group in facts.groups] == [C]
    assert verify(facts) <= EXACT


@pytest.mark.parametrize("name", ["chunks in another order", "three parts of different sizes"])
@torch.no_grad()
def test_parts_may_lose_channels_unevenly(name: str) -> None:
    facts = _facts(TOGETHER[name])
    kept = np.array([0, 1, 2, 5])
    small = resize(facts.program, facts, {0: kept}).program
    weights = dict(facts.program.weights[0])
    (read,) = (member for member in facts.groups[0].members if member.role == "in")
    gone = np.setdiff1d(np.arange(C), kept)
    weights[read.fqn] = weights[read.fqn].index_fill(1, torch.from_numpy(read.position[gone].reshape(-1)), 0)
    close(small(X), facts.program.with_weights([weights])(X), 1e-12)


# name: (step, sizes of the groups that are read, width behind it)
APART: dict[str, tuple[Step, list[int], int]] = {
    "different functions": (lambda x: _cat(x[..., :3].relu(), x[..., 3:].tanh()), [3, 3], C),
    "parts of two values": (lambda x: _cat(x[..., :3], x.tanh()[..., 3:]), [3, 3], C),
    "different tokens": (lambda x: _cat(x[:, :2, :3], x[:, 2:, 3:]), [3, 3], C),
    "different constants": (lambda x: _cat(x[..., :2] * 2, x[..., 2:] * 3), [2, 4], C),
    "one part read on its own": (lambda x: _cat(*x.chunk(2, -1)[::-1]) * x[..., :3].sum(-1, True), [3, 3], C),
    "another value between": (lambda x: _cat(x[..., :2], x.mean(-1, True), x[..., 2:]), [2, 4], C + 1),
    "one part is missing": (lambda x: _cat(x[..., 4:], x[..., :2]), [4], 4),
    "one part twice": (lambda x: _cat(x[..., :3], x[..., :3]), [3], C),
    "added to itself": (lambda x: x + _cat(*x.chunk(2, -1)[::-1]), [3], C),
    "along another axis": (lambda x: torch.cat([x[..., :3], x[..., :3].exp()], 1), [3], 3),
}


@pytest.mark.parametrize("name", APART)
def test_parts_used_apart_are_groups_of_their_own(name: str) -> None:
    step, sizes, width = APART[name]
    facts = _facts(step, width)
    assert sorted(group.size for group in facts.groups) == sorted(sizes)
    assert verify(facts) <= EXACT
