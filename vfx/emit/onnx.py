"""ONNX export through torch's dynamo exporter, checked in ONNX Runtime before the file appears."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfx.capture.exporting import DYNAMIC_BATCH, EXPORTING, exported
from vfx.capture.outputs import named_tensors, plain
from vfx.capture.signature import Call, has_batch
from vfx.emit.onnx_files import check_no_link, name_weights, place_file, place_pair
from vfx.errors import ArgumentError, VerificationError
from vfx.extras import needed_for
from vfx.files import drafts_beside
from vfx.proof import SINGLE, error_to_size, is_defined, samples

with needed_for("ONNX"):
    import onnx
    import onnxruntime

ROUNDINGS = 16  # of half precision, which holds three digits and cannot meet the tolerance
BATCHES = (1, 7)
Axes = Sequence[int | None] | None  # on which samples stand, one for each tensor; None where nobody says
IN_ONE_FILE = 3 * 2**29  # bytes of weights; protobuf ends at 2 GiB


def export_onnx(
    module: nn.Module,
    path: Path,
    call: Call,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    axes: Axes = None,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write ``module`` with a dynamic batch; returns its largest difference to the module in ONNX Runtime.

    Inputs are called like forward's arguments, outputs like the keys of a dict that forward returns. Weights above
    1.5 GiB lie beside the graph, in ``<name>.<digest>.data``; ``metadata`` goes into the graph. With other
    ``dynamic_shapes`` the file is compared at the shapes of ``call`` alone, unless ``axes`` says where samples stand
    (an axis for each tensor, or None). Raises ArgumentError if torch cannot export the network; VerificationError, and
    writes nothing, if ONNX Runtime cannot run it or differs by more than 1e-4 (16 roundings in half precision) at batch
    1 or 7; OutputError.
    """
    module = module.to("cpu").eval()
    onnx_program = _converted(module, call, dynamic_shapes)
    onnx_program.model.metadata_props.update(metadata or {})
    usual = dynamic_shapes == DYNAMIC_BATCH
    axes = axes or [0 if batched else None for batched in has_batch(call.tensors())] if usual or axes else None
    sizes = BATCHES if axes is not None and dynamic_shapes is not None else (None,)
    values = onnx_program.model.graph.initializers.values()
    if sum(value.const_value.nbytes for value in values if value.const_value is not None) <= IN_ONE_FILE:
        model = onnx_program.model_proto.SerializeToString()
        worst = _compare(module, model, call, axes, sizes)
        place_file(model, path)
        return worst
    check_no_link(path)
    with drafts_beside(path) as folder:
        graph = folder / "graph.onnx"
        onnx_program.save(str(graph), external_data=True)
        weights = name_weights(graph, folder / "graph.onnx.data", path)
        worst = _compare(module, graph, call, axes, sizes)
        place_pair(graph, weights, path)
    return worst


def _converted(module: nn.Module, call: Call, dynamic_shapes: Any) -> Any:
    """The network as torch exports it. Raises ArgumentError."""
    with EXPORTING, _quiet(), torch.no_grad():
        program, _ = exported(module, call, dynamic_shapes)
        names = _names(module, call)
        try:
            return torch.onnx.export(program, (), dynamo=True, verbose=False, output_names=names)
        except Exception as error:  # beside its own class the exporter lets those of its passes through
            cause = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
            raise ArgumentError(
                f"torch's exporter cannot write this network ({_types(module, call)}) as ONNX: {cause}; use .pt2"
            ) from error


def _names(module: nn.Module, call: Call) -> list[str] | None:
    """Names of the outputs, where forward gives them any."""
    value = plain(module(*call.args, **call.kwargs))
    return [re.sub(r"\W+", "_", path).strip("_") for path in named_tensors(value)] if isinstance(value, dict) else None


def _types(module: nn.Module, call: Call) -> str:
    """The types of a network's weights and inputs, for messages."""
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in _tensors(module, call)}))


def _tensors(module: nn.Module, call: Call) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *call.tensors()]


def _tolerance(module: nn.Module, call: Call) -> float:
    narrow = [x.dtype for x in _tensors(module, call) if x.is_floating_point() and x.dtype.itemsize < 4]
    return max([SINGLE, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in narrow)])


@torch.no_grad()
def _compare(module: nn.Module, model: bytes | Path, call: Call, axes: Axes, sizes: Sequence[int | None]) -> float:
    generator = torch.Generator().manual_seed(0)
    tolerance, worst = _tolerance(module, call), 0.0
    try:
        session = _session(model)
    except Exception as error:  # ONNX Runtime's classes are not public
        raise VerificationError(_unrunnable(module, call, error)) from error
    for batch in sizes:
        fresh = _fresh(module, call, axes, batch, generator)
        expected = named_tensors(module(*fresh.args, **fresh.kwargs)).values()
        try:
            feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), fresh.tensors(), strict=True)}
            outputs = session.run(None, feeds)
        except Exception as error:
            raise VerificationError(_unrunnable(module, call, error)) from error
        for index, (want, got) in enumerate(zip(expected, outputs, strict=True)):
            difference = error_to_size(want, torch.as_tensor(got), least=1.0)
            if not difference <= tolerance:
                raise VerificationError(
                    f"ONNX Runtime differs from the module by {difference:.1e} in output {index} at batch {batch}; "
                    "nothing was written. Export as .pt2 and report the operator mix"
                )
            worst = max(worst, difference)
    return worst


def _session(model: bytes | Path) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(str(model) if isinstance(model, Path) else model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _unrunnable(module: nn.Module, call: Call, error: Exception) -> str:
    return (
        f"ONNX Runtime cannot run {type(module).__name__} in {_types(module, call)}, so nothing was written: "
        f"{str(error).splitlines()[0]}. Export the network in float32 (module.float()), or to .pt2"
    )


def _fresh(module: nn.Module, call: Call, axes: Axes, batch: int | None, generator: torch.Generator) -> Call:
    """Random samples in place of the call's, unless they lead to NaN; then its own, as often as need be."""
    if axes is None or batch is None:
        return call
    drawn = iter(samples(call.tensors(), axes, batch, generator))
    fresh = call.map(lambda x: next(drawn) if isinstance(x, Tensor) else x)
    if is_defined(module(*fresh.args, **fresh.kwargs)):
        return fresh
    own = iter(axes)
    return call.map(lambda x: _repeated(x, next(own), batch) if isinstance(x, Tensor) else x)


def _repeated(x: Tensor, axis: int | None, count: int) -> Tensor:
    return x if axis is None else x.index_select(axis, torch.arange(count) % x.shape[axis])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress lines and deprecation warnings say nothing about the user's network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
