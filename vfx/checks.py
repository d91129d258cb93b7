"""Checks on what the user hands in: edges of one architecture, finite weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vfx.errors import ArchitectureError, ArgumentError, WeightError


def check_edges(models: Sequence[nn.Module]) -> None:
    """Raise unless there are two or more distinct models whose tensors agree in name, shape and dtype."""
    if len(models) < 2:
        raise ArgumentError(f"merging needs at least two models, got {len(models)}")
    states = [model.state_dict() for model in models]
    for edge, state in enumerate(states[1:], start=1):
        check_same_tensors(states[0], state, "edge 0", f"edge {edge}")
    for edge, state in enumerate(states):
        check_finite(state, f"edge {edge}")


def check_same_tensors(first: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str, other_name: str) -> None:
    """Raise ArchitectureError that names the first key on which two state dicts differ."""
    way_out = "edges must share one architecture; build both with the same constructor arguments"
    for key in first:
        if key not in other:
            raise ArchitectureError(f"{other_name} lacks {key!r}, which {name} has; {way_out}")
        if first[key].shape != other[key].shape:
            raise ArchitectureError(
                f"{key!r} has shape {tuple(first[key].shape)} in {name} and {tuple(other[key].shape)} in "
                f"{other_name}; {way_out}"
            )
        if first[key].dtype != other[key].dtype:
            raise ArchitectureError(
                f"{key!r} is {first[key].dtype} in {name} and {other[key].dtype} in {other_name}; cast one of them"
            )
    extra = next((key for key in other if key not in first), None)
    if extra is not None:
        raise ArchitectureError(f"{other_name} has {extra!r}, which {name} lacks; {way_out}")


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Raise WeightError that names the first tensor with a NaN or infinite value."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise WeightError(f"{count} of {tensor.numel()} values of {key!r} in {name} are NaN or infinite")
