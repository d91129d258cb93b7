"""What a group is to the network, and that only what is named goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import images
from torch import Tensor, nn

from vfx.analyse.symmetry import symmetry
from vfx.api import prune_structured, trace
from vfx.errors import ArgumentError
from vfx.models import resnet20, vit_tiny
from vfx.pruning.roles import ROLES, group_roles

X = images(2, 32)


def vit() -> nn.Module:
    return vit_tiny(width=1 / 16, num_classes=5, size=32, patch=16, depth=2)


class Latents(nn.Module):
    """Latents ask the tokens, as a Perceiver's do; their number is a position's, their width a stream's."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(7, 12))
        self.keys, self.values, self.out = nn.Linear(10, 12), nn.Linear(10, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)[:, :, :1].expand(-1, -1, 10) + 0.0
        found = torch.softmax(self.latents @ self.keys(rows).transpose(1, 2), -1) @ self.values(rows)
        stream = self.latents + found
        return self.head((stream + self.out(torch.relu(stream))).mean(1))


def named(build: Callable[[], nn.Module]) -> dict[str, str]:
    torch.manual_seed(0)
    facts = symmetry(trace(build(), X))
    roles = group_roles(facts)
    return {member.fqn: roles[g.index] for g in facts.groups for member in g.members if member.role == "out"}


def test_roles_of_a_residual_network() -> None:
    found = named(lambda: resnet20(width=0.25))
    assert set(found.values()) == {"streams", "hidden"}
    hidden = {name for name, role in found.items() if role == "hidden" and name.endswith("conv1.weight")}
    assert len(hidden) == 9  # the first convolution of each block
    assert all(role == "streams" for name, role in found.items() if name.endswith("conv2.weight"))


def test_roles_of_a_transformer() -> None:
    torch.manual_seed(0)
    facts = symmetry(trace(vit(), X))
    roles = group_roles(facts)
    assert {roles[g.index] for g in facts.groups if g.parent is not None} == {"blocks"}
    count = {role: sum(one == role for one in roles.values()) for role in set(roles.values())}
    assert count["streams"] == 1
    assert count["hidden"] == 2  # the MLPs of two layers
    assert set(count) <= {*ROLES, "positions"}


def test_a_plain_network_has_hidden_channels_alone() -> None:
    """Control: a sum of two layers of which neither is computed from the other is no stream."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(x)))

    facts = symmetry(trace(Sum(), torch.randn(3, 4)))
    assert set(group_roles(facts).values()) == {"hidden"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
def test_only_what_is_named_goes(role: str, allocation: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"sparsity": 0.5, "allocation": allocation, "solve": None, "normalize": None}
    found = prune_structured(vit(), X, roles=[role], progress=False, **options).report
    gone = {width.role for width in found.widths if width.after < width.before}
    assert gone == {role}
    assert found.error is not None
    assert found.error < 1e-9
    everything = prune_structured(vit(), X, progress=False, **options).report
    assert {width.role for width in everything.widths if width.after < width.before} > {role}  # control


def test_positions_never_go() -> None:
    torch.manual_seed(0)
    model, x = Latents(), images(2, 4)
    roles = group_roles(symmetry(trace(model, x)))
    assert "positions" in roles.values()
    assert "streams" in roles.values()
    for options in ({}, {"roles": ["streams"]}, {"allocation": "global"}):
        report = prune_structured(model, x, sparsity=0.5, solve=None, normalize=None, progress=False, **options).report  # type: ignore[arg-type]
        widths = {width.role: width for width in report.widths}
        assert widths["positions"].after == widths["positions"].before == 7
        assert widths["streams"].after < widths["streams"].before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": ["positions"]}, "tokens, latents and queries are never removed"),
        ({"roles": ["experts"]}, "units='experts'"),
        ({"roles": ["channels"]}, "it is unknown; choose of streams, hidden, blocks"),
        ({"roles": ["hidden"], "units": "experts"}, "leave roles= out"),
        ({"roles": ["hidden"], "units": "layers", "data": X}, "leave roles= out"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        prune_structured(vit(), X, sparsity=0.5, progress=False, **options)
