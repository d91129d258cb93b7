"""The tables beside the peers: which channels a peer left, how far ahead we are, and what masks leave behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import close
from micro_models import net
from torch import nn

from benchmarks.channel_peers import OURS, kept_channels, shown
from benchmarks.fine_tuning import left
from vfx.analyse.symmetry import symmetry
from vfx.api import prune, trace
from vfx.emit.module import graph_module
from vfx.resize import resize

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_channels_that_a_peer_left_are_those_that_stay() -> None:
    torch.manual_seed(0)
    model = net(lambda s, x: s.c(s.b(s.a(x).relu()).relu()), a=nn.Linear(5, 7), b=nn.Linear(7, 6), c=nn.Linear(6, 3))
    program = trace(model, X)
    facts = symmetry(program)
    small = graph_module(resize(program, facts, kept_channels(facts, {"a": {1, 4}, "b": {0}})).program)
    a, b = [0, 2, 3, 5, 6], [1, 2, 3, 4, 5]
    hidden = (X @ model.a.weight[a].T + model.a.bias[a]).relu()
    hidden = (hidden @ model.b.weight[b][:, a].T + model.b.bias[b]).relu()
    wanted = hidden @ model.c.weight[:, b].T + model.c.bias
    close(small(X), wanted, 1e-6)
    other = graph_module(resize(program, facts, kept_channels(facts, {"a": {1, 3}, "b": {0}})).program)
    assert (other(X) - wanted).abs().max() > 1e-3  # the control


def test_the_lead_has_the_error_of_paired_samples() -> None:
    difference = np.array([1] * 30 + [-1] * 10 + [0] * 60)
    lead, error = difference.mean(), difference.std() / math.sqrt(100)
    cell = {"accuracy": 70.0, "ours_alone_right": 30, "peer_alone_right": 10}
    assert shown("L2", cell, 100) == f"70.00 ({100 * lead:+.2f} ± {100 * error:.2f})"
    assert shown(OURS, cell | {"allocation": "uniform"}, 100) == "70.00"
    assert shown(OURS, cell | {"allocation": "global"}, 100) == "70.00, global"


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_left_is_counted_behind_the_training(kept: bool) -> None:
    """Masks in force stay through a step; zeros alone do not: the control."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    masks = "parametrize" if kept else "permanent"
    module = prune(model, X, sparsity=0.5, score="magnitude", masks=masks, progress=False).module
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(X).square().sum().backward()
    optimizer.step()
    share = left(module, model, of_weights=True)
    assert (share == 0.5) == kept
