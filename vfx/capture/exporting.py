"""One way through ``torch.export``: a call of any structure, a dynamic batch, outputs in plain containers."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from vfx.capture.outputs import plain
from vfx.capture.signature import Call, batch_size, has_batch
from vfx.errors import CaptureError
from vfx.options import DYNAMIC_BATCH
from vfx.program import Program

EXPORTING = threading.RLock()  # torch.export keeps what it does in module globals: one thread at a time
VALUES = (
    "where shapes or branches depend on values, give the network without that part (a detector without its "
    "post-processing: the backbone and the heads in front of non-maximum suppression), or write it with torch.where"
)
CUDA_BATCH = 65535
FIXED = (
    "where the batch or another size is written into the code, capture the network as it is, program = "
    "vfx.trace(model, example_inputs, dynamic_shapes=None), and give the program in its place (merge, prune, "
    "prune_structured and export take dynamic_shapes= too)"
)


def exported(model: nn.Module, call: Call, dynamic_shapes: Any = DYNAMIC_BATCH) -> tuple[ExportedProgram, list[str]]:
    """The exported program of ``model`` in eval mode, and notes on the outputs that it could not keep.

    ``model`` is left alone: a structural copy that shares its tensors is exported. Raises CaptureError.
    """
    replica = structural_copy(model).eval()
    notes: list[str] = []
    # forward of this copy alone: caches and dataclasses are no outputs that torch.export takes
    replica.forward = _plainly(replica.forward, notes)
    shapes = _batch_shapes(model, call) if dynamic_shapes == DYNAMIC_BATCH else dynamic_shapes
    said = io.StringIO()
    try:
        with EXPORTING, torch.no_grad(), warnings.catch_warnings(), kept_back(said):
            # the flat weights of recurrent modules, which are the parameters once more
            warnings.filterwarnings("ignore", r"The tensor attributes? self\.\S*_flat_weights\[")
            program = torch.export.export(replica, call.args, dict(call.kwargs), strict=False, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many unrelated classes
        raise CaptureError(_explain(model, call, error), said.getvalue()) from error
    return program, list(dict.fromkeys(notes))


@contextmanager
def kept_back(text: io.StringIO) -> Iterator[None]:
    """What torch prints and logs of a program (its whole graph, where it fails) goes into ``text``.

    With TORCH_LOGS in the environment it is left alone: then someone wants to read it.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    names = [name for name in logging.Logger.manager.loggerDict if name.split(".")[0] == "torch"]
    handlers = [h for name in names for h in logging.getLogger(name).handlers if type(h) is logging.StreamHandler]
    streams = [handler.setStream(text) for handler in handlers]
    try:
        with redirect_stdout(text), redirect_stderr(text):
            yield
    finally:
        for handler, stream in zip(handlers, streams):
            if stream is not None:
                handler.setStream(stream)


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


def captured_shapes(program: Program, model: nn.Module) -> Any:
    """``dynamic_shapes`` that leave open for ``model`` what a Program's capture left open."""
    shapes = [node.meta["val"].shape for node in program.placeholders]
    axes = [{d: Dim.DYNAMIC for d, size in enumerate(shape) if not isinstance(size, int)} for shape in shapes]
    if [set(dims) for dims in axes] == [{0} if batched else set() for batched in has_batch(program.example_inputs)]:
        return DYNAMIC_BATCH
    if not any(axes):
        return None
    call, dims_of = program.example_call, iter(axes)
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    return tuple(
        pytree.tree_map(lambda x: next(dims_of) if isinstance(x, Tensor) else None, value) for value in bound.values()
    )


def open_shapes(model: nn.Module, call: Call) -> Any:
    """``dynamic_shapes`` with every size open that the code of ``model`` leaves open."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    every = lambda x: dict.fromkeys(range(x.ndim), Dim.AUTO) if isinstance(x, Tensor) else None  # noqa: E731
    return tuple(pytree.tree_map(every, value) for value in bound.values())


def _batch_shapes(model: nn.Module, call: Call) -> tuple[Any, ...]:
    """The batch axis alone is dynamic, in every tensor whose first axis it is."""
    # torch's own kernels for normalization on a GPU take no larger batch, which torch.export wants to be told
    largest = CUDA_BATCH if any(tensor.is_cuda for tensor in call.tensors()) else None
    batch, size = Dim("batch", min=1, max=largest), batch_size(call.tensors())
    dynamic = lambda x: isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size  # noqa: E731
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    return tuple(pytree.tree_map(lambda x: {0: batch} if dynamic(x) else None, value) for value in bound.values())


def _explain(model: nn.Module, call: Call, error: Exception) -> str:
    """What went wrong in one line, and the way out of it."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = (lines[0] if lines else type(error).__name__).split("For more information")[0].strip()
    place = next((line.removeprefix("Caused by:").strip() for line in lines if line.startswith("Caused by:")), "")
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        way = VALUES
    elif "Constraints violated" in text or "pecialized" in text:
        way = FIXED
    else:
        way = f"check that the example inputs fit forward(). If they do: {VALUES}; {FIXED}"
    return (
        f"torch.export could not capture {type(model).__name__} with inputs {call}: {type(error).__name__}: {cause} "
        f"{place and place + ' '}Way out: {way}."
    )
