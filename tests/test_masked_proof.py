"""What the proof of structured pruning compares: every operator over channels, every value, at every precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from micro_models import net
from torch import Tensor, nn
from torch.nn import functional as F

from vfx.analyse.symmetry import symmetry
from vfx.api import merge, prune_structured, trace
from vfx.errors import DataError, VerificationError
from vfx.operators import REGISTRY
from vfx.proof import PRESERVED, in_double, outputs_error, relative_error, same_function, trials
from vfx.resize import resize
from vfx.resize.masked import masked_error

BROKEN = 1e-3
INF, NAN = float("inf"), float("nan")


def _between(f: Callable[[Tensor], Tensor], width: int = 8) -> nn.Module:
    """Two linear layers with something over the channels between them."""
    torch.manual_seed(0)
    return net(lambda s, x: s.c(f(s.a(x))), a=nn.Linear(5, width), c=nn.Linear(width, 3)).eval()


def _x(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


OVER_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "nanmean": lambda h: h - h.nanmean(1, keepdim=True),
    "kthvalue": lambda h: h - h.kthvalue(3, 1, True)[0],
    "nanmedian": lambda h: h - h.nanmedian(1, True)[0],
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True),
    "special_logsumexp": lambda h: h - torch.special.logsumexp(h, 1, keepdim=True),
    "aminmax": lambda h: h - h.aminmax(dim=1, keepdim=True)[1],
    "count_nonzero": lambda h: h * (h + 1).count_nonzero(1)[:, None],
    "all": lambda h: h * (h > -9).all(1, keepdim=True),
    "safe_softmax": lambda h: torch.ops.aten._safe_softmax(h, 1),
    "topk": lambda h: h - h.topk(3, 1)[0].mean(1, keepdim=True),
    "cosine": lambda h: h * F.cosine_similarity(h + 1, h.exp(), 1)[:, None],
    "rms_norm": lambda h: F.rms_norm(h, h.shape[1:]),
    "deviation": lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True),
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_operators_over_channels_run_over_those_kept(name: str) -> None:
    model, x = _between(OVER_CHANNELS[name]), _x(4, 5)
    result = prune_structured(model, x, sparsity=0.5, normalize=None, progress=False)
    assert result.report.params_ratio < 0.6
    assert result.report.error <= PRESERVED
    assert result.module(x).isfinite().all()


def test_distances_to_a_parameter_are_between_the_channels_kept() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 8), "places": nn.Parameter(torch.randn(6, 8)), "c": nn.Linear(6, 3)}
    model = net(lambda s, x: s.c(torch.cdist(s.a(x), s.places)), **layers).eval()
    program = trace(model, _x(4, 5), dynamic_shapes=None)  # torch fixes the batch where there are distances
    result = prune_structured(program, sparsity=0.5, normalize=None, progress=False)
    assert result.report.params_ratio < 0.6
    assert result.report.error <= PRESERVED


@pytest.mark.parametrize(("equation", "widths"), [("ni,ij,jk->nk", (5, 8, 3)), ("ni,ij,jk,kl->nl", (5, 8, 6, 3))])
def test_channels_between_parameters_of_one_einsum_are_removed(equation: str, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    factors = {f"w{k}": nn.Parameter(torch.randn(a, b)) for k, (a, b) in enumerate(pairwise(widths))}
    model = net(lambda s, x: torch.einsum(equation, x, *(getattr(s, name) for name in factors)), **factors).eval()
    result = prune_structured(model, _x(4, 5), sparsity=0.5, normalize=None, progress=False)
    left = [tuple(result.module.state_dict()[name].shape) for name in factors]
    assert left == list(pairwise([5, *(width // 2 for width in widths[1:-1]), 3]))
    assert result.report.error <= PRESERVED


@pytest.mark.parametrize("equation", ["", "or,ri->oi"])
def test_the_rank_between_two_factors_of_a_weight_is_removed(equation: str) -> None:
    torch.manual_seed(0)
    product = (lambda b, a: torch.einsum(equation, b, a)) if equation else torch.mm
    factors = {"b": nn.Parameter(torch.randn(8, 6)), "a": nn.Parameter(torch.randn(6, 5))}
    model = net(lambda s, x: s.c(F.linear(x, product(s.b, s.a)).relu()), c=nn.Linear(8, 3), **factors).eval()
    result = prune_structured(model, _x(4, 5), sparsity=0.5, normalize=None, progress=False)
    assert tuple(result.module.state_dict()["b"].shape) == (4, 3)
    assert result.report.error <= PRESERVED


def test_a_rule_that_is_not_known_to_see_zeros_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "aten.logsumexp", replace(REGISTRY["aten.logsumexp"], reads_all=False))
    with pytest.raises(VerificationError, match="differs from the masked one"):
        prune_structured(_between(OVER_CHANNELS["logsumexp"]), _x(4, 5), sparsity=0.5, normalize=None, progress=False)


def _landmarks(self: Any, x: Tensor) -> Tensor:
    """Attention over mixed tokens (Linformer): they are what no layer carries along."""
    q, k, v = self.q(x), self.e(x.transpose(1, 2)).transpose(1, 2), self.f(x.transpose(1, 2)).transpose(1, 2)
    return self.h(F.scaled_dot_product_attention(q, k, v).mean(1))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_runs_over_the_keys_kept_at_the_scale_of_the_network(scale: float | None) -> None:
    torch.manual_seed(0)
    forward = _landmarks if scale is None else (
        lambda s, x: s.h(F.scaled_dot_product_attention(s.q(x), s.q(x), s.q(x), scale=scale).mean(1))
    )  # fmt: skip
    model = net(forward, q=nn.Linear(8, 8), e=nn.Linear(6, 4), f=nn.Linear(6, 4), h=nn.Linear(8, 3)).eval()
    result = prune_structured(model, _x(2, 6, 8), sparsity=0.5, normalize=None, progress=False)
    assert result.report.params_ratio < 1
    assert result.report.error <= PRESERVED


# what is not a number proves nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0, NAN], [1.0, NAN]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, INF], [1.0, NAN]),
        ([1.0, 2.0], [1.0, INF]),
        ([INF, INF], [INF, INF]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_no_value_is_passed_over(x: list[float], y: list[float]) -> None:
    assert relative_error(torch.tensor(x), torch.tensor(y)) == INF
    assert outputs_error({"a": torch.ones(2), "b": torch.tensor(x)}, {"a": torch.ones(2), "b": torch.tensor(y)}) == INF


def test_networks_that_are_not_defined_everywhere_are_proved_on_the_examples() -> None:
    model, x = net(lambda s, x: s.a(x.sqrt()), a=nn.Linear(5, 3)).double().eval(), torch.rand(4, 5).double()
    program = trace(model, x)
    (trial,) = trials(program)
    assert torch.equal(trial.inputs[0], x)
    assert trial.expected.isfinite().all()
    assert same_function(program, program) == 0
    broken = {**program.weights[0], "a.bias": program.weights[0]["a.bias"] + 1}
    assert same_function(program, program.with_weights([broken])) > BROKEN
    nowhere = trace(model, -x)
    assert same_function(nowhere, nowhere) == INF


def test_edges_that_give_no_numbers_are_not_called_the_same() -> None:
    models = [net(lambda s, x: s.a(x).log(), a=nn.Linear(5, 3, bias=False)).eval() for _ in range(2)]
    for model in models:
        model.a.weight.data.fill_(-1.0)
    with pytest.raises(DataError, match="NaN"):
        merge(models, torch.rand(4, 5) + 0.1, match=None, progress=False)


def _inverse_spread(h: Tensor) -> Tensor:
    """A norm written by hand that divides 0 by 0 where one channel is left."""
    h = h - h.mean(1, keepdim=True)
    return h / h.square().sum(1, keepdim=True).sqrt()


def test_a_network_that_became_undefined_is_refused() -> None:
    model, x = _between(_inverse_spread), _x(4, 5)
    with pytest.raises(VerificationError, match="too few channels"):
        prune_structured(model, x, sparsity=0.9, normalize=None, progress=False)
    assert prune_structured(model, x, sparsity=0.5, normalize=None, progress=False).report.error <= PRESERVED


@pytest.mark.parametrize(("name", "least"), [("deviation", 2), ("kthvalue", 3), ("topk", 3), ("nanmean", 1)])
def test_as_many_channels_stay_as_operators_need(name: str, least: int) -> None:
    result = prune_structured(_between(OVER_CHANNELS[name]), _x(4, 5), sparsity=0.95, normalize=None, progress=False)
    assert [width.after for width in result.report.widths] == [least]
    assert any("instead of 5%" in note for note in result.report.notes) is (least > 1)


# rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_norms_are_proved_without_their_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), normed, nn.ReLU(), nn.Linear(16, 3)).to(dtype).eval()
    program = trace(model, _x(2, 8).to(dtype))
    facts = symmetry(program)
    kept = {group.index: np.arange(8) for group in facts.groups}
    small = resize(program, facts, kept)
    assert masked_error(program, facts, small, kept) <= PRESERVED
    (gain,) = small.exact[0]
    stored = small.program.weights[0][gain]
    assert torch.equal(stored, small.exact[0][gain].to(dtype))
    rounded = in_double(small.program)(_x(2, 8).double())
    exact = in_double(small.program.with_weights([{**small.program.weights[0], **small.exact[0]}]))(_x(2, 8).double())
    assert 1e-9 < relative_error(exact, rounded) < 1e-1  # negative control: the rounding alone is above the limit


def test_the_batch_of_the_proof_is_small() -> None:
    program = trace(_between(torch.relu), _x(64, 5))
    assert program.with_samples(2).example_inputs[0].shape == (2, 5)
    assert program.with_samples(100).example_inputs[0].shape == (64, 5)
    assert program.batch_of([_x(7, 5)]) == 7
