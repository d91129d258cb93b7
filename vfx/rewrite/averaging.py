"""The average of weight sets, θ = Σ αᵢ θᵢ, with what is known of them: what merging starts from, however it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vfx.errors import listed
from vfx.program import Goal, Program


def averaged(program: Program, alphas: Sequence[float], note: str | None = None) -> Program:
    """One weight set of several; ``note`` goes into the history.

    Integer buffers come from the first edge, as do tensors the graph never reads (heads unused in eval mode): they
    were not aligned, so averaging them would only look like merging. Private tensors (preserved branches) stay as they
    are. Layer statistics are averaged with the same weights, standard deviations and not variances (REPAIR, eq. 1).
    """
    names = set(program.names()) - program.private
    merged = {
        name: average([weights[name] for weights in program.weights], alphas) if name in names else tensor
        for name, tensor in program.weights[0].items()
    }
    shares = torch.tensor(alphas, dtype=torch.float64)
    goals = {node: Goal(*(_mix(x, shares) for x in (goal.mean, goal.std))) for node, goal in program.goals.items()}
    unused = [n for n in program.weights[0] if n not in names | program.private and n not in program.buffers]
    notes = program.notes
    if unused:
        notes = (*notes, f"taken from the first edge, since the graph never reads them: {listed(unused, 4)}")
    return replace(program.with_weights([merged], note), goals=goals, notes=notes)


def average(tensors: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    """Σ αᵢ tᵢ; integer tensors, and tensors that all edges share, come from the first, as do infinities (of masks)."""
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()) or all(t is first for t in tensors):
        return first
    total = first * alphas[0]
    for tensor, alpha in zip(tensors[1:], alphas[1:]):
        total = total.add_(tensor.to(total.device), alpha=alpha)
    infinite = first.isinf()
    return torch.where(infinite, first, total) if infinite.any() else total


def _mix(rows: Tensor, shares: Tensor) -> Tensor:
    return (rows * shares.to(rows.device)[:, None]).sum(0, keepdim=True)
