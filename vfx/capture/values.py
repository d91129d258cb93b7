"""What a graph notes of a captured value: shape and dtype, its batch a symbol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfx.program import Value


def as_value(value: Any) -> Any:
    """Metadata of a captured value: Value for tensors, a list for several, the object itself otherwise."""
    if isinstance(value, Tensor):
        sizes = (size if isinstance(size, int) else size.node.expr for size in value.shape)
        return Value(tuple(int(s) if getattr(s, "is_Integer", False) else s for s in sizes), value.dtype)
    if isinstance(value, (list, tuple)):
        return [as_value(item) for item in value]
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return value
