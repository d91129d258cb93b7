"""BalanceScales: the positive scales that a network leaves free, brought to one canonical form.

ReLU(d x) = d ReLU(x) for d > 0: what writes a channel may be scaled by d and what reads it by 1/d. Of all networks
that differ by such scales, this pass takes the one whose weights have the smallest sum of squares (Stock et al.,
*Equi-normalization of Neural Networks*, 2019, §3; for two layers the scales of Nagel et al. 2019, §4.1): with λ = log d
for every free channel,

    Σ over tensors of Σ W² e^{2 Σ e λ},   e = ±1 for what writes and reads the channel,

is convex in λ. At its minimum what writes a channel, biases among it, has the norm of what reads it. It is found
channel by channel, λ ← λ + ¼ log(N/P) with P and N the sums of squares of writers and readers, over and over. Scales
that are free are found by ``vfx.freedom``: residual streams share one among all writers and readers, gates,
BatchNorms and products keep what they need. Two networks that differ by scales alone become equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vfx.analyse.balance import SWEEPS, TOLERANCE, newton, relaxation
from vfx.analyse.symmetry import symmetry
from vfx.freedom import Freedom, MapKind, Member
from vfx.program import Program, Weights
from vfx.rewrite import Pass

NAMED = 3  # features without a free scale that a note names

Variables = Mapping[Any, list[Member]]


class BalanceScales(Pass):
    """Rescale channels so that what writes them weighs as much as what reads them, in every weight set."""

    preserves_function = True
    changes_values = True

    def __init__(self, verify: bool = True):
        self.verify = verify

    def apply(self, program: Program) -> Program:
        freedom = Freedom(symmetry(program), MapKind.POSITIVE)
        balanced = {v: members for v, members in freedom.variables.items() if _two_sided(members)}
        sets = [_balanced(weights, balanced) for weights in program.weights]
        result = program.with_weights(sets, f"BalanceScales({len(balanced)} features)")
        return replace(result, notes=(*program.notes, *_notes(freedom)))


def _two_sided(members: list[Member]) -> bool:
    """Whether a feature is written and read: else its scale has no minimum."""
    return min(m.exponent for m in members) < 0 < max(m.exponent for m in members)


def _notes(freedom: Freedom) -> list[str]:
    """Which features have no free scale, and why."""
    found: dict[int, str] = {}
    for group in freedom.symmetry.groups:
        for member in group.members:
            reason = freedom.reason(member.fqn, member.dim, group.index)
            if member.role == "out" and reason is not None:
                found.setdefault(group.index, f"{member.fqn} ({reason})")
    named = list(found.values())
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return [f"scales left as they are: {', '.join(named[:NAMED])}{more}"] if named else []


@dataclass
class _Squares:
    """The squares of one tensor, summed over the axes that no scale moves; (axis, member, variable) of the rest."""

    values: Tensor
    axes: list[tuple[int, Member, Any]]

    def sums(self, axis: int, member: Member) -> Tensor:
        """Of each channel (size,)."""
        other = [d for d in range(self.values.ndim) if d != axis]
        line = self.values.sum(other) if other else self.values
        return line[torch.from_numpy(member.position).to(line.device)].sum(1)

    def scale(self, axis: int, member: Member, step: Tensor) -> None:
        self.values *= _along(self.values, axis, member, 2 * step)


Places = list[tuple[_Squares, int, Member]]


def _along(tensor: Tensor, axis: int, member: Member, logarithm: Tensor) -> Tensor:
    """exp(exponent · λ) at each channel's positions along one axis, 1 elsewhere."""
    factor = torch.ones(tensor.shape[axis], dtype=torch.float64, device=tensor.device)
    factor[torch.from_numpy(member.position).to(tensor.device)] = (float(member.exponent) * logarithm).exp()[:, None]
    return factor.reshape([-1 if d == axis else 1 for d in range(tensor.ndim)])


def _balanced(weights: Weights, variables: Variables) -> dict[str, Tensor]:
    """The weight set with the smallest sum of squares."""
    squares = _squares(weights, variables)
    where: dict[Any, Places] = {v: [] for v in variables}
    for one in squares.values():
        for axis, member, variable in one.axes:
            where[variable].append((one, axis, member))
    scales = {v: torch.zeros(len(members[0].position), dtype=torch.float64) for v, members in variables.items()}
    changes = [float("inf")]
    for _ in range(SWEEPS):
        changes.append(_sweep(scales, where, relaxation(changes)))
        if changes[-1] <= TOLERANCE:
            break
    result = dict(weights)
    for name, one in squares.items():
        tensor = weights[name].double()
        for _, member, variable in one.axes:
            tensor = tensor * _along(tensor, member.dim, member, scales[variable].to(tensor.device))
        result[name] = tensor.to(weights[name].dtype)
    return result


def _sweep(scales: dict[Any, Tensor], where: Mapping[Any, Places], over: float) -> float:
    """One step of every feature in turn; the largest change of λ."""
    largest = 0.0
    for variable, places in where.items():
        step = over * _step(places)
        scales[variable] += step
        for one, axis, member in places:
            one.scale(axis, member, step)
        largest = max(largest, float(step.abs().max()))
    return largest


def _squares(weights: Weights, variables: Variables) -> dict[str, _Squares]:
    moved: dict[str, list[tuple[Member, Any]]] = {}
    for variable, members in variables.items():
        for member in members:
            moved.setdefault(member.fqn, []).append((member, variable))
    result = {}
    for name, own in moved.items():
        tensor = weights[name].double().cpu().square()
        dims = sorted({member.dim for member, _ in own})
        rest = [d for d in range(tensor.ndim) if d not in dims]
        values = tensor.sum(rest) if rest else tensor.clone()
        result[name] = _Squares(values, [(dims.index(m.dim), m, v) for m, v in own])
    return result


def _step(places: Places) -> Tensor:
    """By how much λ changes for each channel of one feature: the minimum if all else stays.

    A channel whose writers or readers are all zero keeps its scale. Where a tensor holds the feature on several axes
    (it reads the stream that it writes) channels do not change alone: a step is divided by their number, and the
    average of steps on one axis each does not increase a convex function.
    """
    exponents = torch.tensor([float(m.exponent) for _, _, m in places], dtype=torch.float64)
    sums = torch.stack([one.sums(axis, member) for one, axis, member in places])
    up, down = sums[exponents > 0].sum(0), sums[exponents < 0].sum(0)
    alive = (up > 0) & (down > 0)
    up, down = torch.where(alive, up, 1.0), torch.where(alive, down, 1.0)
    size = float(exponents.abs().max())
    step = (down.log() - up.log()) / (4 * size)
    if float(exponents.abs().min()) != size:
        step = torch.from_numpy(newton(exponents.numpy(), sums.numpy()))
    names = [id(one) for one, _, _ in places]
    return torch.where(alive, step, 0.0) / max(names.count(name) for name in names)
