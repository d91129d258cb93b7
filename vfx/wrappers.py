"""Networks as training code hands them over: what wraps them is taken off, what cannot be worked on is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from vfx.errors import ArgumentError

_WRAPPED = ((nn.DataParallel, "module"), (DistributedDataParallel, "module"), (AveragedModel, "module"))
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")


def plain_models(models: Any) -> Any:
    """A module, or each of several, as ``plain_model`` gives it; what is no module is returned as it is."""
    if isinstance(models, nn.Module):
        return plain_model(models, "the model")
    if isinstance(models, (list, tuple)):
        return [
            plain_model(model, f"edge {edge}") if isinstance(model, nn.Module) else model
            for edge, model in enumerate(models)
        ]
    return models


def plain_model(model: nn.Module, name: str) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel or ``torch.compile``.

    Raises ArgumentError, with the way out, for lazy modules without weights, TorchScript, and networks that are
    quantised or prepared for it.
    """
    inner = _inside(model)
    if inner is not None:
        return plain_model(inner, name)
    for path, module in model.named_modules():
        reason = _unusable(module)
        if reason:
            where = f"{path!r} ({type(module).__name__})" if path else f"it ({type(module).__name__})"
            raise ArgumentError(f"{name} cannot be worked on: {where} {reason}")
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    for kind, attribute in (*_WRAPPED, (torch._dynamo.OptimizedModule, "_orig_mod")):
        if isinstance(model, kind):
            inner = getattr(model, attribute)
            return inner if isinstance(inner, nn.Module) else None
    return None


def _unusable(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, which torch.export does not take; give the Python module it was made of"
    if any(
        is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
    ):
        return "is lazy and has no weights yet; run the model on example inputs once before"
    if isinstance(module, (FakeQuantizeBase, ObserverBase)):
        return "prepares quantisation; work on the floating-point network and prepare and quantise what comes out"
    if type(module).__module__.startswith(_QUANTISED) or _packed(module):
        return "is quantised; work on the floating-point network and quantise what comes out"
    return ""


def _packed(module: nn.Module) -> bool:
    """Whether a module holds its weights in a packed object."""
    packed = getattr(module, "_packed_params", None)
    return packed is not None and not isinstance(packed, (Tensor, nn.Module))
