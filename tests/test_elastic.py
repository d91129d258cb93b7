"""One ordering of channels, a family of widths: each the network that its own call gives, all from one reading."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close, lively
from micro_models import conv, net
from torch import Tensor, nn
from torch.nn import functional as F
from vfx.passes.remove_channels import RemoveChannels

from vfx.analyse.symmetry import symmetry
from vfx.api import WidthFamily, prune_structured, trace
from vfx.api.elastic import not_nested
from vfx.cli.pruning import _of_width
from vfx.errors import ArgumentError
from vfx.passes import remove_channels

SHARES = [0.75, 0.25, 0.5]


def _pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _model() -> nn.Module:
    """A stream with a branch of grouped convolutions."""
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = h + self.out(F.relu(self.grouped(F.relu(self.into(h)))))
        return self.head(h.mean((2, 3)))

    parts = {"stem": conv(3, 8), "into": conv(8, 16), "grouped": conv(16, 16, groups=4), "out": conv(16, 8)}
    model = net(forward, **parts, norm=nn.BatchNorm2d(8), head=nn.Linear(8, 4)).double()
    return lively(model, _pictures(8))


def _family(**options: Any) -> WidthFamily:
    found = prune_structured(_model(), _pictures(2), sparsity=SHARES, progress=False, **options)
    assert isinstance(found, WidthFamily)
    return found


@pytest.mark.parametrize("score", ["l1", "taylor", "activation"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
def test_each_width_is_what_its_own_call_gives(score: str, allocation: str) -> None:
    data = _pictures(64, 1)
    options: dict[str, Any] = {"score": score, "allocation": allocation, "data": data, "solve": "least_squares"}
    family = _family(**options)
    assert list(family.networks) == [0.25, 0.5, 0.75]
    for share, found in family.networks.items():
        own = prune_structured(_model(), _pictures(2), sparsity=share, progress=False, **options)
        assert own.report.to_dict()["groups"] == found.report.to_dict()["groups"]
        assert found.report.choices["score"] == score
        assert found.report.choices["sparsity"] == share
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name])
    sizes = [found.report.profile.params for found in family.networks.values()]
    assert sizes == sorted(set(sizes), reverse=True)
    assert family.module is family.networks[0.25].module


def test_channels_are_those_of_the_wider_networks() -> None:
    program = trace(_model(), _pictures(2))
    facts = symmetry(program)
    records = [RemoveChannels(share, "l1", units="channels").run(program).record for share in sorted(SHARES)]
    for wide, narrow in pairwise(records):
        assert not list(not_nested(facts, wide, narrow))
        plain = [group.index for group in facts.groups if group.parent is None]
        assert all(set(narrow.kept[g].tolist()) <= set(wide.kept[g].tolist()) for g in plain)
        assert any(len(narrow.kept[g]) < len(wide.kept[g]) for g in plain)
    other = RemoveChannels(0.5, "random", units="channels", seed=5).run(program).record
    assert list(not_nested(facts, records[0], other))  # the control: another ordering


def test_scores_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    taken = remove_channels.channel_scores

    def counted(program: Any, facts: Any, method: str, **options: Any) -> Any:
        calls.append(method)
        return taken(program, facts, method, **options)

    monkeypatch.setattr(remove_channels, "channel_scores", counted)
    family = _family(data=_pictures(64, 1))
    assert sorted(calls) == ["activation", "magnitude"]
    chosen = {found.report.choices["score"] for found in family.networks.values()}
    assert len(chosen) == 1  # one ordering
    assert chosen < {"activation", "magnitude"}


def test_all_widths_are_solved() -> None:
    model, data, test = _model(), _pictures(256, 1), _pictures(64, 2)
    errors = {}
    for solve in (None, "least_squares"):
        family = _family(score="l1", data=data, solve=solve, normalize=None if solve is None else "auto")
        with torch.no_grad():
            errors[solve] = [float((one(test) - model(test)).square().sum()) for one in family.networks.values()]
    assert all(solved < 0.7 * plain for plain, solved in zip(errors[None], errors["least_squares"])), errors


def test_depths_are_prefixes_of_one_search() -> None:
    torch.manual_seed(0)
    blocks = {f"b{k}": nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)) for k in range(4)}

    def forward(self: Any, x: Tensor) -> Tensor:
        for name in blocks:
            x = x + getattr(self, name)(x)
        return self.head(x)

    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = net(forward, head=nn.Linear(5, 3), **blocks).double().eval()
    family = prune_structured(model, x, units="layers", sparsity=[0.25, 0.75], data=x, solve=None, progress=False)
    assert isinstance(family, WidthFamily)
    few, many = ([row.name for row in one.report.blocks] for one in family.networks.values())
    assert (len(few), len(many)) == (1, 3)
    assert many[:1] == few
    close(family(x), family.networks[0.25](x), 0)


def test_what_has_no_ordering_is_refused() -> None:
    with pytest.raises(ArgumentError, match="one ordering"):
        _family(method="fold")
    for wrong in ([], [0.5, 1.0], [-0.1]):
        with pytest.raises(ArgumentError, match="shares in"):
            prune_structured(_model(), _pictures(2), sparsity=wrong, progress=False)
    with pytest.raises(ArgumentError, match="either sparsity"):
        _family(budget={"params": 0.5})


def test_files_are_named_by_width() -> None:
    assert _of_width(Path("a/small.onnx"), 0.25) == Path("a/small-0.25.onnx")
    assert _of_width(Path("a/small.onnx"), None) == Path("a/small.onnx")
