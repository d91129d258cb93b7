"""A module run in float64, its parameters and buffers cast where an operator reads them: no copy of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vfx.program import moved


class InDouble(TorchDispatchMode):
    """While it is entered operators see the tensors of a module in float64 on the CPU, and cast to float64 alone.

    That is what ``vfx.proof.in_double`` makes of a graph's casts.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self._own = {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._cast, (args, kwargs or {}))
        asked = kwargs.get("dtype")
        if isinstance(asked, torch.dtype) and asked.is_floating_point:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        return moved(tensor, "cpu", torch.float64) if _place(tensor) in self._own else tensor


def _place(tensor: Tensor) -> tuple[int, torch.device]:
    return tensor.untyped_storage().data_ptr(), tensor.device


def sharing(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters, which no forward in eval mode writes to, and has buffers of its own.

    Tensors that ``forward`` computes anew and keeps (an older weight norm's) are copied by value.
    """
    return copied(module, {id(tensor): tensor for tensor in module.parameters()})


def copied(module: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy with some tensors, by id, ``replaced``; those that ``forward`` computes and keeps, by value."""
    plain = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in plain if not tensor.is_leaf}
    return copy.deepcopy(module, computed | (replaced or {}))
