"""A copy of the user's model that holds tensors of other sizes: its layers are resized in place.

The sizes that torch's layers keep beside their tensors (``in_features``, ``groups``, ``normalized_shape`` …) are read
off the tensors. Whether ``forward`` then computes what is wanted is not known before it was run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Shape = tuple[int, ...]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, shared ones under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def resized(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of ``model`` that holds ``tensors`` where it has tensors of these names."""
    module = copy.deepcopy(model).eval()
    before = {name: tuple(tensor.shape) for name, tensor in own_tensors(module).items()}
    for name, tensor in own_tensors(module).items():
        if name in tensors:
            tensor.data = tensors[name].detach().clone()
    for path, layer in module.named_modules():
        sizes = next((read for kind, read in _SIZES.items() if isinstance(layer, kind)), None)
        weight = f"{path}.weight" if path else "weight"
        if sizes is not None and weight in before:
            for name, size in sizes(layer, before[weight]).items():
                setattr(layer, name, size)
        elif isinstance(layer, _NormBase) and layer.running_mean is not None:
            layer.num_features = len(layer.running_mean)
    return module


def _convolution(layer: Any, old: Shape) -> dict[str, Any]:
    """Where each group keeps its channels, it is their number that changed."""
    first, second = layer.weight.shape[:2]
    groups = layer.groups
    if groups > 1 and second == old[1] and first != old[0]:
        groups = groups * first // old[0]
    if isinstance(layer, _ConvTransposeNd):
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}


_SIZES: dict[type[nn.Module], Callable[[Any, Shape], dict[str, Any]]] = {
    nn.Linear: lambda x, _: dict(zip(("out_features", "in_features"), x.weight.shape)),
    nn.Bilinear: lambda x, _: dict(zip(("out_features", "in1_features", "in2_features"), x.weight.shape)),
    _ConvNd: _convolution,
    _NormBase: lambda x, _: {"num_features": len(x.weight)},
    nn.LayerNorm: lambda x, _: {"normalized_shape": tuple(x.weight.shape)},
    nn.RMSNorm: lambda x, _: {"normalized_shape": tuple(x.weight.shape)},
    nn.GroupNorm: lambda x, _: {"num_channels": len(x.weight)},
    nn.Embedding: lambda x, _: dict(zip(("num_embeddings", "embedding_dim"), x.weight.shape)),
    nn.PReLU: lambda x, _: {"num_parameters": len(x.weight)},
}
