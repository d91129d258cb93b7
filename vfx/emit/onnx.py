"""ONNX export through torch's dynamo exporter, checked in ONNX Runtime before the file appears."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vfx.capture.capture import capture
from vfx.capture.exporting import DYNAMIC_BATCH, EXPORTING, exported
from vfx.capture.outputs import named_tensors
from vfx.capture.signature import Call
from vfx.emit.onnx_files import check_no_link, name_weights, place_file, place_pair
from vfx.emit.onnx_names import name_axes, names_of
from vfx.emit.provenance import with_facts
from vfx.emit.trials import Axes, trials
from vfx.errors import ArgumentError, VerificationError
from vfx.extras import needed_for
from vfx.files import drafts_beside
from vfx.options import ExportOptions
from vfx.program import Program
from vfx.proof import SINGLE, error_to_size

with needed_for("ONNX"):
    import onnx
    import onnxruntime

ROUNDINGS = 16  # of half precision, which holds three digits and cannot meet the tolerance
IN_ONE_FILE = 3 * 2**29  # bytes of weights; protobuf ends at 2 GiB
_SAME = ExportOptions()


def export_onnx(
    module: nn.Module,
    path: Path,
    call: Call,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    axes: Axes = None,
    metadata: Mapping[str, str] | None = None,
    options: ExportOptions = _SAME,
) -> float:
    """Write ``module`` with a dynamic batch; returns its largest difference to the module in ONNX Runtime.

    Inputs are called like forward's arguments, outputs like the keys of a dict that forward returns, the size of the
    samples ``batch``, unless ``options`` names them. Weights above 1.5 GiB lie beside the graph, in
    ``<name>.<digest>.data``; ``metadata`` goes into the graph. With other ``dynamic_shapes`` the file is compared at
    the shapes of ``call`` alone, unless ``axes`` says where samples stand (an axis for each tensor, or None). Raises
    ArgumentError if torch cannot export the network; VerificationError, and writes nothing, if ONNX Runtime cannot run
    it or differs by more than 1e-4 (16 roundings in half precision) at batch 1 or 7, in int8 by more than
    ``vfx.emit.onnx_precision.NOISE`` on the calibration data; OutputError.
    """
    module = module.to("cpu").eval()
    onnx_program, program = _converted(module, call, dynamic_shapes, options)
    name_axes(onnx_program.model, options.axis_names, batch=dynamic_shapes == DYNAMIC_BATCH)
    onnx_program.model.metadata_props.update(metadata or {})
    tried = list(trials(module, call, dynamic_shapes, axes))
    values = onnx_program.model.graph.initializers.values()
    if sum(value.const_value.nbytes for value in values if value.const_value is not None) <= IN_ONE_FILE:
        model = onnx_program.model_proto
        worst = _compare(module, model.SerializeToString(), tried, _tolerance(module, call))
        if options.precision != "same":
            model, worst = _narrowed(module, model, tried, path, capture(program, call), options)
        place_file(model.SerializeToString(), path)
        return worst
    if options.precision != "same":
        raise ArgumentError(
            f"{options.precision} is made of networks whose weights fit into one file (1.5 GiB); export "
            "module.half() for float16"
        )
    check_no_link(path)
    with drafts_beside(path) as folder:
        graph = folder / "graph.onnx"
        onnx_program.save(str(graph), external_data=True)
        weights = name_weights(graph, folder / "graph.onnx.data", path)
        worst = _compare(module, graph, tried, _tolerance(module, call))
        place_pair(graph, weights, path)
    return worst


def _converted(
    module: nn.Module, call: Call, dynamic_shapes: Any, options: ExportOptions
) -> tuple[Any, ExportedProgram]:
    """The network as torch exports it. Raises ArgumentError."""
    with EXPORTING, _quiet(), torch.no_grad():
        program, _ = exported(module, call, dynamic_shapes)
        inputs, outputs = names_of(module, call, options)
        named: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "opset_version": options.opset}
        try:
            network = torch.onnx.export(program, (), dynamo=True, verbose=False, **named)
        except Exception as error:  # beside its own class the exporter lets those of its passes through
            cause = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
            raise ArgumentError(
                f"torch's exporter cannot write this network ({_types(module, call)}) as ONNX in opset "
                f"{options.opset}: {cause}; use another opset or .pt2"
            ) from error
    assert network is not None  # with dynamo=True
    made = network.model.opset_imports[""]
    if made != options.opset:  # the exporter's converter gives up in silence
        raise ArgumentError(f"torch's exporter writes this network in opset {made} only, not {options.opset}")
    return network, program


def _narrowed(
    module: nn.Module,
    model: Any,
    tried: Sequence[tuple[str, Call]],
    path: Path,
    program: Program,
    options: ExportOptions,
) -> tuple[Any, float]:
    """A graph in the precision that ``options`` asks for and its error, both in ONNX Runtime."""
    from vfx.emit.onnx_precision import NOISE, Calibration, in_float16, in_int8, noise

    metadata = {fact.key: fact.value for fact in model.metadata_props}
    with _quiet():
        if options.precision == "float16":
            small = in_float16(model)
            onnx.helper.set_model_props(small, with_facts(metadata, precision="float16"))
            tolerance = ROUNDINGS * torch.finfo(torch.float16).eps
            return small, _compare(module, small.SerializeToString(), tried, tolerance)
        data = Calibration(
            program, [graph_input.name for graph_input in model.graph.input], options.data, options.max_samples
        )
        with drafts_beside(path) as folder:
            small = in_int8(model, data, folder)
        deviation = noise(module, _session(small.SerializeToString()), data)
    if not deviation.share <= NOISE:
        raise VerificationError(
            f"in int8 output {deviation.output or 0} differs by {deviation.share:.2f} of its standard deviation on the "
            f"calibration data (at most {NOISE} is let pass); nothing was written. Use float16, or more data"
        )
    onnx.helper.set_model_props(small, with_facts(metadata, precision="int8", noise=round(deviation.share, 6)))
    return small, deviation.share


def _types(module: nn.Module, call: Call) -> str:
    """The types of a network's weights and inputs, for messages."""
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in _tensors(module, call)}))


def _tensors(module: nn.Module, call: Call) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *call.tensors()]


def _tolerance(module: nn.Module, call: Call) -> float:
    narrow = [x.dtype for x in _tensors(module, call) if x.is_floating_point() and x.dtype.itemsize < 4]
    return max([SINGLE, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in narrow)])


@torch.no_grad()
def _compare(module: nn.Module, model: bytes | Path, tried: Sequence[tuple[str, Call]], tolerance: float) -> float:
    """The largest difference between a graph in ONNX Runtime and the module, over some calls with their names."""
    worst = 0.0
    try:
        session = _session(model)
    except Exception as error:  # ONNX Runtime's classes are not public
        raise VerificationError(_unrunnable(module, tried[0][1], error)) from error
    for name, call in tried:
        expected = named_tensors(module(*call.args, **call.kwargs)).values()
        try:
            feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), call.tensors(), strict=True)}
            outputs = session.run(None, feeds)
        except Exception as error:
            raise VerificationError(_unrunnable(module, call, error)) from error
        for index, (want, got) in enumerate(zip(expected, outputs, strict=True)):
            difference = error_to_size(want, torch.as_tensor(got), least=1.0)
            if not difference <= tolerance:
                raise VerificationError(
                    f"ONNX Runtime differs from the module by {difference:.1e} in output {index} at {name}; "
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


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress lines and deprecation warnings say nothing about the user's network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
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
