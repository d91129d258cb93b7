"""Names in an ONNX graph: inputs, outputs, and the sizes that the capture left open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from vfx.capture.outputs import named_tensors, plain
from vfx.capture.signature import Call
from vfx.errors import ArgumentError, listed
from vfx.options import ExportOptions


def names_of(module: nn.Module, call: Call, options: ExportOptions) -> tuple[list[str] | None, list[str] | None]:
    """The names of inputs and outputs: those asked for, else the keys of a dict that forward returns (None: the
    exporter's own). Raises ArgumentError where their number is not that of the inputs or outputs, or one stands twice.
    """
    value = plain(module(*call.args, **call.kwargs))
    paths = list(named_tensors(value))
    inputs = _asked(options.input_names, len(call.tensors()), "input")
    outputs = _asked(options.output_names, len(paths), "output")
    if outputs is None and isinstance(value, dict):
        outputs = [re.sub(r"\W+", "_", path).strip("_") for path in paths]
    both = sorted({*(inputs or ())} & {*(outputs or ())})
    if both:
        raise ArgumentError(f"{listed(both)} is the name of an input and of an output; give each a name of its own")
    return inputs, outputs


def _asked(names: Sequence[str] | None, count: int, what: str) -> list[str] | None:
    if not names:
        return None
    if len(names) != count or len(set(names)) != count or not all(names):
        raise ArgumentError(f"{what}_names must be {count} names, one for each {what} of the network, got {names!r}")
    return list(names)


def name_axes(model: Any, names: Sequence[str] | None, batch: bool) -> None:
    """Name the open sizes of an onnx_ir model as its inputs show them one after another, everywhere in the graph.

    ``batch``: whether the first of them is that of the samples, which is called so where no names are given. Raises
    ArgumentError where the number of names is not that of the open sizes.
    """
    symbols_read = [
        str(size.value) for graph_input in model.graph.inputs for size in graph_input.shape if not isinstance(size, int)
    ]
    symbols = list(dict.fromkeys(symbols_read))
    if names and (len(names) != len(symbols) or len(set(names)) != len(names)):
        raise ArgumentError(
            f"axis_names must be {len(symbols)} names, one for each size that the capture left open, got {names!r}"
        )
    chosen = list(names) if names else ["batch"] if batch else []
    new_names = dict(zip(symbols, chosen))
    if not new_names:
        return
    for value in _values(model.graph):
        if value.shape is not None:  # a shape of its own: some are shared and cannot be changed
            value.shape = type(value.shape)([_renamed(size, new_names) for size in value.shape])


def _renamed(size: Any, new_names: Mapping[str, str]) -> int | str | None:
    """A size, whose open parts have new names."""
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"[^\W\d]\w*", lambda symbol: new_names.get(symbol[0], symbol[0]), str(size.value))


def _values(graph: Any) -> Iterable[Any]:
    """Every value of a graph whose shape may be known."""
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
