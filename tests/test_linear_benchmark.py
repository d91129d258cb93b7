"""The benchmark of linear networks: what it takes apart adds up, and its page is what the figures say."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import linear
from benchmarks.fashion import RESULTS
from benchmarks.linear import anatomy, markdown, shares
from vfx.diagnosis.linear import linear_layers
from vfx.models import linear_net

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("residual", [False, True])
def test_feature_and_offset_are_those_of_the_first_layers(residual: bool) -> None:
    torch.manual_seed(0)
    model = linear_net(4, 8, 6, 3, residual).double().eval()
    found = anatomy(model, X)
    first, second, *_ = model.layers
    step = (lambda x: x + second(x)) if residual else second
    with torch.no_grad():
        zero = first(torch.zeros_like(X))
        expected = [first(X) - zero, step(first(X)) - step(zero)]
    assert found["feature"][:2] == pytest.approx([float(x.norm(dim=1).mean()) for x in expected], rel=1e-12)
    assert found["offset"][0] == pytest.approx(float(zero[0].norm()), rel=1e-12)
    assert len(found["orders"]) == (3 if residual else 1)


def test_parts_that_do_not_add_up_to_the_outputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    monkeypatch.setattr(linear, "linear_layers", lambda program: linear_layers(program)[:1])
    with pytest.raises(ValueError, match="differ from the outputs"):
        anatomy(model, X)


def test_the_page_is_what_the_figures_say() -> None:
    results = json.loads((RESULTS / "linear.json").read_text())
    assert (RESULTS / "linear.md").read_text() == markdown(results)
    plain = results["8 layers"]
    assert shares(plain, "averaged", "feature")[-1] < 0.05
    assert shares(plain, "aligned by all maps", "feature")[-1] > 0.9
