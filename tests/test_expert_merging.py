"""Experts merged in place of removed: the nearest, the alignment and the averages against their formulas."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import close
from test_expert_removal import BROKEN, EXACT, EXPERTS, NETWORKS, Mixture, X, _mixture
from torch import Tensor, nn
from vfx.passes.remove_channels import RemoveChannels

from vfx.analyse.symmetry import symmetry
from vfx.api import prune_structured, trace
from vfx.errors import ArgumentError
from vfx.pruning.expert_merging import aligned, merged_experts
from vfx.pruning.experts import expert_groups, expert_layers, expert_totals

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
KEPT = [0, 2, 4]
OPTIONS: dict[str, Any] = {"units": "experts", "solve": None, "normalize": None, "progress": False}


def _kept(model: nn.Module, left: list[int]) -> tuple[Any, Any, dict[int, np.ndarray]]:
    program = trace(model, X[:2])
    facts = symmetry(program)
    (index,) = expert_groups(facts)
    kept = {g.index: np.arange(g.size) for g in facts.groups} | {index: np.array(left)}
    return program, facts, kept


def _permuted(model: Mixture, expert: int, order: Tensor) -> None:
    """Put the hidden channels of one expert into another order."""
    with torch.no_grad():
        model.up[expert], model.bias[expert] = model.up[expert][order], model.bias[expert][order]
        model.down[expert] = model.down[expert][:, order]


def _twins(noise: float = 0.0) -> Mixture:
    """A mixture whose expert 1 is expert 4 and whose expert 3 is expert 0, hidden channels shuffled."""
    model = _mixture()
    generator = torch.Generator().manual_seed(2)
    for copy, source in ((1, 4), (3, 0)):
        with torch.no_grad():
            for tensor in (model.up, model.bias, model.down):
                tensor[copy] = tensor[source] + noise * torch.randn(tensor[0].shape, generator=generator).double()
        _permuted(model, copy, torch.randperm(9, generator=generator))
    return model


@torch.no_grad()
def _literal_losses(model: Mixture) -> Tensor:
    """Σ g_r² ‖f_k − f_r‖² of every pair (r, k)."""
    _, gates, each = model.literally(X, list(range(EXPERTS)))
    off = (each[:, None] - each[:, :, None]).square().sum(-1)  # rows, r, k
    return (gates.square()[..., None] * off).sum(0)


@torch.no_grad()
@pytest.mark.parametrize("batches", [[[X]], [[X[:40]], [X[40:]]]])
def test_each_goes_where_the_output_changes_least(batches: list[list[Tensor]]) -> None:
    model = _mixture()
    program, facts, kept = _kept(model, KEPT)
    weights, clusters = merged_experts(program, facts, kept, batches)
    (cluster,) = clusters.values()
    losses = _literal_losses(model)[:, KEPT]
    wanted = [KEPT[int(losses[r].argmin())] if r not in KEPT else r for r in range(EXPERTS)]
    assert cluster.label.tolist() == wanted
    assert len(set(losses.argmin(1).tolist())) > 1  # the formula does not send all to one
    _, gates, _ = model.literally(X, list(range(EXPERTS)))
    tokens = (gates > 0).sum(0).double()
    for k in KEPT:
        members = [r for r in range(EXPERTS) if wanted[r] == k]
        share = tokens[members] / tokens[members].sum()
        close(weights["router.weight"][k], share @ model.router.weight[members], EXACT)
        close(weights["router.bias"][k], share @ model.router.bias[members], EXACT)
        close(cluster.average[k, members], share, EXACT)


@torch.no_grad()
def test_averages_are_of_hidden_channels_in_the_best_order() -> None:
    """Against all orders of four hidden channels."""
    model = _mixture()
    for name in ("up", "bias"):
        setattr(model, name, nn.Parameter(getattr(model, name)[:, :4].clone()))
    model.down = nn.Parameter(model.down[..., :4].clone())
    program, facts, kept = _kept(model, [0])
    weights, clusters = merged_experts(program, facts, kept, None)
    rows = torch.cat([model.up, model.bias[..., None], model.down.mT], 2)  # experts, hidden, what stands there
    orders = [list(order) for order in permutations(range(4))]

    def nearest(expert: Tensor) -> Tensor:
        return min((expert[o] for o in orders), key=lambda each: float((each - rows[0]).square().sum()))

    mean = torch.stack([nearest(expert) for expert in rows]).mean(0)
    close(weights["up"][0], mean[:, :6], EXACT)
    close(weights["bias"][0], mean[:, 6], EXACT)
    close(weights["down"][0], mean[:, 7:].T, EXACT)
    assert (weights["up"][0] - model.up.mean(0)).abs().max() > BROKEN  # the control: orders as they are
    (cluster,) = clusters.values()
    close(cluster.average[0], torch.full((5,), 0.2, dtype=torch.float64), EXACT)


@torch.no_grad()
@pytest.mark.parametrize("data", [None, X])
def test_shuffled_twins_merge_into_what_they_were(data: Tensor | None) -> None:
    """Both experts of a pair are equal, so that their tensors come out exactly."""
    model = _twins()
    program, facts, kept = _kept(model, KEPT)
    weights, clusters = merged_experts(program, facts, kept, None if data is None else [[data]])
    (cluster,) = clusters.values()
    assert cluster.label.tolist() == [0, 4, 2, 0, 4]
    for name in ("up", "bias", "down"):
        close(weights[name][KEPT], getattr(model, name)[KEPT], EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixture", *NETWORKS])
def test_alignment_keeps_the_function(name: str) -> None:
    build, x = NETWORKS.get(name, (_mixture, X[:8]))
    model = build().double()
    x = x.double() if x.is_floating_point() else x
    program = trace(model, x)
    facts = symmetry(program)
    dense = program(x)
    for layer in expert_layers(program, facts):
        label = np.zeros(layer.group.size, np.int64)
        moved = aligned(facts, layer, program.weights[0], label)
        close(program.with_weights([dict(program.weights[0]) | moved])(x), dense, EXACT)
        inside = [g for g in facts.groups if g.parent == layer.group.index]
        assert any(not torch.equal(moved[n], program.weights[0][n]) for n in moved) == bool(inside)
        if inside:  # the control: one tensor alone in the new order
            first = next(iter(moved))
            broken = dict(program.weights[0]) | {first: moved[first]}
            assert (program.with_weights([broken])(x) - dense).abs().max() > BROKEN


@torch.no_grad()
@pytest.mark.parametrize("data", [None, X])
def test_the_smaller_network_is_that_of_the_merged_tensors(data: Tensor | None) -> None:
    model = _twins(0.1)
    score = [1.0, 0.0, 1.0, 0.0, 1.0]
    program, facts, kept = _kept(model, KEPT)
    (index,) = expert_groups(facts)
    scores = {g.index: np.ones(g.shape) for g in facts.groups} | {index: np.array(score)}
    weights, _ = merged_experts(program, facts, kept, None if data is None else [[data]])
    wanted = _mixture()
    wanted.load_state_dict(weights)
    results = {
        how: prune_structured(model, X[:2], sparsity=0.4, score=scores, data=data, experts=how, **OPTIONS)
        for how in ("remove", "merge")
    }
    close(results["merge"](X), wanted.literally(X, KEPT)[0], EXACT)
    assert results["merge"].report.choices["experts"] == "merge"
    close(results["remove"](X), model.literally(X, KEPT)[0], EXACT)
    assert (results["remove"](X) - results["merge"](X)).abs().max() > BROKEN  # the control: it does something


@torch.no_grad()
def test_a_copied_expert_with_the_router_of_the_first_costs_nothing_solved() -> None:
    """Twins whose logits are equal: merged and kept rows are alike, and the mean of both rows is each of them."""
    model = _twins()
    for copy, source in ((1, 4), (3, 0)):
        model.router.weight[copy], model.router.bias[copy] = model.router.weight[source], model.router.bias[source]
    program, facts, kept = _kept(model, KEPT)
    weights, _ = merged_experts(program, facts, kept, [[X]])
    close(weights["router.weight"][KEPT], model.router.weight[KEPT], EXACT)


@pytest.mark.parametrize("name", NETWORKS)
def test_experts_merge_however_they_are_written(name: str) -> None:
    build, x = NETWORKS[name]
    program = trace(build(), x)
    facts = symmetry(program)
    groups = expert_groups(facts)
    for data in ([x], None):
        score = "magnitude" if data is None else "router"
        done = RemoveChannels(0.5, score, units="experts", experts="merge", data=data, progress=False).run(program)
        assert {g.index for g in facts.groups if done.record.sizes[g.index] < g.size} == groups
        assert done.record.error is not None
        assert done.record.error < EXACT
    plain = RemoveChannels(0.5, "magnitude", units="experts", progress=False).run(program)
    merged, removed = (run.program(x) for run in (done, plain))
    assert (merged - removed).abs().max() > BROKEN  # the control: equal shares without data


def test_merged_experts_are_solved() -> None:
    model = _mixture()
    options = OPTIONS | {"solve": "least_squares", "sparsity": 0.4, "data": X, "experts": "merge"}
    result = prune_structured(model, X[:2], **options)
    bare = prune_structured(model, X[:2], **options | {"solve": None})
    off = [float((r(X) - model(X)).square().sum().detach()) for r in (result, bare)]
    assert off[0] < 0.8 * off[1]


def test_totals_count_the_tokens() -> None:
    model = _mixture()
    program, facts, _ = _kept(model, KEPT)
    _, gates, _ = model.literally(X, list(range(EXPERTS)))
    _, tokens = expert_totals(program, expert_layers(program, facts), [[X[:30]], [X[30:]]])
    assert next(iter(tokens.values())).tolist() == (gates > 0).sum(0).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "merge"}, "give units='experts'"),
        ({"experts": "join", "units": "experts"}, "choose 'remove' or 'merge'"),
        ({"experts": "merge", "units": "layers", "data": X}, "leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        prune_structured(_mixture(), X[:2], sparsity=0.4, progress=False, **options)
