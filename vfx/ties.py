"""Tied parameters: tensors that stand under several names, and edges that do not agree on which.

Edges share one graph. It reads one tensor for two names only where every edge has one; where some edge has two, it
reads two, which are equal in the edges that tie them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vfx.capture.exporting import structural_copy
from vfx.errors import ArchitectureError


def ties(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter's tensor, by all names."""
    first: dict[object, str] = {}
    first_name = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first_name[name] = first.setdefault(key if tensor.numel() and not tensor.is_meta else id(tensor), name)
    return first_name


def with_common_ties(models: Sequence[nn.Module]) -> tuple[nn.Module, list[str]]:
    """The first model, its ties loosened that another has not, and a note on each; the model itself is left alone.

    Raises ArchitectureError where a tie cannot be loosened, since one module stands under both names.
    """
    first_ties, others = ties(models[0]), [ties(model) for model in models[1:]]
    loose = {}
    for name, first in first_ties.items():
        apart = next((edge for edge, tied in enumerate(others, start=1) if tied.get(name) != tied.get(first)), None)
        if apart is not None:
            loose[name] = first, apart
    if not loose:
        return models[0], []
    model = structural_copy(models[0])
    for name in loose:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[leaf] = nn.Parameter(owner._parameters[leaf].detach().clone())  # type: ignore[union-attr]
    left = ties(model)
    for name, (first, edge) in loose.items():
        if left[name] == left[first]:
            raise ArchitectureError(
                f"{name!r} and {first!r} are tied in edge 0 (one module under two names) and not in edge {edge}; give "
                "edge 0 two modules with equal weights"
            )
    notes = [
        f"{name!r} is tied to {first!r} in edge 0 and not in edge {edge}: merged as two tensors"
        for name, (first, edge) in loose.items()
    ]
    return model, notes
