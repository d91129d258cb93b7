"""Products with a parameter (x W, x W + b, GPT-2's Conv1D) are linear layers, and passes treat them so.

The reference is a network of ``nn.Linear`` layers with the same weights, turned round.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
import vfx.passes.fold_normalization
from conftest import close
from torch import Tensor, nn
from torch.nn import functional as F
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.reconstruct import Reconstruct

from vfx.alphas import edge_weights
from vfx.analyse.activations import Activation
from vfx.analyse.affines import affines
from vfx.analyse.layer_view import layer_views
from vfx.analyse.layers import number_layers
from vfx.api import collect, layers, merge, trace
from vfx.match.activation import ActivationMatching
from vfx.normalize.catalogue import Normalization
from vfx.program import Program

C, H = 4, 6
ALPHAS = [0.3, 0.7]
X = torch.randn(40, 3, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Products(nn.Module):
    """addmm, a batched matmul without a bias, mm; two of the weights are square."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Module()
        self.first.weight, self.first.bias = nn.Parameter(torch.randn(C, H)), nn.Parameter(torch.randn(H))
        self.second, self.third = nn.Parameter(torch.randn(H, H)), nn.Parameter(torch.randn(H, H))
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.first.bias, x.view(-1, C), self.first.weight).view(-1, 3, H).tanh()
        h = (h @ self.second).tanh()
        h = torch.mm(h.reshape(-1, H), self.third).view(-1, 3, H).tanh()
        return self.head(h.mean(1))


class Linears(nn.Module):
    """The same function in linear layers."""

    def __init__(self, other: Products) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(*size, bias=bias).double() for size, bias in (((C, H), True), ((H, H), False), ((H, H), False))
        )
        self.head = other.head
        with torch.no_grad():
            self.first.weight.copy_(other.first.weight.T)
            self.first.bias.copy_(other.first.bias)
            self.second.weight.copy_(other.second.T)
            self.third.weight.copy_(other.third.T)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(self.third(self.second(h).tanh()).tanh().mean(1))


def _edges() -> tuple[list[nn.Module], list[nn.Module]]:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Products().double().eval())
    return list(models), [Linears(model).eval() for model in models]


@cache
def _programs() -> list[Program]:
    return [trace(models, X[:2]) for models in _edges()]


def test_products_are_numbered_with_the_channel_axis_of_their_outputs() -> None:
    found = [(layer.number, layer.fqn, layer.channel) for layer in number_layers(_programs()[0])]
    assert found == [(1, "first", 1), (2, "second", 2), (3, "third", 1), (4, "head", 1)]


class _Others(nn.Module):
    """Products that are no linear layers with a weight of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, C)), nn.Parameter(torch.randn(C))
        self.register_buffer("fixed", torch.randn(C, C))
        self.head = nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        x = x @ self.fixed
        x = torch.addmm(self.bias, x, self.weight, alpha=2)
        x = torch.addmm(x, x, self.weight)
        return self.head((self.weight @ x.T).T)


def test_other_products_are_not_numbered() -> None:
    assert [layer.fqn for layer in layers(_Others().double(), X[:2])] == ["head"]


def test_the_activation_behind_a_product_is_found_behind_its_view() -> None:
    program = _programs()[0]
    found = [view.activation for view in layer_views(program).values()][:3]
    assert [isinstance(one, Activation) and one.channel for one in found] == [2, 2, 2]


# normalization --------------------------------------------------------------------------------------------------------


def _with_goals(program: Program) -> Program:
    from vfx.passes.align import Align
    from vfx.passes.interpolate import Interpolate

    return Interpolate(ALPHAS)(Align(None, statistics=collect(program, data=X, progress=False))(program))


def _inserted() -> Program:
    """A merged network with random affines behind its products."""
    program = InsertNormalization()(_with_goals(_programs()[0]))
    weights, generator = dict(program.weights[0]), torch.Generator().manual_seed(5)
    for affine in affines(program):
        for name in (affine.scale, affine.shift):
            weights[name] = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
    return program.with_weights([weights])


@torch.no_grad()
def test_folding_goes_into_weights_whose_outputs_stand_on_axis_1() -> None:
    program = _inserted()
    found = list(affines(program))
    folded = FoldNormalization(verify=False)(program)
    assert len(found) == 3
    assert not list(affines(folded))
    assert not any(note.startswith("not folded") for note in folded.notes)
    close(folded(X), program(X), 1e-13)
    before, after = program.weights[0], folded.weights[0]
    for name, bias, affine in zip(("first.weight", "second", "third"), ("first.bias", "", ""), found):
        scale, shift = before[affine.scale].reshape(-1), before[affine.shift].reshape(-1)
        close(after[name], before[name] * scale[None, :], 1e-15)
        own = before[bias] * scale + shift if bias else shift
        close(after[bias or name + "_bias"], own, 1e-15)


@torch.no_grad()
def test_the_other_axis_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: square weights scaled as a linear call's would be."""
    program = _inserted()
    second = [affine for affine in affines(program) if affine.layer.name.startswith("matmul")]
    assert len(second) == 1
    monkeypatch.setattr(vfx.passes.fold_normalization, "output_axis", lambda node: int("addmm" in str(node.target)))
    folded = FoldNormalization(verify=False)(program)
    assert (folded(X) - program(X)).abs().max() > 1e-3 * program(X).abs().max()


