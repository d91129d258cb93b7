"""Freedom: maps that are left free change no function, on networks with one hazard each and on real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from micro_models import MICRO, Micro, net, parameter
from torch import Tensor, nn

from vfx.analyse.symmetry import symmetry
from vfx.analyse.verify import function_error, in_double, randomise
from vfx.capture import capture
from vfx.freedom import Freedom, MapKind, Member
from vfx.program import Program

EXACT, BROKEN = 1e-9, 1e-6


@cache
def _program(micro: Micro) -> Program:
    torch.manual_seed(0)
    return in_double(capture(micro.build().eval(), micro.inputs()))


def _mapped(weights: dict[str, Tensor], members: Iterable[Member], kind: MapKind, seed: int) -> dict[str, Tensor]:
    """A random map of one variable in all its members, or in those that are given."""
    generator, result = torch.Generator().manual_seed(seed), dict(weights)
    members = list(members)
    size = len(members[0].position)
    if kind is MapKind.DENSE:
        matrix = torch.eye(size).double() + 0.3 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    else:
        scale = torch.randn(size, generator=generator, dtype=torch.float64)
        matrix = torch.diag(scale.exp() * (scale.sign() if kind is MapKind.DIAGONAL else 1.0))
    for member in members:
        assert member.exponent.denominator == 1
        power = torch.linalg.matrix_power(matrix, int(abs(member.exponent)))
        power = power if member.exponent > 0 else torch.linalg.inv(power).T
        tensor = result[member.fqn].movedim(member.dim, 0).clone()
        for copy in torch.from_numpy(member.position).T:
            tensor[copy] = torch.tensordot(power, tensor[copy], 1)
        result[member.fqn] = tensor.movedim(0, member.dim)
    return result


def _start(program: Program) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights in which all channels differ, and random inputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64) if x.is_floating_point() else x
        for x in program.example_inputs
    ]
    return randomise(program, inputs, generator), inputs


def _error(freedom: Freedom, start: Any, chosen: Callable[[list[Member]], list[Member]] = list) -> float:
    """The largest error over all variables; ``chosen`` picks the members that are moved."""
    weights, inputs = start
    normed = {v for norm in freedom.norms for v in freedom.equations.resolve(norm.form)}
    normed |= {v for v in freedom.variables if v[0] == "normed"}
    worst = 0.0
    for seed, (variable, members) in enumerate(freedom.variables.items()):
        if variable not in normed and chosen(members):
            moved = _mapped(weights, chosen(members), freedom.kind, seed)
            worst = max(worst, function_error(freedom.symmetry.program, weights, moved, inputs))
    return worst


SLOW = ("lstm", "gru")  # recurrent layers leave nothing free


@pytest.mark.parametrize("micro", [m for m in MICRO if not m.name.startswith(SLOW)], ids=lambda micro: micro.name)
def test_free_maps_change_no_function(micro: Micro) -> None:
    program = _program(micro)
    facts = symmetry(program)
    start = _start(program)
    for kind in MapKind:
        assert _error(Freedom(facts, kind), start) <= EXACT, kind


def _tiny() -> nn.Module:
    """A residual stream on channels: two writers, two readers, a gate, and an axis behind tanh."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.down(F.relu(self.up(h)))
        return self.head(torch.tanh(self.deep(h)) * self.gain)

    return net(
        forward, stem=nn.Linear(5, 6), up=nn.Linear(6, 4), down=nn.Linear(4, 6), deep=nn.Linear(6, 3),
        head=nn.Linear(3, 2), gain=parameter(3),
    )  # fmt: skip


def _straight() -> nn.Module:
    """Sums and linear layers alone."""
    return net(
        lambda self, x: self.head(self.first(x) - 3 * self.second(x).mean(0)),
        first=nn.Linear(5, 4), second=nn.Linear(5, 4), head=nn.Linear(4, 2),
    )  # fmt: skip


def _facts(build: Callable[[], nn.Module]) -> Program:
    torch.manual_seed(0)
    return in_double(capture(build().eval(), (torch.randn(7, 5),)))


def _names(members: Iterable[Member], sign: int) -> set[str]:
    return {f"{m.fqn}[{m.dim}]" for m in members if m.exponent * sign > 0}


def test_writers_and_readers_of_each_free_scale() -> None:
    freedom = Freedom(symmetry(_facts(_tiny)), MapKind.POSITIVE)
    found = []
    for members in freedom.variables.values():
        sign = 1 if any(m.fqn.endswith("bias") and m.exponent > 0 for m in members) else -1
        found.append((_names(members, sign), _names(members, -sign)))
    assert ({"stem.weight[0]", "stem.bias[0]", "down.weight[0]", "down.bias[0]"},
            {"up.weight[1]", "deep.weight[1]"}) in found  # fmt: skip
    assert ({"up.weight[0]", "up.bias[0]"}, {"down.weight[1]"}) in found
    assert {frozenset(a | b) for a, b in found} >= {frozenset({"gain[0]", "head.weight[1]"})}
    assert len(found) == 3
    assert "tanh" in str(freedom.reason("deep.weight", 0, _group(freedom, "deep.weight", 0)))


def _group(freedom: Freedom, fqn: str, dim: int) -> int:
    return next(
        g.index for g in freedom.symmetry.groups for m in g.members if (m.fqn, m.dim) == (fqn, dim)
    )  # fmt: skip


@pytest.mark.parametrize("kind", list(MapKind))
def test_a_map_that_leaves_one_member_out_is_seen(kind: MapKind) -> None:
    program = _facts(_straight if kind is MapKind.DENSE else _tiny)
    freedom = Freedom(symmetry(program), kind)
    assert freedom.variables
    start = _start(program)
    assert _error(freedom, start) <= EXACT
    for members in freedom.variables.values():
        for left in members:
            assert _error(freedom, start, lambda own, left=left: [m for m in own if m is not left]) >= BROKEN


def test_relu_leaves_positive_scales_alone_free() -> None:
    program = _facts(lambda: net(lambda self, x: self.b(F.relu(self.a(x))), a=nn.Linear(5, 4), b=nn.Linear(4, 2)))
    counts = {kind: len(Freedom(symmetry(program), kind).variables) for kind in MapKind}
    assert counts == {MapKind.POSITIVE: 1, MapKind.DIAGONAL: 0, MapKind.DENSE: 0}


def test_linear_networks_are_free_throughout() -> None:
    program = _facts(lambda: net(lambda self, x: self.b(2 * self.a(x)), a=nn.Linear(5, 4), b=nn.Linear(4, 2)))
    for kind in MapKind:
        freedom = Freedom(symmetry(program), kind)
        assert len(freedom.variables) == 1
        assert _error(freedom, _start(program)) <= EXACT
