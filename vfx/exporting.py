"""One way through ``torch.export``: a call of any structure, a dynamic batch, outputs in plain containers."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from vfx.errors import CaptureError
from vfx.outputs import plain
from vfx.signature import Call, batch_size

DYNAMIC_BATCH = "batch"


def exported(model: nn.Module, call: Call, dynamic_shapes: Any = DYNAMIC_BATCH) -> tuple[ExportedProgram, list[str]]:
    """The exported program of ``model`` in eval mode, and notes on the outputs that it could not keep.

    ``model`` is left alone: a structural copy that shares its tensors is exported. Raises CaptureError.
    """
    replica = structural_copy(model).eval()
    notes: list[str] = []
    # forward of this copy alone: caches and dataclasses are no outputs that torch.export takes
    replica.forward = _plainly(replica.forward, notes)
    shapes = _batch_shapes(model, call) if dynamic_shapes == DYNAMIC_BATCH else dynamic_shapes
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # the flat weights of recurrent modules, which are the parameters once more
            warnings.filterwarnings("ignore", r"The tensor attributes? self\.\S*_flat_weights\[")
            program = torch.export.export(replica, call.args, dict(call.kwargs), strict=False, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many unrelated classes
        raise CaptureError(_explain(model, call, error)) from error
    return program, list(dict.fromkeys(notes))


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor with ``model``."""
    plain_tensors = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)
    ]
    tensors = [*model.parameters(), *model.buffers(), *plain_tensors]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _plainly(forward: Callable[..., Any], notes: list[str]) -> Callable[..., Any]:
    @functools.wraps(forward)  # torch.export reads the parameters' names
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs), notes)

    return wrapped


def _batch_shapes(model: nn.Module, call: Call) -> tuple[Any, ...]:
    """The batch axis alone is dynamic, in every tensor whose first axis it is."""
    batch, size = Dim("batch", min=1), batch_size(call.tensors())
    dynamic = lambda x: isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size  # noqa: E731
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    return tuple(pytree.tree_map(lambda x: {0: batch} if dynamic(x) else None, value) for value in bound.values())


def _explain(model: nn.Module, call: Call, error: Exception) -> str:
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"torch.export could not capture {type(model).__name__} with inputs {call}: {type(error).__name__}: {cause} "
        "Way out: check that the example inputs fit forward(); replace control flow that depends on tensor values "
        "(by torch.where, or fix it in eval mode); if the model needs a fixed batch or other dynamic axes, pass "
        "dynamic_shapes=."
    )