METHODS: list[Any] = ["repair", Normalization("repair", site="activation"), "bias_removal", "bias_calibration"]
METHODS += ["rescale_weights"]


@pytest.mark.parametrize("match", [None, "activation"])
@torch.no_grad()
def test_merging_gives_what_it_gives_on_linear_layers(match: str | None) -> None:
    for method in METHODS:
        results = [_merged(program, match, method) for program in _programs()]
        close(results[0](X), results[1](X), 1e-9)
        plain = _merged(_programs()[0], match, None)(X)
        assert (plain - results[0](X)).abs().max() > 1e-4 * plain.abs().max(), method


def _merged(program: Program, match: str | None, method: Any) -> nn.Module:
    options: dict[str, Any] = {"data": X, "match": match, "weights": ALPHAS, "normalize": method, "progress": False}
    return merge(program, X[:2], **options).module


@torch.no_grad()
def test_least_squares_gives_what_it_gives_on_linear_layers() -> None:
    outputs = []
    for edges in _programs():
        merged = _with_goals(edges)
        solved = Reconstruct(edges, X, weights=ALPHAS, progress=False)(merged)
        assert not any("reconstruction" in note for note in solved.notes)
        outputs.append(solved(X))
    close(outputs[0], outputs[1], 1e-8)
    goal = sum(a * model(X) for a, model in zip(edge_weights(ALPHAS, 2), _edges()[0]))
    assert F.mse_loss(outputs[0], goal) < F.mse_loss(merged(X), goal)


# GPT-2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # theirs
@torch.no_grad()
def test_gpt2_is_normalised_layer_by_layer_and_folded() -> None:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(transformers.GPT2LMHeadModel(config).double().eval())
    tokens = torch.randint(0, 31, (24, 8), generator=torch.Generator().manual_seed(1))
    own = [layer.fqn for layer in layers(models[0], tokens[:2])][:-1]  # the last one is the head, tied
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert own == [f"transformer.h.{k}.{name}" for k in (0, 1) for name in parts]
    permuted = ActivationMatching(classes="permutation")  # rotations of queries and keys change their deviations
    result = merge(models, tokens[:2], data=tokens, match=permuted, normalize="repair", progress=False)
    assert result.report.own_class
    assert not any(note.startswith("not folded") for note in result.report.notes)
    statistics = collect(trace([result.module, *models], tokens[:2]), data=tokens, progress=False)
    for layer in layers(models[0], tokens[:2]):
        if layer.fqn in own:
            goal = statistics.goals()[layer.node]
            std = goal.std[1:].mean(0).sort().values  # the second edge's channels are in another order
            assert abs(float(goal.std[0].mean() / std.mean()) - 1) < 1e-8, layer.fqn
