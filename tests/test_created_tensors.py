"""Tensors that forward makes itself have the precision of the network they stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from micro_models import net
from torch import Tensor, nn

import vfx
from vfx.analyse.symmetry import symmetry
from vfx.analyse.verify import verify
from vfx.capture.capture import capture

EXACT = 1e-10


def _recurrent(start: Callable[[Tensor], Tensor], cell: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A loop over the steps of a sequence from a state that forward makes."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = start(x)
        for step in range(x.shape[1]):
            h = s.cell(x[:, step], h)
        return s.out(h)

    return lambda: net(forward, cell=cell(), out=nn.Linear(8, 3))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.x(x) + self.h(h))


def _lstm(s: Any, x: Tensor) -> Tensor:
    h, c = torch.zeros(x.shape[0], 8), torch.zeros(x.shape[0], 8)
    for step in range(x.shape[1]):
        h, c = s.cell(x[:, step], (h, c))
    return s.out(h)


def _mixed(mix: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Tokens (N, 3, 4), a layer, tokens mixed by a matrix (3, 3) that forward makes, a layer."""
    return lambda: net(
        lambda s, x: s.out((mix(x) @ torch.relu(s.a(x))).mean(1)), a=nn.Linear(4, 8), out=nn.Linear(8, 3)
    )


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "zeros": _recurrent(lambda x: torch.zeros(x.shape[0], 8), Cell),
    "zeros, GRU cell": _recurrent(lambda x: torch.zeros(x.shape[0], 8), lambda: nn.GRUCell(4, 8)),
    "zeros, RNN cell": _recurrent(lambda x: torch.zeros(x.shape[0], 8), lambda: nn.RNNCell(4, 8)),
    "zeros, LSTM cell": lambda: net(_lstm, cell=nn.LSTMCell(4, 8), out=nn.Linear(8, 3)),
    "ones": _recurrent(lambda x: torch.ones(x.shape[0], 8), Cell),
    "full": _recurrent(lambda x: torch.full((x.shape[0], 8), 0.3), Cell),
    "zeros in float32": _recurrent(lambda x: torch.zeros(x.shape[0], 8, dtype=torch.float32), Cell),
    "new zeros": _recurrent(lambda x: x.new_zeros(x.shape[0], 8), Cell),
    "new zeros in float32": _recurrent(lambda x: x.new_zeros((x.shape[0], 8), dtype=torch.float32), Cell),
    "zeros of a mask": _recurrent(lambda x: torch.zeros(x.shape[0], 8, dtype=torch.bool) * 1.0, Cell),
    "zeros cast": _recurrent(lambda x: torch.zeros(x.shape[0], 8, dtype=torch.int64).to(torch.float32), Cell),
    "eye": _mixed(lambda x: torch.eye(x.shape[1])),
    "arange": _mixed(lambda x: torch.arange(9.0).reshape(3, 3)),
    "linspace": _mixed(lambda x: torch.linspace(0, 1, 9).reshape(3, 3)),
    "triangle": _mixed(lambda x: torch.tril(torch.ones(3, 3))),
    "mask": _mixed(lambda x: torch.full((3, 3), float("-inf")).triu(1).softmax(-1)),
    "divided integers": _mixed(lambda x: _positions(x) / 2),
    "root of integers": _mixed(lambda x: _positions(x).abs().sqrt()),
    "chosen numbers": _mixed(lambda x: torch.where(_positions(x) > 0, 1.0, 0.5)),
    "one-hot": _mixed(lambda x: F.one_hot(_positions(x).abs()[0], 3).float()),
    "a number": _mixed(lambda x: torch.tensor([0.1, 0.2, 0.3]).expand(3, 3)),
    "counted inputs": _mixed(lambda x: ((x > 0).sum(-1) / 4)[:, :, None].expand(-1, -1, 3)),
    "cast to float32": lambda: net(
        lambda s, x: s.out(s.a(x.mean(1)).to(torch.float32).tanh()), a=nn.Linear(4, 8), out=nn.Linear(8, 3)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_proofs_follow_their_precision(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(2, 3, 4)
    assert verify(symmetry(capture(model, (x,)))) <= EXACT
    merged = vfx.merge([model, model], x, match="weight", normalize=None, progress=False)
    close(merged.module(x), model(x), 1e-5)
    smaller = vfx.prune_structured(model, x, sparsity=0.5, progress=False)
    assert smaller.module(x).shape == (2, 3)
    assert sum(p.numel() for p in smaller.module.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_runs_in_other_precisions(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(2, 3, 4)
    program = capture(model, (x,))
    exact = program.to("cpu", torch.float64)
    output = exact(x.double())
    assert output.dtype is torch.float64
    close(output.float(), model(x), 1e-5)
    back = exact.to("cpu", torch.float32)
    assert back(x).dtype is torch.float32
    torch.testing.assert_close(back(x), model(x), rtol=0, atol=1e-6)


def test_numbers_are_made_in_double_precision() -> None:
    """A third of float64, not one of float32 that was cast."""
    model = net(lambda s, x: s.a(x) + torch.full((x.shape[0], 3), 1 / 3), a=nn.Linear(4, 3))
    program = capture(model.eval(), (torch.randn(2, 4),)).to("cpu", torch.float64)
    weights = {name: torch.zeros_like(tensor) for name, tensor in program.weights[0].items()}
    output = program.with_weights([weights])(torch.zeros(2, 4, dtype=torch.float64))
    assert (output == torch.full((2, 3), 1 / 3, dtype=torch.float64)).all()
