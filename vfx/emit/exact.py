"""A module run in float64, its parameters and buffers cast where an operator reads them: no copy of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from vfx.program import Program, moved, runnable


class InDouble(TorchDispatchMode):
    """While it is entered operators see a module's tensors in float64 on the CPU, and cast to float64 alone.

    That is what ``vfx.proof.in_double`` makes of a Program's casts. What depends on neither inputs nor what the Program
    reads is a constant: it is computed as it is, and rounded as the Program keeps it where that holds the same numbers.
    """

    def __init__(self, module: nn.Module, program: Program):
        super().__init__()
        read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        held = dict([*module.named_parameters(), *module.named_buffers(remove_duplicate=False)])
        self._read = {_place(held[name]) for name in {*read, *dict(module.named_parameters())} & held.keys()}
        self._constants = WeakIdKeyDictionary({tensor: True for tensor in held.values() if not self._is_read(tensor)})
        kept = (tensor for name, tensor in program.weights[0].items() if name in read - held.keys())
        self._kept = [tensor for tensor in kept if tensor.is_floating_point()]

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(tensor in self._constants for tensor in tensors):
            result = func(*args, **kwargs)
            self._constants.update((leaf, True) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
            return result
        args, kwargs = pytree.tree_map_only(Tensor, self._cast, (args, kwargs))
        asked = kwargs.get("dtype")
        if isinstance(asked, torch.dtype) and asked.is_floating_point:
            kwargs = kwargs | {"dtype": torch.float64}
        return runnable(func, args)(*args, **kwargs)

    def _is_read(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._read

    def _cast(self, tensor: Tensor) -> Tensor:
        if self._is_read(tensor):
            return moved(tensor, "cpu", torch.float64)
        if tensor not in self._constants or not tensor.is_floating_point():
            return tensor
        alike = (kept for kept in self._kept if kept.shape == tensor.shape)
        rounded = (kept for kept in alike if torch.equal(tensor.to(kept), kept))
        return moved(next(rounded, tensor), "cpu", torch.float64)


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
