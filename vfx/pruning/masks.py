"""What becomes of masks in the emitted module: nothing more, parametrizations for fine-tuning, or CUDA's 2:4 tensors.

A parametrized weight is original · mask, so an optimizer moves what stays and never what went. Tied weights share one
original; each owner has the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.sparse import SparseSemiStructuredTensor

from vfx.arguments import checked

KEEP = ("permanent", "parametrize", "semi_structured")
_HALF = (torch.float16, torch.bfloat16)


class Mask(nn.Module):
    """The weight where its mask is True, else 0; ``order`` is that of its module's parameters before."""

    mask: Tensor

    def __init__(self, mask: Tensor, order: tuple[str, ...] = ()):
        super().__init__()
        self.order = order
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def parametrize_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Keep ``masks`` (by FQN) on the module's parameters; returns the module."""
    for owner, leaf, mask in list(_owners(module, masks)):
        kept = Mask(mask.to(getattr(owner, leaf).device), tuple(owner._parameters))
        parametrize.register_parametrization(owner, leaf, kept)
    return module


@checked
@torch.no_grad()
def make_permanent(module: nn.Module) -> nn.Module:
    """Turn masks (``masks="parametrize"``) into zeros of plain parameters, 2:4 tensors into dense ones, in place.

    A module that has parametrizations of other kinds as well is left alone.
    """
    for owner in list(module.modules()):
        for leaf, weight in list(owner._parameters.items()):
            if isinstance(weight, SparseSemiStructuredTensor):
                owner._parameters[leaf] = nn.Parameter(weight.to_dense())
        if parametrize.is_parametrized(owner) and all(
            isinstance(mask, Mask)
            for chain in owner.parametrizations.values()  # type: ignore[union-attr,operator]
            for mask in chain
        ):
            _unmask(owner)
    return module


def _unmask(owner: nn.Module) -> None:
    """Undo ``register_parametrization``; torch's own way back changes a class that deep copies share."""
    chains = dict(owner.parametrizations.items())  # type: ignore[union-attr,operator]
    values = {leaf: getattr(owner, leaf) for leaf in chains}
    owner.__class__ = parametrize.type_before_parametrizations(owner)
    del owner.parametrizations
    for leaf, chain in chains.items():
        chain.original.copy_(values[leaf])
        owner.register_parameter(leaf, chain.original)
    order = next(iter(chains.values()))[0].order
    owner._parameters = {leaf: owner._parameters[leaf] for leaf in (*order, *owner._parameters)}


def _owners(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every module that holds a masked parameter, under whatever name (tied weights have several)."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    mask_of = {id(parameters[name]): mask for name, mask in masks.items()}
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if id(parameter) in mask_of:
                yield owner, leaf, mask_of[id(parameter)]


@torch.no_grad()
def semi_structured(module: nn.Module, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Store the masked weights of linear layers as CUDA 2:4 tensors; says of the others why they stay dense."""
    notes = []
    for owner, leaf, _ in list(_owners(module, masks)):
        weight = getattr(owner, leaf)
        reason = _unsupported(owner, weight)
        if not reason:
            try:
                compressed = torch.sparse.to_sparse_semi_structured(weight.detach())
                setattr(owner, leaf, nn.Parameter(compressed, requires_grad=False))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                reason = str(error).splitlines()[0]
        if reason:
            notes.append(f"stays dense: {type(owner).__name__} weight {tuple(weight.shape)}: {reason}")
    return tuple(notes)


def _unsupported(owner: nn.Module, weight: Tensor) -> str:
    """Why a weight has no 2:4 tensor, or nothing."""
    if not weight.is_cuda:
        return "2:4 tensors exist on CUDA alone; pass device='cuda'"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU has no sparse tensor cores (compute capability 8.0)"
    if weight.dtype not in _HALF:
        return f"the weight is {weight.dtype}; cast the model to float16 or bfloat16"
    if not isinstance(owner, nn.Linear):
        return "only linear layers run on 2:4 tensors"
    return ""
