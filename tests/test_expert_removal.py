"""Experts that a router chooses from: removed by what they add, from networks in every way of writing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from micro_models import net
from test_experts import IDS, _one_after_the_other, _routed, _sorted_rows, language_model
from torch import Tensor, nn
from vfx.passes.remove_channels import RemoveChannels

from vfx.analyse.symmetry import symmetry
from vfx.api import prune_structured, trace
from vfx.errors import ArgumentError, PassError
from vfx.pruning.experts import expert_groups, expert_layers, expert_scores
from vfx.resize import RemovalUnits, resize
from vfx.resize.masked import masked_error

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
EXACT, BROKEN = 1e-10, 1e-3
EXPERTS, WIDTH = 5, 6


class Mixture(nn.Module):
    """Two of five experts for each row, their tensors looked up by number; ``left`` are those that the router knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 9, WIDTH) * torch.tensor([1, 0.2, 2, 0.5, 1.5])[:, None, None])
        self.bias = nn.Parameter(torch.randn(EXPERTS, 9))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 9) / 3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        gates, numbers = self.router(x).topk(2, -1)
        hidden = torch.einsum("nkhi,ni->nkh", self.up[numbers], x) + self.bias[numbers]
        each = torch.einsum("nkoh,nkh->nko", self.down[numbers], F.gelu(hidden))
        return self.head(x + (each * gates.softmax(-1)[..., None]).sum(1))  # type: ignore[no-any-return]

    def literally(self, x: Tensor, left: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs when the router knows these experts alone, the gates (rows, experts), the experts' outputs."""
        logits = torch.full((len(x), EXPERTS), float("-inf"), dtype=x.dtype)
        logits[:, left] = self.router(x)[:, left]
        best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(2, -1)[1], True)
        gates = logits.masked_fill(~best, float("-inf")).softmax(-1)
        outputs = [self.down[e] @ F.gelu(self.up[e] @ x.T + self.bias[e][:, None]) for e in range(EXPERTS)]
        each = torch.stack([one.T for one in outputs], 1)
        return self.head(x + (gates[..., None] * each).sum(1)), gates, each


def _mixture() -> Mixture:
    return Mixture().double().eval()


X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "rows sorted by expert": (lambda: language_model("Mixtral"), IDS),
    "matrices looked up": (lambda: language_model("Mixtral", "batched_mm"), IDS),
    "biases of experts": (lambda: language_model("GptOss"), IDS),
    "one after the other": (lambda: language_model("Phimoe"), IDS),
    "vectors, sorted": (lambda: _routed(_sorted_rows), ROWS),
    "vectors, one after the other": (lambda: _routed(_one_after_the_other), ROWS),
}


@torch.no_grad()
def test_scores_are_what_the_router_weighs() -> None:
    model = _mixture()
    program = trace(model, X[:2])
    facts = symmetry(program)
    (group,) = expert_groups(facts)
    _, gates, each = model.literally(X, list(range(EXPERTS)))
    added = gates * each.norm(dim=-1)
    wanted = added.sum(0) / (gates > 0).sum(0)
    found = expert_scores(program, facts, [[X[:40]], [X[40:]]])
    close(torch.from_numpy(found[group]), wanted, EXACT)
    assert not any(found[g.index].any() for g in facts.groups if g.index != group)
    assert (torch.from_numpy(found[group]) - added.mean(0)).abs().max() > BROKEN  # the control: of tokens sent there


@torch.no_grad()
@pytest.mark.parametrize(("share", "count"), [(0.2, 1), (0.4, 2), (0.6, 3)])
def test_what_is_left_is_the_network_whose_router_knows_the_others(share: float, count: int) -> None:
    model = _mixture()
    program = trace(model, X[:2])
    (layer,) = expert_layers(program, symmetry(program))
    order = np.argsort(expert_scores(program, symmetry(program), [[X]])[layer.group.index])
    left = sorted(order[count:].tolist())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"units": "experts", "data": X, "solve": None, "normalize": None, "progress": False}
    result = prune_structured(model, X[:2], sparsity=share, **options)
    close(result(X), model.literally(X, left)[0], EXACT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sizes = {name: tuple(tensor.shape) for name, tensor in result.state_dict().items()}
    assert sizes["up"] == (EXPERTS - count, 9, WIDTH)
    assert sizes["router.weight"] == (EXPERTS - count, WIDTH)
    assert sizes["head.weight"] == (3, WIDTH)  # nothing but experts
    assert result.report.choices["score"] == "router"
    other = [e for e in range(EXPERTS) if e not in left] + left[count:]
    assert (model.literally(X, other)[0] - result(X)).abs().max() > BROKEN  # the control: which ones go matters


def test_as_many_stay_as_the_router_chooses() -> None:
    found = RemoveChannels(0.95, units="experts", progress=False).run(trace(_mixture(), X[:2]))
    assert found.program.weights[0]["up"].shape[0] == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_experts_go_however_they_are_written(name: str) -> None:
    build, x = NETWORKS[name]
    model = build()
    program = trace(model, x)
    facts = symmetry(program)
    groups = expert_groups(facts)
    assert groups
    record = RemoveChannels(0.5, "router", units="experts", data=[x], progress=False).run(program).record
    assert {g.index for g in facts.groups if record.sizes[g.index] < g.size} == groups
    assert record.error is not None
    assert record.error < EXACT
    slots = RemovalUnits(facts, experts=True)
    kept = {g.index: np.arange(g.size) for g in facts.groups} | {g: np.array([0, 3]) for g in groups}
    wrong = kept | {g: np.array([1, 3]) for g in groups}
    small = resize(program, facts, {g: kept[g] for g in groups}, slots=slots)
    assert masked_error(program, facts, small, kept) < EXACT
    assert masked_error(program, facts, small, wrong) > BROKEN  # the control: other experts


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="give units='experts'"):
        RemoveChannels(0.5, "router", data=X)
    with pytest.raises(PassError, match="no experts"):
        RemoveChannels(0.5, units="experts", progress=False)(
            trace(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), ROWS)
        )
    with pytest.raises(ArgumentError, match="folding merges"):
        prune_structured(_mixture(), X[:2], units="experts", method="fold", sparsity=0.4, progress=False)
    assert not expert_groups(symmetry(trace(net(lambda s, x: s.a(x), a=nn.Linear(6, 4)), ROWS)))
